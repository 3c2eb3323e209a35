"""The registry of GAN cases: convolution blocks and networks that real users train, as plain `torch.nn` models.

Stock runs the model as it stands; fuseblock runs the same model after `fuseblock.fuse`, which is what a user would do.
Modes:

* ``forward``: ``torch.no_grad`` and ``eval``;
* ``train``: forward and the gradients of all parameters and of the input;
* ``penalty``: the input gradient, recorded; the penalty on it, and the penalty's gradients of all parameters. WGAN-GP
  (distance of the gradient's norm to 1) or R1 (its squared norm) by itself, as lazily regularised critics do;
* ``double``: the gradient of the gradient alone: of the recorded input gradient, with respect to input, parameters and
  cotangent, on a graph that is kept;
* ``step``: what the case itself says: a whole training step, an update of averages (`benchmarks.gan_steps`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.gan_models import (
    Residual,
    SnganDown,
    Weights,
    conv,
    critic,
    cyclegan,
    dcgan_g,
    eight_layers,
    norms,
    r3gan,
    seq,
    up,
)
from benchmarks.gan_steps import BiasLeaky, Blur, Pair, Step, average_step, training_step

MODES = ("forward", "train", "penalty", "double", "step")
#: Passes of a mode in units of the forward pass, of arithmetic and of traffic. A training step of a generator and a
#: discriminator runs the one three times, the other nine.
_PASSES = {"forward": 1, "train": 3, "penalty": 5, "double": 3, "step": 6}
_TRAFFIC = {"forward": 1, "train": 3, "penalty": 6, "double": 3, "step": 6}


@dataclass(frozen=True)
class GanCase:
    """One model and the input that it is called with.

    Attributes:
        name: what ``--case`` matches.
        user: who runs this model.
        build: makes the stock model.
        shape: of the input, without the batch.
        batch: of the measurement on a CPU; ``real_batch`` is its users', see `real`, measured with ``--full`` and on a GPU.
        modes: modes to measure.
        penalty: "wgan-gp" or "r1".
        kind: what the bars refer to.
        spectral: whether all layers are spectrally normalised.
        quick: part of ``--quick``.
        long_on_cpu: runs on a CPU with ``--full`` only.
        step: makes the step of mode "step" from model, input and whether it is fuseblock's.
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
    step: Callable[[nn.Module, Tensor, bool], Step] | None = None

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
            "elements": self.elements,
            "channels": self.channels(),
        }

    @property
    def elements(self) -> int:
        """Of the input."""
        return self.batch * math.prod(self.shape)

    def channels(self) -> int:
        """The most that a convolution of the model takes or gives; 0 without convolutions."""
        with torch.device("meta"):
            found = [m for m in self.build().modules() if isinstance(m, nn.modules.conv._ConvNd)]
        return max((max(m.in_channels, m.out_channels) for m in found), default=0)

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
        return 0.0 if self.kind == "average" else 2 * self.traffic()[0] * _PASSES[mode]

    def least_bytes(self, mode: str, itemsize: int) -> float:
        """Memory traffic if every module read its input and wrote its output once per pass."""
        return self.traffic()[1] * itemsize * _TRAFFIC[mode]

    @property
    def longest_sum(self) -> int:
        """Number of terms in the longest chain of sums, generously: pixels of a batch times the layers behind."""
        return 100 * self.elements


ALL = ("forward", "train", "penalty")
SINGLE = ("forward", "train", "double")
CASES: tuple[GanCase, ...] = (
    # Single operations: what the bars are about.
    GanCase(
        "bn-lrelu",
        "any block",
        lambda: seq(norms(True, 96), [nn.LeakyReLU(0.2)]),
        (96, 64, 64),
        16,
        64,
        SINGLE,
        kind="norm",
    ),
    GanCase(
        "bn-lrelu-small",
        "any block, small",
        lambda: seq(norms(True, 64), [nn.LeakyReLU(0.2)]),
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
        lambda: seq(norms(True, 50), [nn.SiLU()]),
        (50, 33, 31),
        16,
        64,
        SINGLE,
        kind="norm-smooth",
    ),
    GanCase(
        "bn-lrelu-128",
        "DCGAN-128, last hidden layer of G",
        lambda: seq(norms(True, 64), [nn.LeakyReLU(0.2)]),
        (64, 128, 128),
        16,
        64,
        kind="norm-large",
        long_on_cpu=True,
    ),
    GanCase(
        "bias-lrelu",
        "StyleGAN2-256, first layer of D",
        lambda: BiasLeaky(64),
        (64, 256, 256),
        1,
        32,
        quick=True,
        kind="pointwise",
    ),
    GanCase(
        "blur-up",
        "StyleGAN2, G's resampling",
        lambda: Blur(64, 2, 1),
        (64, 64, 64),
        4,
        32,
        quick=True,
        kind="filter",
    ),
    GanCase(
        "blur-down",
        "StyleGAN2, D's resampling",
        lambda: Blur(64, 1, 2),
        (64, 128, 128),
        4,
        32,
        quick=True,
        kind="filter",
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
    GanCase("dcgan64-g", "DCGAN-64, generator", lambda: seq(dcgan_g(64)), (100, 1, 1), 16, 128),
    GanCase("dcgan64-d", "DCGAN-64, discriminator", lambda: seq(critic(64, True)), (3, 64, 64), 16, 128),
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
        lambda: seq(critic(32, True)),
        (3, 64, 64),
        16,
        64,
        ALL,
    ),
    GanCase("wgan-gp", "critic without norm", lambda: seq(critic(32, False)), (3, 64, 64), 16, 64, ALL),
    GanCase(
        "r1-free",
        "critic without norm, lazy R1",
        lambda: seq(critic(32, False)),
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
        lambda: seq(r3gan(96, 12)),
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
        lambda: cyclegan(256),
        (256, 64, 64),
        1,
        4,
        long_on_cpu=True,
    ),
    GanCase(
        "cyclegan-32",
        "CycleGAN, residual block, small",
        lambda: cyclegan(128),
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
    # Whole steps.
    GanCase(
        "dcgan64-step",
        "DCGAN-64, a training step of D and of G",
        lambda: Pair(64),
        (3, 64, 64),
        8,
        128,
        ("step",),
        kind="step",
        quick=True,
        step=training_step,
    ),
    GanCase(
        "dcgan64-ema",
        "DCGAN-64, averages of the weights",
        lambda: Pair(64),
        (3, 64, 64),
        1,
        1,
        ("step",),
        kind="average",
        quick=True,
        step=average_step,
    ),
    # Spectral norm.
    GanCase(
        "spectral-8",
        "spectral norm of an 8-layer D, by itself",
        lambda: Weights(eight_layers()),
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
        eight_layers,
        (3, 32, 32),
        1,
        64,
        ("train",),
        "r1",
        spectral=True,
    ),
)


def real(case: GanCase, device: str) -> GanCase:
    """The case with its users' batch; what takes minutes or gigabytes of a CPU then stays as it is there."""
    stays = device == "cpu" and case.kind in ("step", "pointwise", "filter", "norm-large")
    return case if stays else replace(case, batch=case.real_batch)
