"""What a GAN's training does besides blocks: whole steps of two networks, averaged weights, filters, biases.

Stock is what users write with PyTorch alone, in the words of DCGAN's and StyleGAN's training loops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gan_models import critic, dcgan_g, seq

Step = Callable[[], dict[str, Tensor]]
LATENT = 100


class Pair(nn.Module):
    """A DCGAN-64: generator and discriminator. Called with images it judges what is generated from a part of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.generator, self.discriminator = seq(dcgan_g(width)), seq(critic(width, True))

    def forward(self, images: Tensor) -> Tensor:
        """The discriminator's logits of generated images."""
        judged: Tensor = self.discriminator(self.generator(latents(images)))
        return judged


def latents(images: Tensor) -> Tensor:
    """(N, 100, 1, 1) normal values, from images that are such."""
    return images.flatten(1)[:, :LATENT, None, None].contiguous()


def training_step(model: nn.Module, images: Tensor, ours: bool) -> Step:
    """A step of the discriminator and one of the generator, with Adam and the non-saturating loss; the same code for all."""
    del ours
    generator, discriminator = model.get_submodule("generator"), model.get_submodule("discriminator")
    z = latents(images)
    to_generator, to_discriminator = (
        torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999), capturable=images.is_cuda)
        for network in (generator, discriminator)
    )

    def step() -> dict[str, Tensor]:
        fake = generator(z)
        real, judged = discriminator(images), discriminator(fake.detach())
        to_discriminator.zero_grad()
        (F.softplus(-real).mean() + F.softplus(judged).mean()).backward()
        to_discriminator.step()
        to_generator.zero_grad()
        discriminator.requires_grad_(False)
        F.softplus(-discriminator(fake)).mean().backward()
        discriminator.requires_grad_(True)
        to_generator.step()
        gradients = {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"y": torch.cat([real.detach(), judged.detach()]), **gradients}

    return step


def average_step(model: nn.Module, images: Tensor, ours: bool) -> Step:
    """An update of the averages of a model's weights; stock is the loop of StyleGAN2's training."""
    del images
    averages = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)  # what averages have to follow
    if ours:
        from fuseblock import gan

        ema = gan.ExponentialMovingAverage(averages, 0.999, buffers="copy")

        def update() -> dict[str, Tensor]:
            ema.update(model)
            return {"y": ema.averages[_SHOWN], **ema.averages}

        return update

    @torch.no_grad()
    def loop() -> dict[str, Tensor]:
        for average, weight in zip(averages.parameters(), model.parameters(), strict=True):
            average.copy_(weight.lerp(average, 0.999))
        for buffer, value in zip(averages.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)
        state = averages.state_dict()
        return {"y": state[_SHOWN], **state}

    return loop


_SHOWN = "generator.0.weight"


class Blur(nn.Module):
    """StyleGAN's resampling by a 4 x 4 binomial filter: twice the size, or half; PyTorch's as depthwise convolutions."""

    taps: Tensor

    def __init__(self, channels: int, up: int, down: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.channels, self.up, self.down = channels, up, down
        self.register_buffer("taps", torch.outer(row, row) * up**2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, up H / down, up W / down)."""
        weight = self.taps.to(x.dtype).expand(self.channels, 1, 4, 4)
        if self.up > 1:
            return F.conv_transpose2d(x, weight, stride=self.up, padding=1, groups=self.channels)
        return F.conv2d(x, weight, stride=self.down, padding=1, groups=self.channels)


class FusedBlur(Blur):
    """The same as one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, up H / down, up W / down)."""
        from fuseblock.functional import upfirdn2d

        padding = (2, 1) if self.up > 1 else (1, 1)
        before, after = padding
        return upfirdn2d(x, self.taps, self.up, self.down, (before, after, before, after))


class BiasLeaky(nn.Module):
    """StyleGAN's activation: bias, LeakyReLU, gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * math.sqrt(2)


class FusedBiasLeaky(BiasLeaky):
    """The same as one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        from fuseblock.functional import bias_act

        return bias_act(x, self.bias, activation="leaky_relu", negative_slope=0.2, gain=math.sqrt(2))


FUSED: dict[type[nn.Module], type[nn.Module]] = {Blur: FusedBlur, BiasLeaky: FusedBiasLeaky}


def fused(model: nn.Module) -> None:
    """Swap, in place, what `fuseblock.fuse` does not know: functions that users call by name."""
    for module in model.modules():
        module.__class__ = FUSED.get(type(module), type(module))
