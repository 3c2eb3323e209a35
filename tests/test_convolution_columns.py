"""Second derivatives of convolutions as products with columns: right, and taken where oneDNN's blocks stay empty only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuseblock import _columns, _ext, functional
from fuseblock._convolution import Geometry, _convolution_backward, convolution

from .ops.lstm_cases import error_ratio, relative_error
from .test_convolution import Case, function_of, second_order

pytestmark = pytest.mark.skipif(not _ext.has("fuseblock_cpu", "im2col"), reason=str(_ext.why_not))
measured = pytest.mark.skipif(not _columns._PRODUCTS, reason="columns are for AVX-512 and MKL")

#: Shape of an image, kernel, stride, padding, dilation.
IMAGES = {
    "1x1": ((3, 4, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
    "halved": ((2, 33, 31), (4, 4), (2, 2), (1, 1), (1, 1)),
    "wide": ((1, 3, 40), (2, 5), (1, 3), (1, 2), (1, 1)),
    "dilated": ((2, 9, 10), (3, 2), (2, 3), (0, 4), (2, 3)),
    "padding around one pixel": ((2, 1, 1), (3, 3), (1, 2), (3, 4), (1, 1)),
    "pixels that no output meets": ((1, 7, 8), (1, 1), (3, 5), (0, 0), (1, 1)),
}


def geometry_of(*pairs: tuple[int, int], **others: Any) -> Geometry:
    return Geometry(*pairs, **({"transposed": False, "output_padding": (0, 0), "groups": 1} | others))


@pytest.mark.parametrize("rows", [1, 2, None])
@pytest.mark.parametrize("name", IMAGES)
def test_im2col(name: str, rows: int | None) -> None:
    """`torch.nn.functional.unfold`, some rows of the output at a time."""
    shape, kernel, stride, padding, dilation = IMAGES[name]
    x = torch.randn(shape)
    width = F.conv2d(x, torch.ones(1, shape[0], *kernel), None, stride, padding, dilation).shape[-1]
    want = F.unfold(x[None], kernel, dilation, padding, stride)[0].unflatten(1, (-1, width))
    height = want.shape[1]
    step = min(rows or height, height)
    for first in range(height - step + 1):
        columns = torch.full((want.shape[0], step * width), torch.nan)
        torch.ops.fuseblock_cpu.im2col(x, columns, first, width, kernel, stride, padding, dilation)
        assert torch.equal(columns.unflatten(1, (step, width)), want[:, first : first + step])


def test_im2col_refuses() -> None:
    im2col, x, two = torch.ops.fuseblock_cpu.im2col, torch.zeros(2, 5, 5), [1, 1]
    three = [3, 3]
    for wrong, message in (
        ((x[None], torch.zeros(18, 9), 0, 3, three, two, two, two), "shape .C, H, W."),
        ((x, torch.zeros(17, 9), 0, 3, three, two, two, two), "columns must have shape"),
        ((x, torch.zeros(18, 10), 0, 3, three, two, two, two), "columns must have shape"),
        ((x, torch.zeros(18, 9), 0, 3, three, [0, 1], two, two), "must be positive"),
        ((x, torch.zeros(18, 9), 0, 3, three, two, [1], two), "two elements"),
        ((x.double(), torch.zeros(18, 9), 0, 3, three, two, two, two), "float32"),
        ((x.mT, torch.zeros(18, 9), 0, 3, three, two, two, two), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            im2col(*wrong)


@pytest.mark.parametrize("tile", [1, 5000, 1 << 20])
@pytest.mark.parametrize(
    "geometry",
    [
        geometry_of((1, 1), (1, 1), (1, 1)),
        geometry_of((2, 2), (1, 1), (1, 1)),
        geometry_of((1, 2), (0, 3), (2, 1)),
    ],
)
def test_products(geometry: Geometry, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both results against float64, in tiles of one row, of some, and of all."""
    monkeypatch.setattr(_columns, "_TILE_BYTES", tile)
    v, w = torch.randn(3, 5, 13, 11), torch.randn(7, 5, 4, 3)
    dy = torch.randn_like(torch.convolution(v, w, None, *geometry))

    def by_pytorch(dy: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return convolution(v, w, None, geometry), _convolution_backward(
            dy, v, w, geometry, (False, True, False)
        )[1]

    exact = by_pytorch(dy.double(), v.double(), w.double())
    stock = by_pytorch(dy, v, w)
    found = _columns.convolution_and_weight_gradient(dy, v, w, geometry)
    for got, peer, want in zip(found, stock, exact, strict=True):
        assert peer is not None and want is not None
        assert error_ratio(got, want, relative_error(peer, want), v.numel()) <= 1


def columns_made(case: Case, third: bool = False) -> int:
    """How many times columns are made for the derivatives of dx with respect to w and dy."""
    x, w, _, dy, v_x, *_ = case.tensors(torch.float32)
    (dx,) = torch.autograd.grad(function_of(case)(x, w, None), x, dy, create_graph=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(dx, (w, dy), v_x, create_graph=third)
    return sum(event.name == "fuseblock_cpu::im2col" for event in profile.events())


SLOW_IN_BLOCKS = Case(
    "conv2d", (2, 18, 16, 15), (33, 18, 5, 4), {"stride": (1, 2), "padding": (2, 1)}, bias=False
)


@measured
def test_empty_blocks_take_columns() -> None:
    """One image after the other, within the bounds of all second derivatives; not where a third is to follow."""
    case = SLOW_IN_BLOCKS
    assert columns_made(case) == case.x[0] and columns_made(case, third=True) == 0
    tensors = case.tensors(torch.float32)
    want = second_order(F, case, [t if t is None else t.detach().double().requires_grad_() for t in tensors])
    stock, found = (second_order(of, case, tensors) for of in (F, functional))
    stock_error = max(relative_error(s, w) for s, w in zip(stock, want, strict=True))
    for got, exact in zip(found, want, strict=True):
        assert error_ratio(got, exact, stock_error, case.longest_sum) <= 1


@measured
@pytest.mark.parametrize(
    "other",
    [
        Case("conv2d", (1, 32, 32, 32), (64, 32, 3, 3), {"padding": 1}, bias=False),  # full blocks
        Case("conv2d", (1, 3, 64, 64), (33, 3, 4, 4), {"stride": 2}, bias=False),  # images
        Case("conv2d", (1, 18, 8, 7), (17, 18, 3, 3), {"padding": 1}, bias=False),  # little
        Case("conv2d", (1, 50, 6, 6), (200, 50, 5, 5), {"padding": 2}, bias=False),  # of few pixels
        Case("conv2d", (1, 36, 32, 32), (36, 18, 3, 3), {"groups": 2}, bias=False),
        Case("conv_transpose2d", (1, 18, 32, 32), (18, 33, 3, 3), bias=False),
        Case("conv1d", (2, 33, 4096), (33, 33, 3), bias=False),
    ],
)
def test_others_do_not(other: Case) -> None:
    assert columns_made(other) == 0
