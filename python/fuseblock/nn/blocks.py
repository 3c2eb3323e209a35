"""Convolution blocks: convolution, normalisation and activation as one `torch.nn.Sequential`, and residual blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import activation_module, unusual
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .norm_act import BatchNormAct1d, BatchNormAct2d, InstanceNormAct1d, InstanceNormAct2d
from .sequential import Sequential, run

_NORMS: dict[tuple[str, int], type[torch.nn.Module]] = {
    ("batch", 1): BatchNormAct1d,
    ("batch", 2): BatchNormAct2d,
    ("instance", 1): InstanceNormAct1d,
    ("instance", 2): InstanceNormAct2d,
}


class _ConvBlock(Sequential):
    """[convolution, norm, activation], or [convolution, activation] without norm."""

    _convolution: type[torch.nn.Module]
    _dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        *,
        norm: str | None = "batch",
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        bias: bool | None = None,
        device: Any = None,
        dtype: Any = None,
        norm_options: dict[str, Any] | None = None,
        **convolution: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        conv = self._convolution(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=norm is None if bias is None else bias,
            **factory,
            **convolution,
        )
        if norm is not None and (norm, self._dims) not in _NORMS:
            raise ValueError(
                f"{type(self).__name__}: expected norm 'batch', 'instance' or None, got {norm!r}"
            )
        modules = [conv]
        if norm is not None:
            modules.append(_NORMS[norm, self._dims](out_channels, **factory, **(norm_options or {})))
        act = activation_module(activation, negative_slope, **factory)
        super().__init__(*modules, *([] if act is None else [act]))

    @property
    def weight(self) -> Tensor:
        """The convolution's: initialisations take ``m.weight`` of every module that has "Conv" in the name of its class."""
        return self[0].weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The convolution's."""
        return self[0].bias  # type: ignore[no-any-return]


class Conv2dBlock(_ConvBlock):
    """Convolution, norm and activation: ``nn.Sequential(Conv2d, BatchNorm2d, LeakyReLU)`` with the latter two in one pass.

    A `torch.nn.Sequential` of `Conv2d`, `BatchNormAct2d` or `InstanceNormAct2d`, so that a checkpoint of such a stock
    ``Sequential`` loads (keys ``0.weight``, ``1.weight``, ..., ``2.weight`` for PReLU). Without norm: `Conv2d` with
    bias, then the activation. ``weight`` and ``bias`` are the convolution's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as in `torch.nn.Conv2d`.
        norm: "batch", "instance" or None.
        activation: identity, relu, leaky_relu, prelu, silu, tanh or elu.
        negative_slope: of leaky_relu.
        bias: of the convolution; default: only without norm.
        norm_options: more arguments of the norm (``eps``, ``momentum``, ``affine``, ...).
        convolution: more arguments of `torch.nn.Conv2d` (``dilation``, ``groups``, ``padding_mode``).

    Raises:
        ValueError: an unknown norm or activation.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H', W'), memory format kept.
    """

    _convolution, _dims = Conv2d, 2


class ConvTranspose2dBlock(_ConvBlock):
    """`Conv2dBlock` with a `torch.nn.ConvTranspose2d`; ``output_padding`` and so on are its arguments."""

    _convolution, _dims = ConvTranspose2d, 2


class Conv1dBlock(_ConvBlock):
    """`Conv2dBlock` in one dimension, (N, C, L), as vocoders use it."""

    _convolution, _dims = Conv1d, 1


class ConvTranspose1dBlock(_ConvBlock):
    """`ConvTranspose2dBlock` in one dimension, (N, C, L)."""

    _convolution, _dims = ConvTranspose1d, 1


class ResidualBlock2d(torch.nn.Module):
    r"""A residual block: same size, twice the size ("up"), or half the size ("down").

    * ``same`` (ResNet, SRGAN, CycleGAN): conv - norm - act - conv - norm, plus the shortcut, then ``final_activation``; the
      second norm, the addition and the final activation are one pass;
    * ``up`` (generators of SNGAN and BigGAN): norm - act - upsample - conv - norm - act - conv, plus upsample - conv 1x1;
    * ``down`` (their discriminators): [act] - conv - act - conv - average pool, plus conv 1x1 - average pool; norms are
      inserted before the activations where ``norm`` is given.

    Args:
        in_channels, out_channels: channels; default of the latter: the former. The shortcut has a 1x1 convolution where they
            differ, and always in "up" and "down".
        mode: "same", "up" or "down".
        norm: "batch", "instance" or None; "auto" is "batch", but None for "down".
        activation, negative_slope: inside the block, as in `Conv2dBlock`.
        final_activation: "same" only: after the addition; default identity.
        first: "down" only: the block that sees the image, without activation before its first convolution.
        kernel_size, padding_mode: of the 3x3 convolutions.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W), (.., 2H, 2W) or (.., H // 2, W // 2).

    Raises:
        ValueError: an unknown mode, norm or activation, an even kernel_size, or an option of another mode.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        mode: str = "same",
        *,
        norm: str | None = "auto",
        activation: str = "relu",
        negative_slope: float = 0.2,
        final_activation: str = "identity",
        first: bool = False,
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if mode not in ("same", "up", "down"):
            raise ValueError(f"ResidualBlock2d: expected mode 'same', 'up' or 'down', got {mode!r}")
        if mode != "same" and final_activation != "identity":
            raise ValueError(f"ResidualBlock2d: final_activation belongs to mode 'same', got mode {mode!r}")
        if mode != "down" and first:
            raise ValueError(f"ResidualBlock2d: first belongs to mode 'down', got mode {mode!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ResidualBlock2d: expected an odd kernel_size, got {kernel_size}")
        out = in_channels if out_channels is None else out_channels
        norm = (None if mode == "down" else "batch") if norm == "auto" else norm
        self.mode, self.first = mode, first
        factory = {"device": device, "dtype": dtype}
        act = {"activation": activation, "negative_slope": negative_slope, **factory}
        wide = {"padding": kernel_size // 2, "padding_mode": padding_mode, **factory}
        shortcut = mode != "same" or in_channels != out
        self.shortcut = Conv2d(in_channels, out, 1, **factory) if shortcut else torch.nn.Identity()
        middle = in_channels if mode == "down" else out
        if mode == "same":
            self.conv1 = Conv2d(in_channels, out, kernel_size, bias=norm is None, **wide)
            self.norm1 = _norm_act(norm, out, **act)
            self.conv2 = Conv2d(out, out, kernel_size, bias=norm is None, **wide)
            self.norm2 = _norm_act(norm, out, **{**act, "activation": final_activation})
            return
        self.norm1 = torch.nn.Identity() if first else _norm_act(norm, in_channels, **act)
        self.conv1 = Conv2d(in_channels, middle, kernel_size, bias=norm is None or mode == "down", **wide)
        self.norm2 = _norm_act(norm, middle, **act)
        self.conv2 = Conv2d(middle, out, kernel_size, **wide)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        y: Tensor
        if self.mode == "same":
            return run(self._sequence(), input, self.shortcut(input))
        if self.mode == "up":
            hidden = run(self._sequence(), _doubled(self.norm1(input)))
            # A 1x1 convolution and nearest upsampling commute: the convolution sees a quarter of the pixels.
            y = hidden + _doubled(self.shortcut(input))
            return y
        hidden = run(self._sequence(), input)
        pooled = torch.nn.functional.avg_pool2d
        # So do a 1x1 convolution and the average pool; the pool of the sum is the sum of the pools.
        y = pooled(hidden, 2) + self.shortcut(pooled(input, 2))
        return y

    def _sequence(self) -> list[torch.nn.Module]:
        """What `run` runs; in "up" behind the first norm and the upsampling."""
        if self.mode == "same":
            return [self.conv1, *_inner(self.norm1), self.conv2, self.norm2]
        inner = [self.conv1, *_inner(self.norm2), self.conv2]
        return inner if self.mode == "up" else [*_inner(self.norm1), *inner]

    def extra_repr(self) -> str:
        """The mode."""
        return f"mode={self.mode!r}"


def _doubled(x: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


class _PlainActivation(torch.nn.Module):
    """What stands for a norm with activation where there is no norm; adds a residual like one."""

    def __init__(self, activation: str, negative_slope: float, **factory: Any) -> None:
        super().__init__()
        self.act = activation_module(activation, negative_slope, **factory)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        summed = input if residual is None else input + residual
        return summed if self.act is None else self.act(summed)


def _inner(norm: torch.nn.Module) -> list[torch.nn.Module]:
    """What stands between the convolutions, as `run` knows it: where there is no norm, an activation or nothing."""
    if type(norm) is not _PlainActivation or unusual(norm):
        return [norm]
    return [] if norm.act is None else [norm.act]


def _norm_act(
    norm: str | None,
    channels: int,
    *,
    activation: str,
    negative_slope: float,
    **factory: Any,
) -> torch.nn.Module:
    if norm is None:
        return _PlainActivation(activation, negative_slope, **factory)
    if (norm, 2) not in _NORMS:
        raise ValueError(f"ResidualBlock2d: expected norm 'batch', 'instance' or None, got {norm!r}")
    return _NORMS[norm, 2](channels, activation=activation, negative_slope=negative_slope, **factory)
