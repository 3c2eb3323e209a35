"""Operator ``conv2d_stats``: a convolution that also returns the batch statistics of its result.

    y = conv2d(x, weight, bias, stride, padding);   mean, var (O,): of y over batch and pixels, biased

All three outputs are differentiable: see `_conv_stats`. Saved: x, weight, y, mean.
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
    x: Tensor, weight: Tensor, bias: Tensor | None, stride_y: int, stride_x: int, pad_y: int, pad_x: int
) -> tuple[int, ...]:
    """The shape of y; raises ValueError or TypeError when the arguments do not fit together."""
    if weight.dim() != 4:
        raise ValueError(f"conv2d_stats: expected weight of shape (O, C, KH, KW), got {tuple(weight.shape)}")
    _conv_stats.check_tensors("conv2d_stats", x, weight, bias, weight.shape[1], weight.shape[0])
    stride, padding = (stride_y, stride_x), (pad_y, pad_x)
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0)):
        if min(pair) < least:
            raise ValueError(f"conv2d_stats: expected {name} of at least {least}, got {pair}")
    sizes = tuple(
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    )
    if min(sizes) < 1 or x.shape[0] == 0:
        raise ValueError(f"conv2d_stats: x of shape {tuple(x.shape)} gives no values to take statistics of")
    return x.shape[0], weight.shape[0], *sizes


def _impl(*args: Any) -> Any:
    check(*args)
    return dispatch.run("conv2d_stats", args)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(check(x, weight, *args)).contiguous(memory_format=reference.memory_format_of(x))
    mean = x.new_empty(weight.shape[0], dtype=state_dtype(x.dtype))
    return y, mean, mean.new_empty(mean.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, stride_y, stride_x, pad_y, pad_x = inputs
    geometry = Geometry((stride_y, stride_x), (pad_y, pad_x), (1, 1), False, (0, 0), 1)
    _conv_stats.setup_context(ctx, x, weight, output, geometry)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    return *_conv_stats.backward(ctx, *grads), None, None, None, None


conv2d_stats: DifferentiableOp = DifferentiableOp(
    "conv2d_stats(Tensor x, Tensor weight, Tensor? bias, int stride_y, int stride_x, int pad_y, int pad_x)"
    " -> (Tensor, Tensor, Tensor)",
    impl=_impl,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=loop_vmap(lambda *args: conv2d_stats(*args)),
    autocast=_conv_stats.autocast,
)
