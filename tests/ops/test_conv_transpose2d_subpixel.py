"""Operator conv_transpose2d_subpixel on its backends: values, statistics, derivatives, layouts, transforms, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuseblock import dispatch, functional

from ..backends import Forced, available
from . import conv_stats_cases as cases
from .conv_stats_cases import DTYPES, LAYOUTS, NO_PROLOGUE, call
from .test_conv2d_stats import forced as forced
from .test_conv2d_stats import small_blocks as small_blocks

# x, output channels
CASES = {"usual": ((2, 5, 3, 6), 9), "one pixel": ((1, 20, 1, 1), 3), "one channel": ((3, 1, 5, 2), 1)}


def stock(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.conv_transpose2d(x, w, b, stride=2, padding=1)


def inputs(case: str, dtype: torch.dtype, layout: str = "rows") -> tuple[Tensor, Tensor, Tensor]:
    shape, out = CASES[case]
    x, w, b = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, (shape[1], out, 4, 4), (out,)))
    return x.contiguous(memory_format=LAYOUTS[layout]), w, b


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values(forced: Forced, case: str, layout: str) -> None:
    for dtype in DTYPES:
        x, w, b = inputs(case, dtype, layout)
        cases.check_values(forced, functional.conv_transpose2d_subpixel, stock, x, w, b)
    cases.check_values(forced, functional.conv_transpose2d_subpixel, stock, x, w)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_blocks(layout: str) -> None:
    with available("triton") as triton:
        x, w, b = torch.randn(2, 20, 3, 5), torch.randn(20, 17, 4, 4), torch.randn(17)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        cases.check_values(triton, functional.conv_transpose2d_subpixel, stock, x, w, b)
        first, second = (call(triton, functional.conv_transpose2d_subpixel, x, w, b) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_every_order(forced: Forced) -> None:
    x, w, b = torch.randn(2, 2, 2, 3), torch.randn(2, 3, 4, 4), torch.randn(3)
    cases.check_gradients(forced, functional.conv_transpose2d_subpixel, stock, x, w, b)


def test_a_norm_before_it(forced: Forced) -> None:
    x, w, b = torch.randn(2, 3, 2, 3), torch.randn(3, 2, 4, 4), torch.randn(2)
    cases.check_prologue(forced, functional.conv_transpose2d_subpixel, stock, x, w, b)


def test_behind_it_a_batch_norm(forced: Forced) -> None:
    x, w, _ = inputs("usual", torch.float64)
    cases.check_batch_norm(forced, functional.conv_transpose2d_subpixel, stock, x, w)


def test_only_the_gradients_asked_for() -> None:
    x, w, _ = inputs("usual", torch.float64)
    cases.check_masks(functional.conv_transpose2d_subpixel, x, w)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    x, w, b = (t.requires_grad_() for t in inputs("usual", torch.float64, layout))
    for bias in (b, None):
        torch.library.opcheck(
            torch.ops.fuseblock.conv_transpose2d_subpixel.default, (x, w, bias, *NO_PROLOGUE)
        )


def test_transforms() -> None:
    x, w, _ = inputs("usual", torch.float64)

    def loss(function: object, x: Tensor) -> Tensor:
        return sum(o.square().sum() for o in function(x[None], w))

    got = torch.vmap(torch.func.grad(partial(loss, functional.conv_transpose2d_subpixel)))(x)
    want = torch.vmap(torch.func.grad(partial(loss, lambda *t: cases.with_stats(stock(*t)))))(x)
    torch.testing.assert_close(got, want)


def test_it_runs_on_pytorch_where_there_is_no_gpu() -> None:
    args = (torch.randn(1, 2, 4, 4), torch.randn(2, 3, 4, 4), None, *NO_PROLOGUE)
    assert dispatch.choose("conv_transpose2d_subpixel", args).name == "reference"


def test_bad_input() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 3, 4, 4)
    for error, message, args in (
        (ValueError, r"x of shape \(N, 2, H, W\)", (x[:, :1], w)),
        (ValueError, r"weight of shape \(C, O, 4, 4\)", (x, w[..., :3])),
        (ValueError, r"bias of shape \(3,\)", (x, w, torch.ones(2))),
        (TypeError, "weight of dtype torch.float32", (x, w.double())),
        (ValueError, "no values", (x[:0], w)),
    ):
        with pytest.raises(error, match=message):
            functional.conv_transpose2d_subpixel(*args)
