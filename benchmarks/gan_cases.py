"""The registry of GAN cases: convolution blocks and networks that real users train, as plain `torch.nn` models.

Stock runs the model as it stands; fuseblock runs the same model after `fuseblock.fuse`, which is what a user would do.
Modes:

* ``forward``: ``torch.no_grad`` and ``eval``;
* ``train``: forward and the gradients of all parameters and of the input;
* ``penalty``: the input gradient, recorded; the penalty on it, and the penalty's gradients of all parameters. WGAN-GP
  (distance of the gradient's norm to 1) or R1 (its squared norm) by itself, as lazily regularised critics do;
* ``double``: the gradient of the gradient alone: of the recorded input gradient, with respect to input, parameters and
  cotangent, on a graph that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

MODES = ("forward", "train", "penalty", "double")


@dataclass(frozen=True)
class GanCase:
    """One model and the input that it is called with.

    Attributes:
        name: what ``--case`` matches.
        user: who runs this model.
        build: makes the stock model.
        shape: of the input, without the batch.
        batch: of the measurement on a CPU; ``real_batch`` is its users', measured with ``--full`` and on a GPU.
        modes: modes to measure.
        penalty: "wgan-gp" or "r1".
        kind: what the bars refer to.
        spectral: whether all layers are spectrally normalised.
        quick: part of ``--quick``.
    """

    name: str
    user: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    real_batch: int
    modes: tuple[str, ...] = ("forward", "train")
    penalty: str = "wgan-gp"
    kind: str = "block"
    spectral: bool = False
    quick: bool = False
    long_on_cpu: bool = False

    @property
    def size(self) -> str:
        """The input's shape in one line."""
        return "x".join(map(str, (self.batch, *self.shape)))

    def sizes(self) -> dict[str, object]:
        """What goes into the results, as plain values."""
        return {
            "size": self.size,
            "batch": self.batch,
            "kind": self.kind,
            "user": self.user,
            "penalty": self.penalty,
            "stack": self.is_stack(),
        }

    def is_stack(self) -> bool:
        """Whether convolution, batch norm and LeakyReLU follow one another."""
        with torch.device("meta"):
            kinds = [type(module) for module in self.build().modules()]
        triple = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
        return any(kinds[k : k + 3] == triple for k in range(len(kinds)))

    def traffic(self) -> tuple[float, float]:
        """(multiply-adds of the convolutions, elements of all modules' inputs and outputs) of one forward pass."""
        found = [0.0, 0.0]

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[1] += output.numel() + inputs[0].numel()
            if isinstance(module, nn.modules.conv._ConvNd):
                many = inputs[0] if module.transposed else output
                found[0] += many.numel() / many.shape[1] * module.weight.numel()

        with torch.device("meta"):
            model = self.build().eval()
            for module in model.modules():
                if not list(module.children()):
                    module.register_forward_hook(note)
            model(torch.empty(self.batch, *self.shape))
        return found[0], found[1]

    def flop(self, mode: str) -> float:
        """Floating-point operations of the convolutions of one step."""
        return 2 * self.traffic()[0] * {"forward": 1, "train": 3, "penalty": 5, "double": 3}[mode]

    def least_bytes(self, mode: str, itemsize: int) -> float:
        """Memory traffic if every module read its input and wrote its output once per pass."""
        return self.traffic()[1] * itemsize * {"forward": 1, "train": 3, "penalty": 6, "double": 3}[mode]

    @property
    def longest_sum(self) -> int:
        """Number of terms in the longest chain of sums, generously: pixels of a batch times the layers behind."""
        return 100 * self.batch * math.prod(self.shape)


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
    return [first, *_norm(norm, cout), nn.LeakyReLU(0.2) if act is None else act]


def up(cin: int, cout: int, *, norm: bool = True, act: nn.Module | None = None) -> list[nn.Module]:
    """Transposed convolution k4 s2 p1, norm, activation (ReLU by default)."""
    first = nn.ConvTranspose2d(cin, cout, 4, 2, 1, bias=not norm)
    return [first, *_norm(norm, cout), nn.ReLU() if act is None else act]


def _norm(norm: bool | str, channels: int) -> list[nn.Module]:
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


def _eight_layers() -> nn.Module:
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


def _dcgan_g(width: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(100, 8 * width, 4, bias=False),
        nn.BatchNorm2d(8 * width),
        nn.ReLU(),
        *up(8 * width, 4 * width),
        *up(4 * width, 2 * width),
        *up(2 * width, width),
        *up(width, 3, norm=False, act=nn.Tanh()),
    ]


def _critic(width: int, norm: bool | str) -> list[nn.Module]:
    return [
        *conv(3, width, 4, 2, norm=False),
        *conv(width, 2 * width, 4, 2, norm=norm),
        *conv(2 * width, 4 * width, 4, 2, norm=norm),
        *conv(4 * width, 8 * width, 4, 2, norm=norm),
        nn.Conv2d(8 * width, 1, 4),
    ]


def _r3gan(channels: int, groups: int) -> list[nn.Module]:
    wide = 2 * channels
    return [
        Residual(
            *conv(channels, wide, 1, norm=False),
            *conv(wide, wide, 3, norm=False, groups=groups),
            nn.Conv2d(wide, channels, 1),
        )
    ]


ALL = ("forward", "train", "penalty")
SINGLE = ("forward", "train", "double")
CASES: tuple[GanCase, ...] = (
    # Single operations: what the bars are about.
    GanCase(
        "bn-lrelu",
        "any block",
        lambda: seq(_norm(True, 96), [nn.LeakyReLU(0.2)]),
        (96, 64, 64),
        16,
        64,
        SINGLE,
        kind="norm",
    ),
    GanCase(
        "bn-lrelu-small",
        "any block, small",
        lambda: seq(_norm(True, 64), [nn.LeakyReLU(0.2)]),
        (64, 8, 8),
        16,
        64,
        SINGLE,
        quick=True,
        kind="norm-small",
    ),
    GanCase(
        "bn-silu",
        "any block",
        lambda: seq(_norm(True, 50), [nn.SiLU()]),
        (50, 33, 31),
        16,
        64,
        SINGLE,
        kind="norm-smooth",
    ),
    GanCase(
        "conv-3x3",
        "any critic",
        lambda: seq([nn.Conv2d(64, 64, 3, 1, 1)]),
        (64, 32, 32),
        8,
        64,
        SINGLE,
        kind="conv",
    ),
    GanCase(
        "conv-grouped",
        "any grouped critic",
        lambda: seq([nn.Conv2d(96, 96, 3, 1, 1, groups=12)]),
        (96, 32, 32),
        8,
        64,
        SINGLE,
        kind="conv",
    ),
    GanCase(
        "conv-k4s2",
        "any critic",
        lambda: seq([nn.Conv2d(50, 100, 4, 2, 1)]),
        (50, 33, 33),
        8,
        64,
        SINGLE,
        kind="conv",
    ),
    # DCGAN.
    GanCase(
        "dcgan64-d1",
        "DCGAN-64, first layer of D",
        lambda: seq(conv(3, 64, 4, 2, norm=False)),
        (3, 64, 64),
        32,
        128,
    ),
    GanCase(
        "dcgan64-d2",
        "DCGAN-64, second layer of D",
        lambda: seq(conv(64, 128, 4, 2)),
        (64, 32, 32),
        16,
        128,
        ALL,
    ),
    GanCase(
        "dcgan64-d4", "DCGAN-64, fourth layer of D", lambda: seq(conv(256, 512, 4, 2)), (256, 8, 8), 16, 128
    ),
    GanCase("dcgan64-g1", "DCGAN-64, second layer of G", lambda: seq(up(512, 256)), (512, 4, 4), 16, 128),
    GanCase(
        "dcgan64-g3",
        "DCGAN-64, fourth layer of G",
        lambda: seq(up(128, 64)),
        (128, 16, 16),
        16,
        128,
        quick=True,
    ),
    GanCase(
        "dcgan64-g4",
        "DCGAN-64, last layer of G",
        lambda: seq(up(64, 3, norm=False, act=nn.Tanh())),
        (64, 32, 32),
        16,
        128,
    ),
    GanCase("dcgan64-g", "DCGAN-64, generator", lambda: seq(_dcgan_g(64)), (100, 1, 1), 16, 128),
    GanCase("dcgan64-d", "DCGAN-64, discriminator", lambda: seq(_critic(64, True)), (3, 64, 64), 16, 128),
    GanCase("dcgan128-g4", "DCGAN-128, wide layer of G", lambda: seq(up(64, 64)), (64, 64, 64), 4, 64),
    # WGAN-GP.
    GanCase(
        "wgan-gp-bn-96",
        "critic with batch norm",
        lambda: seq(conv(3, 96, 3), conv(96, 96, 3)),
        (3, 64, 64),
        8,
        64,
        ALL,
        kind="critic-bn",
    ),
    GanCase(
        "wgan-gp-bn",
        "critic with batch norm",
        lambda: seq(_critic(32, True)),
        (3, 64, 64),
        16,
        64,
        ALL,
    ),
    GanCase("wgan-gp", "critic without norm", lambda: seq(_critic(32, False)), (3, 64, 64), 16, 64, ALL),
    GanCase(
        "r1-free",
        "critic without norm, lazy R1",
        lambda: seq(_critic(32, False)),
        (3, 64, 64),
        16,
        64,
        ("penalty",),
        "r1",
        "r1",
        quick=True,
    ),
    # SNGAN, BigGAN, StyleGAN2, R3GAN.
    GanCase(
        "sngan32-d", "SNGAN-32, block of D", lambda: SnganDown(128, 128), (128, 32, 32), 4, 64, ALL, "r1"
    ),
    GanCase(
        "biggan-96",
        "BigGAN-128, 96 channels",
        lambda: seq([nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 96, 3, 1, 1)]),
        (96, 128, 128),
        1,
        64,
    ),
    GanCase(
        "biggan-192",
        "BigGAN-128, 192 channels",
        lambda: seq([nn.BatchNorm2d(192), nn.ReLU(), nn.Conv2d(192, 192, 3, 1, 1)]),
        (192, 64, 64),
        1,
        64,
    ),
    GanCase(
        "biggan-384",
        "BigGAN-128, 384 channels",
        lambda: seq([nn.BatchNorm2d(384), nn.ReLU(), nn.Conv2d(384, 384, 3, 1, 1)]),
        (384, 32, 32),
        1,
        64,
    ),
    GanCase(
        "stylegan2-d",
        "StyleGAN2-256, first block of D",
        lambda: seq(conv(64, 64, 3, norm=False), conv(64, 128, 3, 2, norm=False)),
        (64, 256, 256),
        1,
        32,
        ALL,
        "r1",
        long_on_cpu=True,
    ),
    GanCase(
        "stylegan2-d-64",
        "StyleGAN2-256, later block of D",
        lambda: seq(conv(64, 64, 3, norm=False), conv(64, 128, 3, 2, norm=False)),
        (64, 64, 64),
        2,
        32,
        ALL,
        "r1",
    ),
    GanCase(
        "r3gan",
        "R3GAN, grouped block with R1 and R2",
        lambda: seq(_r3gan(96, 12)),
        (96, 16, 16),
        8,
        32,
        ALL,
        "r1",
    ),
    # Image to image.
    GanCase(
        "pix2pix-d",
        "pix2pix, PatchGAN",
        lambda: seq(
            conv(6, 64, 4, 2, norm=False),
            conv(64, 128, 4, 2),
            conv(128, 256, 4, 2),
            [nn.Conv2d(256, 1, 4, 1, 1)],
        ),
        (6, 128, 128),
        1,
        16,
    ),
    GanCase(
        "cyclegan",
        "CycleGAN, residual block",
        lambda: Residual(
            *conv(256, 256, 3, norm="instance", act=nn.ReLU()),
            nn.Conv2d(256, 256, 3, 1, 1, bias=False),
            nn.InstanceNorm2d(256),
        ),
        (256, 64, 64),
        1,
        4,
        long_on_cpu=True,
    ),
    GanCase(
        "cyclegan-32",
        "CycleGAN, residual block, small",
        lambda: Residual(
            *conv(128, 128, 3, norm="instance", act=nn.ReLU()),
            nn.Conv2d(128, 128, 3, 1, 1, bias=False),
            nn.InstanceNorm2d(128),
        ),
        (128, 32, 32),
        1,
        4,
    ),
    GanCase(
        "srgan",
        "SRGAN, residual block",
        lambda: Residual(
            *conv(64, 64, 3, act=nn.PReLU()), nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        ),
        (64, 24, 24),
        16,
        16,
    ),
    GanCase(
        "srgan-d", "SRGAN, block of D", lambda: seq(conv(64, 64, 3), conv(64, 64, 3, 2)), (64, 48, 48), 4, 16
    ),
    GanCase(
        "esrgan",
        "ESRGAN, convolution of a dense block",
        lambda: seq(conv(96, 32, 3, norm=False)),
        (96, 32, 32),
        16,
        16,
    ),
    # Spectral norm.
    GanCase(
        "spectral-8",
        "spectral norm of an 8-layer D, by itself",
        lambda: Weights(_eight_layers()),
        (1,),
        1,
        1,
        ("train",),
        "r1",
        "spectral",
        spectral=True,
    ),
    GanCase(
        "spectral-8-network",
        "an 8-layer D with spectral norm",
        _eight_layers,
        (3, 32, 32),
        1,
        64,
        ("train",),
        "r1",
        spectral=True,
    ),
)


def real(case: GanCase) -> GanCase:
    """The case with its users' batch."""
    return replace(case, batch=case.real_batch)
