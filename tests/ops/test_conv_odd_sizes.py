"""The Triton convolutions at sizes that fill no tile: values, statistics and both orders of gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseblock
from fuseblock import functional

from ..backends import _ON_GPU, Forced, available
from .bounds import error_ratio, relative_error
from .conv_stats_cases import DTYPES, LAYOUTS, check_values

pytestmark = _ON_GPU

CHANNELS, IMAGES, BATCHES = (1, 3, 5, 96, 100), ((1, 1), (5, 7), (33, 31)), (1, 3)


@pytest.fixture
def triton() -> Iterator[Forced]:
    with available("triton") as operators:
        yield operators


def kinds(channels: int, image: tuple[int, int]) -> Iterator[tuple[str, Any, Any, tuple[int, ...]]]:
    """(name, ours, stock, shape of the weight); the grouped one has two groups."""
    out = 5
    pad = 2 if image == (1, 1) else 1
    yield (
        "stats", lambda *t: functional.conv2d_stats(*t, 2, pad), lambda *t: F.conv2d(*t, 2, pad), (out, channels, 4, 4)
    )  # fmt: skip
    yield (
        "subpixel",
        functional.conv_transpose2d_subpixel,
        lambda *t: F.conv_transpose2d(*t, 2, 1),
        (channels, out, 4, 4),
    )
    # Activations follow: their result alone is compared.
    if channels % 2 == 0:
        yield (
            "groups", lambda *t: functional.conv2d_act(*t, 1, 1, 2),
            lambda *t: F.leaky_relu(F.conv2d(*t, 1, 1, 1, 2), 0.2), (6, channels // 2, 3, 3),
        )  # fmt: skip
    yield (
        "act", lambda *t: functional.conv2d_act(*t, 1, 1, activation="relu"),
        lambda *t: F.relu(F.conv2d(*t, 1, 1)), (out, channels, 3, 3),
    )  # fmt: skip


def run(forced: Forced, function: Any, *args: Tensor) -> Any:
    with fuseblock.backend(forced.name):
        y = function(*(t.to(forced.device) for t in args))
    return tuple(t.cpu() for t in y) if isinstance(y, tuple) else y.cpu()


def derivatives(function: Any, *args: Tensor) -> list[Tensor]:
    """Result, gradients, and the gradients of their squares."""
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in args]
    outputs = function(*leaves)
    y, *statistics = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = y.square().sum() + sum(s.sin().sum() for s in statistics)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [y.detach(), *(g.detach() for g in first), *second]


def check(
    forced: Forced, channels: int, image: tuple[int, int], batch: int, dtype: torch.dtype, layout: str
) -> None:
    of_stock, found = [], []
    for name, ours, stock, shape in kinds(channels, image):
        out = shape[1] if name == "subpixel" else shape[0]
        x, w, b = (
            torch.randn(s, dtype=torch.float64).to(dtype) for s in ((batch, channels, *image), shape, (out,))
        )
        x = x.contiguous(memory_format=LAYOUTS[layout])
        want = stock(x.double(), w.double(), b.double())
        of_stock.append(relative_error(stock(x, w, b), want))
        if name in ("stats", "subpixel"):
            check_values(forced, ours, stock, x, w, b)
        else:
            found.append((name, run(forced, ours, x, w, b), want, 4 * w.numel() + 16))
    for name, y, want, terms in found:
        # PyTorch's worst, as in benchmarks/parity.py: in one tensor of a few values its error may be small by luck.
        assert error_ratio(y, want, max(of_stock), terms) <= 1, name


#: Every pair of values occurs; most of the product is slow.
FEW = (
    (1, (5, 7), 3, torch.float32, "rows"),
    (3, (33, 31), 1, torch.float16, "channels_last"),
    (5, (1, 1), 3, torch.bfloat16, "channels_last"),
    (96, (5, 7), 1, torch.bfloat16, "rows"),
    (100, (1, 1), 1, torch.float64, "rows"),
    (100, (5, 7), 3, torch.float32, "channels_last"),
)


@pytest.mark.parametrize("sizes", FEW, ids=str)
def test_values(triton: Forced, sizes: Any) -> None:
    check(triton, *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", itertools.product(CHANNELS, IMAGES, BATCHES, DTYPES, LAYOUTS), ids=str)
def test_values_at_all_sizes(triton: Forced, sizes: Any) -> None:
    check(triton, *sizes)


@pytest.mark.parametrize("channels", [3, 10])
def test_both_orders_of_gradient(triton: Forced, channels: int) -> None:
    image = (5, 7)
    for name, ours, stock, shape in kinds(channels, image):
        out = shape[1] if name == "subpixel" else shape[0]
        x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, channels, *image), shape, (out,)))

        def plain(*t: Tensor, name: str = name, stock: Any = stock) -> Any:
            y = stock(*t)
            if name not in ("stats", "subpixel"):
                return y
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            return y, mean, var

        got = derivatives(lambda *t, ours=ours: run(triton, ours, *t), x, w, b)
        for a, e in zip(got, derivatives(plain, x, w, b), strict=True):
            assert relative_error(a, e) < 1e-11, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_input(triton: Forced, layout: str) -> None:
    """An infinity and a NaN reach the results that they reach in PyTorch's, and no others."""
    for channels in (3, 20):
        for name, ours, stock, shape in kinds(channels, (5, 7)):
            out = shape[1] if name == "subpixel" else shape[0]
            x, w, b = (torch.randn(s) for s in ((2, channels, 5, 7), shape, (out,)))
            x[0, 0, 0, 0], x[1, -1, 4, 6], x[1, 0, 2, 2] = torch.inf, -torch.inf, torch.nan
            want = stock(x, w, b)
            y = run(triton, ours, x.contiguous(memory_format=LAYOUTS[layout]), w, b)
            y, *statistics = y if isinstance(y, tuple) else (y,)
            assert torch.equal(y.isnan(), want.isnan()), name
            assert torch.equal(y.isinf(), want.isinf()), name
            assert relative_error(y[y.isfinite()], want[want.isfinite()].double()) < 1e-5
            assert all(s.isnan().all() for s in statistics)
