"""Operator ``conv_transpose2d_subpixel``: the transposed convolution k4 s2 p1, with the batch statistics of its result.

    y (N, O, 2H, 2W) = conv_transpose2d(a (N, C, H, W), weight (C, O, 4, 4), bias, stride=2, padding=1)
    mean, var (O,): of y over batch and pixels, biased
    a = act(scale x + shift) where scale and shift (C,) are given, so that a norm before it needs no pass of its own; else x

All three outputs are differentiable: see `_conv_stats`. Saved: x, weight, y, mean, scale, shift.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from .._convolution import Geometry
from .._library import DifferentiableOp, loop_vmap, state_dtype
from ..reference import conv_stats as reference
from . import _candidates, _conv_stats

dispatch.register(
    "conv_transpose2d_subpixel",
    *_candidates.triton("conv_transpose2d_subpixel", "triton_conv_stats"),
    _candidates.reference(reference.conv_transpose2d_subpixel_reference),
)

GEOMETRY = Geometry((2, 2), (1, 1), (1, 1), True, (0, 0), 1)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    negative_slope: float,
) -> tuple[int, ...]:
    """The shape of y; raises ValueError or TypeError when the arguments do not fit together."""
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (4, 4):
        raise ValueError(
            f"conv_transpose2d_subpixel: expected weight of shape (C, O, 4, 4), got {tuple(weight.shape)}"
        )
    _conv_stats.check_tensors("conv_transpose2d_subpixel", x, weight, bias, weight.shape[0], weight.shape[1])
    _conv_stats.check_prologue("conv_transpose2d_subpixel", x, scale, shift, activation)
    n, _, h, w = x.shape
    if min(n, h, w) < 1:
        raise ValueError(
            f"conv_transpose2d_subpixel: x of shape {tuple(x.shape)} gives no values to take statistics of"
        )
    return n, weight.shape[1], 2 * h, 2 * w


def _impl(*args: Any) -> Any:
    check(*args)
    return dispatch.run("conv_transpose2d_subpixel", args)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(check(x, weight, *args)).contiguous(memory_format=reference.memory_format_of(x))
    mean = x.new_empty(weight.shape[1], dtype=state_dtype(x.dtype))
    return y, mean, mean.new_empty(mean.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _conv_stats.setup_context(ctx, inputs, range(5), output, GEOMETRY)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    return *_conv_stats.backward(ctx, *grads), None, None


conv_transpose2d_subpixel: DifferentiableOp = DifferentiableOp(
    "conv_transpose2d_subpixel(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, str activation,"
    " float negative_slope) -> (Tensor, Tensor, Tensor)",
    impl=_impl,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=loop_vmap(lambda *args: conv_transpose2d_subpixel(*args)),
    autocast=_conv_stats.autocast,
)
