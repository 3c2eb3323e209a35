"""Operator ``conv2d_stats``: a convolution that also returns the batch statistics of its result.

    y = conv2d(a, weight, bias, stride, padding);   mean, var (O,): of y over batch and pixels, biased
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
    "conv2d_stats",
    *_candidates.triton("conv2d_stats", "triton_conv_stats"),
    _candidates.reference(reference.conv2d_stats_reference),
)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    negative_slope: float,
) -> tuple[int, ...]:
    """The shape of y; raises ValueError or TypeError when the arguments do not fit together."""
    if weight.dim() != 4:
        raise ValueError(f"conv2d_stats: expected weight of shape (O, C, KH, KW), got {tuple(weight.shape)}")
    _conv_stats.check_tensors("conv2d_stats", x, weight, bias, weight.shape[1], weight.shape[0])
    _conv_stats.check_prologue("conv2d_stats", x, scale, shift, activation)
    sizes = _conv_stats.output_sizes("conv2d_stats", x, weight, (stride_y, stride_x), (pad_y, pad_x))
    return x.shape[0], weight.shape[0], *sizes


def _impl(*args: Any) -> Any:
    check(*args)
    return dispatch.run("conv2d_stats", args)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(check(x, weight, *args)).contiguous(memory_format=reference.memory_format_of(x))
    mean = x.new_empty(weight.shape[0], dtype=state_dtype(x.dtype))
    return y, mean, mean.new_empty(mean.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    stride_y, stride_x, pad_y, pad_x = inputs[3:7]
    geometry = Geometry((stride_y, stride_x), (pad_y, pad_x), (1, 1), False, (0, 0), 1)
    _conv_stats.setup_context(ctx, inputs, (0, 1, 2, 7, 8), output, geometry)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    dx, dweight, dbias, dscale, dshift = _conv_stats.backward(ctx, *grads)
    return dx, dweight, dbias, None, None, None, None, dscale, dshift, None, None


conv2d_stats: DifferentiableOp = DifferentiableOp(
    "conv2d_stats(Tensor x, Tensor weight, Tensor? bias, int stride_y, int stride_x, int pad_y, int pad_x,"
    " Tensor? scale, Tensor? shift, str activation, float negative_slope) -> (Tensor, Tensor, Tensor)",
    impl=_impl,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=loop_vmap(lambda *args: conv2d_stats(*args)),
    autocast=_conv_stats.autocast,
)
