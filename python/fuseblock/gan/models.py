"""Generators and discriminators out of `fuseblock.nn`'s blocks: DCGAN's, and SNGAN's residual ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..nn import (
    BatchNormAct2d,
    Conv2d,
    Conv2dBlock,
    ConvTranspose2dBlock,
    ResidualBlock2d,
    Sequential,
    spectral_norm,
)


def _stages(size: int) -> int:
    """How many doublings lead from 4x4 to the size."""
    stages = int(size).bit_length() - 3
    if size != 4 << max(stages, 1):
        raise ValueError(f"size: expected a power of two from 8 on, got {size}")
    return stages


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _flat_latents(z: Tensor, latent: int) -> Tensor:
    """(N, latent) from that or (N, latent, 1, 1)."""
    flat = z.flatten(1) if z.dim() == 4 else z
    if flat.dim() != 2 or flat.shape[1] != latent:
        raise ValueError(f"expected latents (N, {latent}) or (N, {latent}, 1, 1), got {tuple(z.shape)}")
    return flat


def _check_images(images: Tensor, channels: int, size: int) -> None:
    if tuple(images.shape[1:]) != (channels, size, size):
        raise ValueError(f"expected images (N, {channels}, {size}, {size}), got {tuple(images.shape)}")


@torch.no_grad()
def init_dcgan(model: nn.Module) -> nn.Module:
    """Initialise as Radford et al. 2016 (arXiv:1511.06434): convolutions N(0, 0.02), batch norm weights N(1, 0.02).

    Biases are 0. Works on any model, in place; returns it. Where a weight is normalised (:func:`fuseblock.nn.spectral_norm`,
    parametrizations), what it is computed from is initialised; u and v of spectral norm follow in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            _set_weight(module, partial(nn.init.normal_, mean=0.0, std=0.02))
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _set_weight(module: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    """``fill`` the weight, or what it is computed from."""
    if is_parametrized(module, "weight"):
        module.weight = fill(torch.empty_like(module.weight))  # type: ignore[arg-type]
        return
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    if weight is None:
        raise ValueError(f"expected a parameter 'weight' to initialise in {module}: do it before normalising")
    fill(weight)


@torch.no_grad()
def init_sngan(model: nn.Module) -> nn.Module:
    """Initialise as the code of Miyato et al. 2018: Xavier uniform, gain sqrt(2) inside residual blocks, else 1; biases 0.

    Works in place, best before :func:`fuseblock.nn.spectral_norm` (normalised weights as in :func:`init_dcgan`); returns the
    model. Batch norm keeps its weights 1 and biases 0.
    """
    inner = {
        conv
        for module in model.modules()
        if isinstance(module, ResidualBlock2d | _PreActivationBlock)
        for conv in (module.conv1, module.conv2)
    }
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = math.sqrt(2.0) if module in inner else 1.0
            _set_weight(module, partial(nn.init.xavier_uniform_, gain=gain))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class DCGANGenerator(Sequential):
    """Latents to images by transposed convolutions, batch norm and ReLU; tanh at the end (Radford et al. 2016,
    arXiv:1511.06434).

    A k4 s1 block makes 4x4 pixels, k4 s2 p1 blocks double the size. The block that makes s x s pixels has
    ``width * min(max_multiplier, size / (2 s))`` channels; the last makes ``channels``.

    Args:
        size: of the images, a power of two from 8 on.
        channels: of the images.
        width: channels at half the size.
        latent: numbers per image.
        max_multiplier: bounds the channels at low resolution, to the paper's 8 ``width`` by default.

    Shapes: latents ``(N, latent)`` or ``(N, latent, 1, 1)`` -> images ``(N, channels, size, size)`` in (-1, 1).

    Raises:
        ValueError: a size that is no power of two or below 8; latents of another shape.

    Examples::

        >>> import torch, fuseblock
        >>> fuseblock.gan.DCGANGenerator(size=32, width=8)(torch.randn(5, 100)).shape
        torch.Size([5, 3, 32, 32])
    """

    def __init__(
        self, size: int = 64, channels: int = 3, width: int = 64, latent: int = 100, max_multiplier: int = 8
    ) -> None:
        stages = _stages(size)
        _check_positive(channels=channels, width=width, latent=latent, max_multiplier=max_multiplier)
        widths = [width * min(max_multiplier, 1 << exponent) for exponent in reversed(range(stages))]
        blocks: list[nn.Module] = [ConvTranspose2dBlock(latent, widths[0], 4, activation="relu")]
        for before, after in itertools.pairwise(widths):
            blocks.append(ConvTranspose2dBlock(before, after, 4, 2, 1, activation="relu"))
        blocks.append(
            ConvTranspose2dBlock(widths[-1], channels, 4, 2, 1, norm=None, activation="tanh", bias=False)
        )
        super().__init__(*blocks)
        self.size, self.channels, self.latent = size, channels, latent
        init_dcgan(self)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents; shapes as in the class."""
        images: Tensor = super().forward(_flat_latents(z, self.latent)[:, :, None, None])
        return images


class DCGANDiscriminator(Sequential):
    """Images to logits by strided convolutions, batch norm and LeakyReLU(0.2) (Radford et al. 2016, arXiv:1511.06434).

    The mirror image of :class:`DCGANGenerator`: k4 s2 p1 blocks halve the size down to 4x4 pixels, the first without norm,
    and a k4 convolution makes the logit. No sigmoid: see :mod:`fuseblock.gan.losses`.

    Args:
        size, channels: of the images, as in :class:`DCGANGenerator`.
        width: channels after the first block.
        max_multiplier: bounds the channels at low resolution.
        norm: "batch", "instance", or None, which R1 and WGAN-GP want.

    Shapes: images ``(N, channels, size, size)`` -> logits ``(N,)``.

    Raises:
        ValueError: a size that is no power of two or below 8; images of another shape; an unknown norm.
    """

    def __init__(
        self,
        size: int = 64,
        channels: int = 3,
        width: int = 64,
        max_multiplier: int = 8,
        norm: str | None = "batch",
    ) -> None:
        stages = _stages(size)
        _check_positive(channels=channels, width=width, max_multiplier=max_multiplier)
        widths = [width * min(max_multiplier, 1 << exponent) for exponent in range(stages)]
        blocks: list[nn.Module] = [Conv2dBlock(channels, widths[0], 4, 2, 1, norm=None, bias=False)]
        for before, after in itertools.pairwise(widths):
            blocks.append(Conv2dBlock(before, after, 4, 2, 1, norm=norm))
        super().__init__(*blocks, Conv2d(widths[-1], 1, 4, bias=False))
        self.size, self.channels = size, channels
        init_dcgan(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images; shapes as in the class."""
        _check_images(images, self.channels, self.size)
        logits: Tensor = super().forward(images)
        return logits.flatten()


class _PreActivationBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))): SNGAN's residual block where the size stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        return x + hidden


class ResNetGenerator(nn.Module):
    """SNGAN's generator: a linear map to 4x4 pixels, residual blocks with batch norm that double the size, batch norm,
    ReLU, a 3x3 convolution, tanh (Miyato et al. 2018, arXiv:1802.05957, tables 4 and 5).

    At 4 * 2^i pixels there are ``width * min(max_multiplier, size / (4 * 2^i))`` channels. The paper's models: size 32 has
    width 256 and max_multiplier 1, size 128 has width 64 and max_multiplier 16.

    Args:
        size, channels: of the images; size is a power of two from 8 on.
        width: channels at full size.
        latent: numbers per image.
        max_multiplier: bounds the channels at low resolution.

    Shapes: latents ``(N, latent)`` or ``(N, latent, 1, 1)`` -> images ``(N, channels, size, size)`` in (-1, 1).

    Raises:
        ValueError: a size that is no power of two or below 8; latents of another shape.
    """

    def __init__(
        self, size: int = 32, channels: int = 3, width: int = 256, latent: int = 128, max_multiplier: int = 1
    ) -> None:
        super().__init__()
        stages = _stages(size)
        _check_positive(channels=channels, width=width, latent=latent, max_multiplier=max_multiplier)
        widths = [width * min(max_multiplier, 1 << exponent) for exponent in reversed(range(stages + 1))]
        self.size, self.channels, self.latent = size, channels, latent
        self.linear = nn.Linear(latent, widths[0] * 16)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock2d(before, after, "up", activation="relu")
                for before, after in itertools.pairwise(widths)
            )
        )
        self.norm = BatchNormAct2d(widths[-1], activation="relu")
        self.conv = Conv2d(widths[-1], channels, 3, padding=1)
        init_sngan(self)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents; shapes as in the class."""
        hidden = self.linear(_flat_latents(z, self.latent)).unflatten(1, (-1, 4, 4))
        return torch.tanh(self.conv(self.norm(self.blocks(hidden))))


class ResNetDiscriminator(nn.Module):
    """SNGAN's discriminator: residual blocks without norm that halve the size, residual blocks of the same size, ReLU, the
    sum over pixels, a linear map (Miyato et al. 2018, arXiv:1802.05957, tables 4 and 5).

    After i halvings there are ``width * min(max_multiplier, 2^(i - 1))`` channels. The paper's models: size 32 has width
    128, max_multiplier 1, 2 halvings, 2 blocks of the same size; size 128 has width 64, max_multiplier 16, 5 and 1.

    Args:
        size, channels: of the images; size is a power of two from 8 on.
        width: channels after the first block.
        max_multiplier: bounds the channels at low resolution.
        halvings: default: those that lead to 4x4 pixels, but 2 for size 32.
        same_blocks: residual blocks behind them; default 2 for size 32, else 1.
        spectral: divide all weights by their largest singular value (:func:`fuseblock.nn.spectral_norm`), as the paper does.

    Shapes: images ``(N, channels, size, size)`` -> logits ``(N,)``.

    Raises:
        ValueError: a size that is no power of two or below 8; more halvings than the size has; images of another shape.
    """

    def __init__(
        self,
        size: int = 32,
        channels: int = 3,
        width: int = 128,
        max_multiplier: int = 1,
        halvings: int | None = None,
        same_blocks: int | None = None,
        spectral: bool = True,
    ) -> None:
        super().__init__()
        stages = _stages(size)
        _check_positive(channels=channels, width=width, max_multiplier=max_multiplier)
        if halvings is None:
            halvings = 2 if size == 32 else stages
        if same_blocks is None:
            same_blocks = 2 if size == 32 else 1
        if not 1 <= halvings <= stages + 2 or same_blocks < 0:
            raise ValueError(
                f"expected 1 to {stages + 2} halvings of size {size} and at least 0 same_blocks, "
                f"got {halvings} and {same_blocks}"
            )
        widths = [width * min(max_multiplier, 1 << exponent) for exponent in range(halvings)]
        self.size, self.channels = size, channels
        blocks: list[nn.Module] = [ResidualBlock2d(channels, widths[0], "down", first=True)]
        blocks += [ResidualBlock2d(before, after, "down") for before, after in itertools.pairwise(widths)]
        blocks += [_PreActivationBlock(widths[-1]) for _ in range(same_blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], 1)
        init_sngan(self)
        if spectral:
            spectral_norm(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images; shapes as in the class."""
        _check_images(images, self.channels, self.size)
        pooled = torch.relu(self.blocks(images)).sum((2, 3))
        logits: Tensor = self.linear(pooled)
        return logits.flatten()
