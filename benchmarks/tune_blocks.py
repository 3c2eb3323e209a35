"""What `benchmarks.tune` measures of convolution blocks: PyTorch's convolution with a fused norm or activation behind it
(``aten``) against one kernel of ours that does some of that too (``triton``), see `fuseblock._conv_engine`; and before that
the kernels of ours against each other. Of ``norm_act_conv``, the norm and its activation are before the convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fuseblock
from benchmarks.parity import Results
from benchmarks.tune_passes import OperatorQuestion
from benchmarks.tune_questions import PRECISIONS, Contest, Question, Rival, is_named, keyed
from fuseblock import _conv_engine, _tables
from fuseblock.nn._fused_convolution import call_at

ENGINES = ("aten", "triton")


@dataclass(frozen=True)
class BlockCase:
    """A block of a convolution, a batch norm or none, and an activation.

    Attributes:
        name: what ``--case`` matches.
        channels, out_channels, kernel, stride, padding, groups, transposed: of the convolution.
        image: height and width of the input.
        batch: samples.
        norm: whether there is a batch norm.
        activation: LeakyReLU or Tanh.
        channels_last: the layout.
    """

    name: str
    channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    image: int
    batch: int
    transposed: bool = False
    groups: int = 1
    norm: bool = True
    activation: str = "leaky_relu"
    channels_last: bool = True

    @property
    def size(self) -> str:
        """The sizes in one line."""
        kind = "T" if self.transposed else ""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        layout = "channels-last" if self.channels_last else "contiguous"
        return (
            f"{kind}{self.channels}>{self.out_channels} k{self.kernel} s{self.stride}{groups} @{self.image} "
            f"B{self.batch} {layout}"
        )

    @property
    def terms(self) -> int:
        """In the longest chain of sums: of a statistic, or of the weight's gradient, behind that of a product."""
        places = self.batch * (self.image * self.stride) ** 2
        return places + self.channels // self.groups * self.kernel**2

    @property
    def elements(self) -> int:
        """Of the larger of input and output."""
        grown = self.stride if self.transposed else 1
        return self.batch * self.image**2 * max(self.channels, self.out_channels * grown**2)

    def build(self, op: str, **factory: Any) -> nn.Sequential:
        """The block of stock modules, in the order of ``op``."""
        kind = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        sizes = self.channels, self.out_channels, self.kernel, self.stride, self.padding
        conv = kind(*sizes, groups=self.groups, bias=not self.norm, **factory)
        act = nn.LeakyReLU(0.2) if self.activation == "leaky_relu" else nn.Tanh()
        if op == "norm_act_conv":
            return nn.Sequential(nn.BatchNorm2d(self.channels, **factory), act, conv)
        norms = [nn.BatchNorm2d(self.out_channels, **factory)] if self.norm else []
        return nn.Sequential(conv, *norms, act)


@dataclass(frozen=True)
class BlockQuestion(Question):
    """A block in a dtype: ``forward`` without gradients, or ``train``, which alone ``norm_act_conv`` is about."""

    case: BlockCase  # type: ignore[assignment]

    def _block(self, device: str, seed: int) -> tuple[nn.Sequential, Tensor]:
        """(stock block, input)."""
        torch.manual_seed(seed)
        case, layout = self.case, torch.channels_last if self.case.channels_last else torch.contiguous_format
        block = case.build(self.op, device=device).to(self.dtype).to(memory_format=layout)
        shape = case.batch, case.channels, case.image, case.image
        x = torch.randn(shape, device=device).to(self.dtype).contiguous(memory_format=layout)
        return block, x.requires_grad_(self.mode == "train")

    def key(self) -> dict[str, Any]:
        """What a table is asked."""
        block, x = self._block("meta", 0)
        with self.settings(), torch.set_grad_enabled(self.mode == "train"):
            return _tables.plain_key(_conv_engine.key(_call(block, x)))

    def labels(self, device: str) -> list[str]:
        """Who would take part, in the order of the plain rule."""
        return list(_able(*self._block(device, 0)))

    def contest(self, device: str, seed: int) -> Contest:
        """The rivals on tensors of a device."""
        block, x = self._block(device, seed)
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(block)(x))
        exact = copy.deepcopy(block).double()
        # Without cuDNN the reference is independent of what is measured.
        with torch.backends.cudnn.flags(enabled=False):
            wide = x.detach().double().requires_grad_(x.requires_grad)
            reference = self._step(exact, wide, dy.double())
        stock = self._step(copy.deepcopy(block), x, dy)
        fuseblock.fuse(block, verbose=False)
        step = partial(self._step, block, x, dy)
        rivals = {name: Rival(step, partial(_conv_engine.measuring, name)) for name in _able(block, x)}
        resolution = torch.float16 if self.precision == "tf32" else self.dtype  # TF32 has float16's mantissa
        return Contest(rivals, reference, stock, resolution, self.case.terms)

    def _step(self, block: nn.Module, x: Tensor, dy: Tensor) -> Results:
        with torch.set_grad_enabled(self.mode == "train"):
            y = block(x)
        if self.mode != "train":
            return {"y": y}
        wanted = {"x": x, **dict(block.named_parameters())}
        return {
            "y": y.detach(),
            **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True)),
        }


def _able(block: nn.Sequential, x: Tensor) -> tuple[str, ...]:
    """The engines that can run it."""
    return ENGINES[: 1 if _conv_engine.why_not_triton(_call(block, x)) else 2]


@dataclass(frozen=True)
class KernelQuestion(OperatorQuestion):
    """The convolution of a block with what our kernels do along with it, by those that there are."""

    case: BlockCase  # type: ignore[assignment]

    @property
    def names(self) -> tuple[str, ...]:
        """What is compared."""
        return ("y", "mean", "var") if self.case.norm else ("y",)

    @property
    def terms(self) -> int:
        """In the longest chain of sums."""
        return self.case.terms

    def args(self, device: str, seed: int) -> tuple[Any, ...]:
        """The operator's arguments."""
        block, x = BlockQuestion("", self.case, "forward", self.precision)._block(device, seed)
        conv, case = block[0], self.case
        before = None, None, "identity", 0.0
        geometry = case.stride, case.stride, case.padding, case.padding
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if not case.norm:
            return x, weight, bias, *geometry, case.groups, case.transposed, case.activation, 0.2
        return x, weight, bias, *(() if case.transposed else geometry), *before


def _kernels(case: BlockCase, precision: str) -> KernelQuestion:
    of_norm = "conv_transpose2d_subpixel" if case.transposed else "conv2d_stats"
    return KernelQuestion(of_norm if case.norm else "conv2d_act", case, "forward", precision)


def _call(block: nn.Sequential, x: Tensor) -> _conv_engine.Call:
    """The call that a block makes of its convolution."""
    fused = copy.deepcopy(block)
    fuseblock.fuse(fused, verbose=False)
    call = call_at([*fused], x)
    assert isinstance(call, _conv_engine.Call), call
    return call


#: Blocks that users train.
CASES = (
    BlockCase("dcgan64-d1", 3, 64, 4, 2, 1, 64, 128, norm=False),
    BlockCase("dcgan64-d2", 64, 128, 4, 2, 1, 32, 128),
    BlockCase("dcgan64-d3", 128, 256, 4, 2, 1, 16, 128),
    BlockCase("dcgan64-g3", 256, 128, 4, 2, 1, 8, 128, transposed=True),
    BlockCase("dcgan64-g4", 128, 64, 4, 2, 1, 16, 128, transposed=True),
    BlockCase("dcgan64-g5", 64, 3, 4, 2, 1, 32, 128, transposed=True, norm=False, activation="tanh"),
    BlockCase("dcgan128-g5", 64, 64, 4, 2, 1, 64, 64, transposed=True),
    BlockCase("sngan32", 128, 128, 3, 1, 1, 32, 64),
    BlockCase("sndcgan-d1", 3, 64, 3, 1, 1, 32, 64, norm=False),
    BlockCase("sndcgan-d2", 64, 64, 4, 2, 1, 32, 64, norm=False),
    BlockCase("sndcgan-d4", 128, 128, 4, 2, 1, 16, 64, norm=False),
    BlockCase("biggan-96", 96, 96, 3, 1, 1, 128, 32),
    BlockCase("biggan-192", 192, 192, 3, 1, 1, 64, 64),
    BlockCase("stylegan2-256-in", 3, 64, 1, 1, 0, 256, 8, norm=False),
    BlockCase("stylegan2-64", 64, 64, 3, 1, 1, 256, 8, norm=False),
    BlockCase("pix2pix-d2", 64, 128, 4, 2, 1, 128, 16),
    BlockCase("srgan-g", 64, 64, 3, 1, 1, 24, 16),
    BlockCase("srgan-d", 64, 64, 3, 1, 1, 96, 16),
    BlockCase("esrgan-5", 192, 64, 3, 1, 1, 32, 16, norm=False),
    BlockCase("to-image", 64, 3, 3, 1, 1, 64, 32, norm=False, activation="tanh"),
    BlockCase("r3gan-32", 1536, 1536, 3, 1, 1, 32, 16, groups=96, norm=False),
    BlockCase("r3gan-8", 1536, 1536, 3, 1, 1, 8, 64, groups=96, norm=False),
)

#: Evenly spread sizes, near enough to each other for every call between them (`fuseblock._tables.REACH`).
_IMAGES, _BATCHES = (8, 32, 128), (4, 64)
#: Elements up to which these are combined.
_ELEMENTS = 1 << 26


def spread_cases() -> Iterator[BlockCase]:
    """The usual convolutions at evenly spread sizes."""
    for image in _IMAGES:
        for batch in _BATCHES:
            for c in (64, 128, 256):
                for norm in (True, False):
                    of = {"image": image, "batch": batch, "norm": norm}
                    yield BlockCase("spread-3x3", c, c, 3, 1, 1, **of)
                    yield BlockCase("spread-4x4", c // 2, c, 4, 2, 1, **of)
                    yield BlockCase("spread-transposed", c, c // 2, 4, 2, 1, transposed=True, **of)
            of = {"image": image, "batch": batch, "norm": False}
            yield BlockCase("spread-from-image", 3, 64, 4, 2, 1, **of)
            yield BlockCase("spread-to-image", 64, 3, 4, 2, 1, transposed=True, activation="tanh", **of)
            yield BlockCase("spread-groups", 512, 512, 3, 1, 1, groups=32, **of)


def questions(
    precisions: Iterable[str], patterns: list[str] | None = None
) -> list[tuple[Question, dict[str, Any]]]:
    """The questions with their keys, no key twice; arguments as in `tune_questions.questions`."""
    return keyed(_questions(precisions, patterns))


def _questions(precisions: Iterable[str], patterns: list[str] | None) -> Iterator[Question]:
    spread = [case for case in spread_cases() if case.elements <= _ELEMENTS]
    both = [replace(case, channels_last=last) for case in CASES for last in (True, False)]
    # For a convolution PyTorch's setting of matrix products says nothing.
    precisions = [p for p in precisions if p != "tf32"]
    for group in (both, spread):
        named = [case for case in group if is_named(case.name, patterns)]
        for precision in precisions:
            for case in named:
                # Only there they have a choice (`fuseblock.launch.triton_conv_stats.why_not_tall`).
                if PRECISIONS[precision][0].itemsize == 2 and case.channels_last:
                    yield _kernels(case, precision)
            for case in named:
                for mode in ("train", "forward"):
                    yield BlockQuestion("conv_norm_act" if case.norm else "conv_act", case, mode, precision)
                if case.norm:
                    yield BlockQuestion("norm_act_conv", case, "train", precision)
