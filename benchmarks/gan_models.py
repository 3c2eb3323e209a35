"""The stock models of the GAN cases, as lists of modules for one `torch.nn.Sequential`, or as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(
    cin: int,
    cout: int,
    k: int,
    s: int = 1,
    *,
    norm: bool | str = True,
    act: nn.Module | None = None,
    groups: int = 1,
) -> list[nn.Module]:
    """Convolution, norm, activation (LeakyReLU(0.2) by default)."""
    first = nn.Conv2d(cin, cout, k, s, (k - 1) // 2, bias=not norm, groups=groups)
    return [first, *norms(norm, cout), nn.LeakyReLU(0.2) if act is None else act]


def up(cin: int, cout: int, *, norm: bool = True, act: nn.Module | None = None) -> list[nn.Module]:
    """Transposed convolution k4 s2 p1, norm, activation (ReLU by default)."""
    first = nn.ConvTranspose2d(cin, cout, 4, 2, 1, bias=not norm)
    return [first, *norms(norm, cout), nn.ReLU() if act is None else act]


def norms(norm: bool | str, channels: int) -> list[nn.Module]:
    """A batch norm, an instance norm or nothing."""
    if norm == "instance":
        return [nn.InstanceNorm2d(channels)]
    return [nn.BatchNorm2d(channels)] if norm else []


def seq(*parts: list[nn.Module]) -> nn.Module:
    """The modules of all parts, one after the other."""
    return nn.Sequential(*(module for part in parts for module in part))


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.body(x)


def cyclegan(channels: int) -> nn.Module:
    """CycleGAN's residual block."""
    first = conv(channels, channels, 3, norm="instance", act=nn.ReLU())
    second = [nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.InstanceNorm2d(channels)]
    return Residual(*first, *second)


class SnganDown(nn.Module):
    """SNGAN's discriminator block: ReLU, conv, ReLU, conv, pool, with a 1x1 shortcut."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.act1, self.conv1 = nn.ReLU(), nn.Conv2d(cin, cin, 3, 1, 1)
        self.act2, self.conv2 = nn.ReLU(), nn.Conv2d(cin, cout, 3, 1, 1)
        self.shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        h = self.conv2(self.act2(self.conv1(self.act1(x))))
        return nn.functional.avg_pool2d(h + self.shortcut(x), 2)


def eight_layers() -> nn.Module:
    """A discriminator of eight convolutions."""
    return seq(
        conv(3, 64, 3, norm=False),
        conv(64, 64, 4, 2, norm=False),
        conv(64, 128, 3, norm=False),
        conv(128, 128, 4, 2, norm=False),
        conv(128, 256, 3, norm=False),
        conv(256, 256, 4, 2, norm=False),
        conv(256, 512, 3, norm=False),
        [nn.Conv2d(512, 1, 4)],
    )


class Weights(nn.Module):
    """The weights of a network's convolutions, as its forward would get them, and nothing done with them but a sum each."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The sums (and those of the biases, so that every parameter counts), times x."""
        convolutions = [module for module in self.network.modules() if isinstance(module, nn.Conv2d)]
        return torch.stack([module.weight.sum() + module.bias.sum() for module in convolutions]) * x


def dcgan_g(width: int) -> list[nn.Module]:
    """The generator of DCGAN-64."""
    return [
        nn.ConvTranspose2d(100, 8 * width, 4, bias=False),
        nn.BatchNorm2d(8 * width),
        nn.ReLU(),
        *up(8 * width, 4 * width),
        *up(4 * width, 2 * width),
        *up(2 * width, width),
        *up(width, 3, norm=False, act=nn.Tanh()),
    ]


def critic(width: int, norm: bool | str) -> list[nn.Module]:
    """A critic of 64x64 images: four halvings."""
    return [
        *conv(3, width, 4, 2, norm=False),
        *conv(width, 2 * width, 4, 2, norm=norm),
        *conv(2 * width, 4 * width, 4, 2, norm=norm),
        *conv(4 * width, 8 * width, 4, 2, norm=norm),
        nn.Conv2d(8 * width, 1, 4),
    ]


def r3gan(channels: int, groups: int) -> list[nn.Module]:
    """The residual block of R3GAN: a wide grouped convolution between two of size one."""
    wide = 2 * channels
    return [
        Residual(
            *conv(channels, wide, 1, norm=False),
            *conv(wide, wide, 3, norm=False, groups=groups),
            nn.Conv2d(wide, channels, 1),
        )
    ]
