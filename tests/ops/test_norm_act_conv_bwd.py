"""Operator norm_act_conv_bwd on its backends: a convolution's input gradient through the norm and activation before it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseblock
from fuseblock import dispatch, ops
from fuseblock._activations import activate

from ..backends import Forced, available
from .bounds import Orders, check_orders, poisoned_outputs, relative_error, state_dtype
from .conv_stats_cases import DTYPES, LAYOUTS
from .test_conv2d_stats import forced as forced
from .test_conv2d_stats import small_blocks as small_blocks

EPS, SLOPE = 1e-5, 0.2


@dataclass(frozen=True)
class Case:
    """A convolution behind a batch norm; of strided ones, images have even sizes."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    groups: int = 1
    transposed: bool = False
    channels: int = 5
    out_channels: int = 7
    image: tuple[int, int] = (6, 8)
    batch: int = 2
    activation: str = "leaky_relu"
    affine: bool = True

    @property
    def geometry(self) -> tuple[Any, ...]:
        return *self.stride, *self.padding, self.groups, self.transposed

    def convolution(self, a: Tensor, w: Tensor) -> Tensor:
        strides = self.stride, self.padding, (1, 1)
        return torch.convolution(a, w, None, *strides, self.transposed, (0, 0), self.groups)

    def draw(self, seed: int = 0) -> tuple[Tensor | None, ...]:
        """x, weight of the convolution, weight and bias of the norm, dy: float64."""
        torch.manual_seed(seed)
        outer, inner = self.out_channels, self.channels // self.groups
        first = (inner, outer) if self.transposed else (outer, inner)
        x = torch.randn(self.batch, self.channels, *self.image, dtype=torch.float64)
        w = torch.randn(*first, *self.kernel, dtype=torch.float64)
        affine = torch.randn(2, self.channels, dtype=torch.float64).unbind() if self.affine else (None, None)
        return x, w, *affine, torch.randn_like(self.convolution(x, w))


SUBPIXEL = {"kernel": (4, 4), "stride": (2, 2)}
CASES = {
    "3x3": Case(activation="silu"),
    "uneven, groups": Case((3, 2), padding=(2, 0), groups=2, channels=6, out_channels=4, image=(5, 7)),
    "4x4": Case(**SUBPIXEL, activation="relu"),
    "transposed": Case(**SUBPIXEL, transposed=True, image=(3, 5), affine=False),
}


def composed(case: Case, x: Tensor, w: Tensor, weight: Any, bias: Any, dy: Tensor) -> list[Tensor]:
    """By autograd: gradients of x and, if there are such, of the norm's weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    affine = leaves[1:] or (None, None)
    n = F.batch_norm(leaves[0], None, None, *affine, training=True, eps=EPS)
    y = case.convolution(activate(n, case.activation, SLOPE), w)
    return list(torch.autograd.grad(y, leaves, dy))


def ours(forced: Forced, case: Case, layout: str, x: Tensor, w: Tensor, *others: Any) -> list[Tensor]:
    weight, bias, dy = others
    wide = x.double()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    statistics = (t.to(state_dtype(x.dtype)) for t in (mean, (var + EPS).rsqrt()))
    x = x.contiguous(memory_format=LAYOUTS[layout])
    args = x, w, dy, weight, bias, *statistics
    moved = (t if t is None else t.to(forced.device) for t in args)
    with fuseblock.backend(forced.name), poisoned_outputs():
        found = ops.norm_act_conv_bwd(*moved, *case.geometry, case.activation, SLOPE)
    assert found[0].dtype == x.dtype
    assert found[0].is_contiguous(memory_format=LAYOUTS[layout])
    assert [t.numel() for t in found[1:]] == [0 if weight is None else len(weight)] * 2
    return [t.cpu() for t in found if t.numel()]


def check_values(forced: Forced, case: Case, dtype: torch.dtype, layout: str) -> None:
    def draw(seed: int) -> Orders:
        x, w, weight, bias, dy = case.draw(seed)
        x, w, dy = (t.to(dtype) for t in (x, w, dy))
        affine = [None if t is None else t.to(state_dtype(dtype)) for t in (weight, bias)]
        want = composed(case, *(None if t is None else t.double() for t in (x, w, *affine, dy)))
        stock = composed(case, x, w, *affine, dy)
        return Orders([ours(forced, case, layout, x, w, *affine, dy)], [want], [stock])

    values = case.batch * case.channels * case.image[0] * case.image[1]
    check_orders(min(values, 100 * case.channels), dtype, 4 * values + 16, draw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values(forced: Forced, case: str, layout: str) -> None:
    # Each layout with a wide dtype and a narrow one.
    for dtype in DTYPES[::2] if layout == "rows" else DTYPES[1::2]:
        check_values(forced, CASES[case], dtype, layout)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("sizes", "layout"), [({}, "channels_last"), (SUBPIXEL, "rows")], ids=["3x3", "4x4"])
def test_many_blocks(sizes: dict[str, Any], layout: str) -> None:
    """Several programs in every direction; twice the same."""
    case = Case(**sizes, channels=19, out_channels=18, image=(6, 4), batch=1)
    x, w, weight, bias, dy = case.draw()
    with available("triton") as triton:
        first, second = (ours(triton, case, layout, x, w, weight, bias, dy) for _ in range(2))
    for a, b, want in zip(first, second, composed(case, x, w, weight, bias, dy), strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, want) < 1e-13


#: Every value occurs; most of the product is slow. Images of strided convolutions are even.
FEW = (
    (1, (5, 7), 3, torch.float32, "rows"),
    (3, (33, 31), 1, torch.float16, "channels_last"),
    (96, (1, 1), 3, torch.bfloat16, "channels_last"),
    (100, (5, 7), 1, torch.float64, "rows"),
)


def check_sizes(channels: int, image: tuple[int, int], batch: int, dtype: torch.dtype, layout: str) -> None:
    if batch * image[0] * image[1] == 1:
        batch = 3  # one value of a channel has no variance, and of two the gradient is all but zero
    even = image[0] + image[0] % 2, image[1] + image[1] % 2
    of = {"channels": channels, "batch": batch, "out_channels": 5}
    with available("triton") as triton:
        for case in (
            Case(**of, image=image),
            Case(**of, image=even, **SUBPIXEL),
            Case(**of, image=image, **SUBPIXEL, transposed=True),
        ):
            check_values(triton, case, dtype, layout)


@pytest.mark.parametrize("sizes", FEW, ids=str)
def test_sizes_that_fill_no_tile(sizes: Any) -> None:
    check_sizes(*sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [*itertools.product((1, 3, 5, 96, 100), ((1, 1), (5, 7), (33, 31)), (1, 3), DTYPES, LAYOUTS)],
    ids=str,
)
def test_all_sizes(sizes: Any) -> None:
    check_sizes(*sizes)


def test_non_finite_gradients(forced: Forced) -> None:
    """They reach the channels of their group and no others."""
    case = CASES["uneven, groups"]
    x, w, weight, bias, dy = (t.float() for t in case.draw())
    want = composed(case, x, w, weight, bias, dy)
    dy[0, 0, 2, 3], dy[1, 1, 4, 1] = torch.inf, torch.nan
    dx, *of_channels = ours(forced, case, "rows", x, w, weight, bias, dy)
    for got, expected in zip(
        (dx.movedim(1, 0), *of_channels), (want[0].movedim(1, 0), *want[1:]), strict=True
    ):
        assert not got[:3].isfinite().any()
        assert relative_error(got[3:], expected[3:].double()) < 1e-5


def test_who_runs_it() -> None:
    case = CASES["3x3"]
    x, w, weight, bias, dy = case.draw()
    args = x, w, dy, weight, bias, weight, bias, *case.geometry, "relu", 0.0
    assert dispatch.choose("norm_act_conv_bwd", args).name == "reference"
    with available("triton"), fuseblock.backend("triton"):
        assert dispatch.choose("norm_act_conv_bwd", args).name == "triton"


def test_bad_input() -> None:
    x, w, c = torch.randn(1, 2, 5, 4), torch.randn(3, 2, 4, 4), torch.ones(2)
    for message, geometry, activation in (
        ("padding of the kernel's size", (1, 1, 4, 1, 1, False), "relu"),
        ("even height and width", (2, 2, 1, 1, 1, False), "relu"),
        ("for kernel 4, stride 2", (2, 1, 1, 1, 1, False), "relu"),
        ("for kernel 4, stride 2", (1, 1, 1, 1, 1, True), "relu"),
        ("for kernel 4, stride 2", (2, 2, 1, 1, 2, False), "relu"),
        ("an activation among", (1, 1, 1, 1, 1, False), "prelu"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.norm_act_conv_bwd(x, w, x, None, None, c, c, *geometry, activation, 0.0)


def test_sums_in_float32() -> None:
    """Of 16-bit gradients: the mean of dx over a channel is zero, as accurately as values are rounded."""
    case = Case(batch=4, image=(16, 16), affine=False, activation="identity")
    x, w, *_, dy = case.draw()
    with available("triton") as triton:
        (dx,) = ours(triton, case, "channels_last", x.half(), w.half(), None, None, dy.half())
    assert relative_error(dx.double().mean((0, 2, 3)) + 1, torch.ones(5).double()) < 1e-3
