"""Second derivatives of convolutions as products with columns: right, and taken where oneDNN's blocks stay empty only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuseblock import _columns, _ext, functional
from fuseblock._convolution import Geometry, _convolution_backward, convolution

from .ops.lstm_cases import error_ratio, relative_error
from .test_convolution import Case, function_of, second_order

pytestmark = pytest.mark.skipif(not _ext.has("fuseblock_cpu", "conv2d_columns"), reason=str(_ext.why_not))
measured = pytest.mark.skipif(not _columns._MEASURED, reason="columns are for AVX-512 and MKL")

#: Shapes of the images and of the filters; stride, padding, dilation.
PROBLEMS = {
    "1x1": ((2, 3, 4, 5), (7, 3, 1, 1), (1, 1), (0, 0), (1, 1)),
    "halved": ((3, 5, 13, 11), (7, 5, 4, 4), (2, 2), (1, 1), (1, 1)),
    "wide": ((5, 1, 3, 40), (2, 1, 2, 5), (1, 3), (1, 2), (1, 1)),
    "dilated": ((1, 2, 9, 10), (3, 2, 3, 2), (2, 3), (0, 4), (2, 3)),
    "padding around one pixel": ((2, 2, 1, 1), (3, 2, 3, 3), (1, 2), (3, 4), (1, 1)),
    "pixels that no output meets": ((1, 1, 7, 8), (2, 1, 1, 1), (3, 5), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("tile_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("name", PROBLEMS)
def test_products(name: str, tile_bytes: int) -> None:
    """Both results against float64, in tiles of one row of output, of some and of all."""
    image, filters, *options = PROBLEMS[name]
    geometry = Geometry(*options, transposed=False, output_padding=(0, 0), groups=1)
    v, w = torch.randn(image), torch.randn(filters)
    dy = torch.randn_like(torch.convolution(v, w, None, *geometry))

    def by_pytorch(dy: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        gradients = _convolution_backward(dy, v, w, geometry, (False, True, False))
        return convolution(v, w, None, geometry), gradients[1]

    exact = by_pytorch(dy.double(), v.double(), w.double())
    stock = by_pytorch(dy, v, w)
    found = torch.ops.fuseblock_cpu.conv2d_columns(dy, v, w, *options, tile_bytes)
    for got, peer, want in zip(found, stock, exact, strict=True):
        assert peer is not None and want is not None
        assert error_ratio(got, want, relative_error(peer, want), v.numel()) <= 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads: int) -> None:
    """Fewer images than threads, and more; what each thread sums is added in one order."""
    given = torch.get_num_threads()
    run = torch.ops.fuseblock_cpu.conv2d_columns
    try:
        for images in (1, 3, 7):
            v, w, dy = (
                torch.randn(images, 9, 12, 12),
                torch.randn(11, 9, 3, 3),
                torch.randn(images, 11, 10, 10),
            )
            options = [1, 1], [0, 0], [1, 1], 1 << 20
            torch.set_num_threads(1)
            want = run(dy, v, w, *options)
            torch.set_num_threads(threads)
            first, again = (run(dy, v, w, *options) for _ in range(2))
            for x, y, z in zip(first, again, want, strict=True):
                assert torch.equal(x, y) and relative_error(x, z.double()) < 1e-6
    finally:
        torch.set_num_threads(given)


def test_bad_input() -> None:
    x, w, dy, two = torch.zeros(1, 2, 5, 5), torch.zeros(4, 2, 3, 3), torch.zeros(1, 4, 3, 3), [1, 1]
    run, none = torch.ops.fuseblock_cpu.conv2d_columns, [0, 0]
    for wrong, message in (
        ((dy, x[0], w, two, none, two), "4 dimensions"),
        ((dy, x, w, [1], none, two), "two elements"),
        ((dy, x, w, two, none, [0, 1]), "must be positive"),
        ((dy, x, w, two, two, two), "dy must have shape"),
        ((dy, x, w[:, :1], two, none, two), "weight must have shape"),
        ((dy, x.double(), w, two, none, two), "float32"),
        ((dy, x.mT, w, two, none, two), "contiguous"),
        ((dy[:0], x[:0], w, two, none, two), "empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*wrong, 1 << 20)


def columns_made(case: Case, third: bool = False) -> int:
    """How many products with columns there are for the derivatives of dx with respect to w and dy."""
    x, w, _, dy, v_x, *_ = case.tensors(torch.float32)
    (dx,) = torch.autograd.grad(function_of(case)(x, w, None), x, dy, create_graph=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(dx, (w, dy), v_x, create_graph=third)
    return sum(event.name == "fuseblock_cpu::conv2d_columns" for event in profile.events())


SLOW_IN_BLOCKS = Case(
    "conv2d", (2, 18, 16, 15), (33, 18, 5, 4), {"stride": (1, 2), "padding": (2, 1)}, bias=False
)


@measured
def test_empty_blocks_take_columns() -> None:
    """Within the bounds of all second derivatives; not where a third is to follow."""
    case = SLOW_IN_BLOCKS
    assert columns_made(case) == 1 and columns_made(case, third=True) == 0
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
        Case("conv2d", (0, 18, 16, 15), (33, 18, 5, 4), bias=False),
        Case("conv_transpose2d", (1, 18, 32, 32), (18, 33, 3, 3), bias=False),
        Case("conv1d", (2, 33, 4096), (33, 33, 3), bias=False),
    ],
)
def test_others_do_not(other: Case) -> None:
    assert columns_made(other) == 0
