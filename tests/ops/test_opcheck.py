"""opcheck of every GAN operator and its derivatives: on every backend, in every dtype and layout.

What depends on the kernels: that schema and reality agree (nothing is mutated, no result aliases an argument or another
result), and that the fakes have the results' shapes, strides and dtypes. What does not (registration of autograd, tracing)
is checked in each operator's own test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseblock import backend, ops

from ..backends import NAMES, available
from .bounds import state_dtype

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UTILS = ("test_schema", "test_faketensor")
Draw = Callable[..., Tensor]
Call = tuple[str, tuple[Any, ...]]


def norm_calls(
    draw: Draw, wide: Callable[[int], Tensor], activation: str, residual: bool, affine: bool = True
) -> Iterator[Call]:
    """batch_norm_act and its derivatives, with a mask, with the residual saved, and without either."""
    x, dy, v = (draw(2, 3, 4, 3) for _ in range(3))
    r = draw(2, 3, 4, 3) if residual else None
    weight, bias = (wide(3), wide(3)) if affine else (None, None)
    slope = wide(3) if activation == "prelu" else None
    args = x, weight, bias, r, slope, None, None, 1e-5, activation, 0.2, True, "", True
    yield "batch_norm_act", args
    _, mean, _, invstd, count, mask = ops.batch_norm_act(*args)
    kept = r if mask.numel() == 0 else None
    saved = weight, bias, kept, slope, mean, invstd, count, mask if mask.numel() else None
    options = activation, 0.2, True, "", 1e-5
    yield "batch_norm_act_bwd", (dy, x, *saved, *options, True, True, residual)
    yield "batch_norm_act_bwd", (dy, x, *saved, *options, True, False, False)
    v_r = v if residual else None
    v_slope = None if slope is None else wide(3)
    v_affine = (wide(3), wide(3)) if affine else (None, None)
    yield "batch_norm_act_bwd_bwd", (v, *v_affine, v_slope, v_r, dy, x, *saved, *options)


def bias_calls(draw: Draw, wide: Callable[[int], Tensor], activation: str, clamp: float) -> Iterator[Call]:
    x, dy, v = (draw(2, 3, 4, 3) for _ in range(3))
    bias, slope = wide(3), wide(3) if activation == "prelu" else None
    constants = activation, 0.2, 1.3, clamp
    yield "bias_act", (x, bias, slope, *constants, True)
    keeps = activation in ("prelu", "silu")
    mask = ops.bias_act(x, bias, slope, *constants, True)[1]
    saved = (x, bias, slope) if keeps else (None, None, None)
    last = not x.is_contiguous()
    yield "bias_act_bwd", (dy, *saved, mask, *constants, last, True)
    second = v, wide(3), None if slope is None else wide(3), dy if keeps else None
    yield "bias_act_bwd_bwd", (*second, *saved, mask, *constants, last)


def calls(dtype: torch.dtype, last: bool) -> Iterator[Call]:
    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def wide(n: int) -> Tensor:
        return torch.randn(n, dtype=torch.float64).to(state_dtype(dtype))

    yield from norm_calls(draw, wide, "leaky_relu", True)
    yield from norm_calls(draw, wide, "silu", True)
    yield from norm_calls(draw, wide, "prelu", False)
    yield from norm_calls(draw, wide, "tanh", False)
    yield from norm_calls(draw, wide, "relu", False, affine=False)
    yield from bias_calls(draw, wide, "leaky_relu", 0.8)
    yield from bias_calls(draw, wide, "silu", math.inf)
    yield from bias_calls(draw, wide, "prelu", math.inf)
    yield "upfirdn2d", (draw(1, 3, 4, 5), wide(6).view(2, 3), 2, 1, 1, 1, 1, 1, 1, 0, False, 1.5)
    bias = torch.randn(5).to(dtype)
    prologue = wide(3), wide(3), "leaky_relu", 0.2
    yield "conv2d_stats", (draw(1, 3, 5, 4), draw(5, 3, 3, 3), bias, 2, 1, 1, 0, *prologue)
    yield "conv_transpose2d_subpixel", (draw(1, 3, 2, 3), draw(3, 5, 4, 4), bias, *prologue)
    behind = draw(5, 3, 3, 3), draw(1, 5, 5, 4), wide(3), wide(3), wide(3), wide(3).abs()
    yield "norm_act_conv_bwd", (draw(1, 3, 5, 4), *behind, 1, 1, 1, 1, 1, False, "leaky_relu", 0.2)
    yield "conv2d_act", (draw(1, 6, 5, 4), draw(5, 6, 3, 3), bias, 2, 1, 1, 0, 1, False, "tanh", 0.0)


#: Operators without kernels of a backend.
ABSENT = dict.fromkeys(
    ("cpu", "cuda"), ("conv2d_act", "conv2d_stats", "conv_transpose2d_subpixel", "norm_act_conv_bwd")
)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_operator(name: str, dtype: torch.dtype, last: bool) -> None:
    checked = set()
    with available(name) as forced, backend(name):
        if forced.device != "cpu":
            torch.set_default_device(forced.device)
        try:
            for op, args in calls(dtype, last):
                if op not in ABSENT.get(name, ()):
                    torch.library.opcheck(getattr(torch.ops.fuseblock, op).default, args, test_utils=UTILS)
                    checked.add(op)
        finally:
            torch.set_default_device(None)
    families = (
        "batch_norm_act",
        "bias_act",
        "upfirdn2d",
        "conv2d_act",
        "conv2d_stats",
        "conv_transpose2d_subpixel",
        "norm_act_conv_bwd",
    )
    assert all(any(op.startswith(f) for op in checked) for f in families if f not in ABSENT.get(name, ()))
