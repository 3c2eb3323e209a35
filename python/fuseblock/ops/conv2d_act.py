"""Operator ``conv2d_act``: a convolution, or the transposed one of kernel 4, stride 2, padding 1, and its activation.

    y = act(conv2d(x, weight, bias, stride, padding, groups)),   or act(conv_transpose2d(x, weight, bias, 2, 1))

The derivative of act is told by y: identity, relu, leaky_relu, tanh. Saved: x, weight and y, which the next layer saves too.
Backward: dz = dy act'(z), then the gradients of the convolution at dz, and db = sum dz; differentiable to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._convolution import Geometry
from .._library import DifferentiableOp, keep_arguments, loop_vmap, wanted
from ..reference import conv_stats as reference
from . import _candidates, _conv_stats

dispatch.register(
    "conv2d_act",
    *_candidates.triton("conv2d_act", "triton_conv_stats"),
    _candidates.reference(reference.conv2d_act_reference),
)

#: Activations whose derivative their result tells.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh")


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    groups: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
) -> tuple[int, ...]:
    """The shape of y; raises ValueError or TypeError when the arguments do not fit together."""
    if weight.dim() != 4:
        raise ValueError(f"conv2d_act: expected weight with 4 dimensions, got {tuple(weight.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"conv2d_act: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if activation == "leaky_relu" and negative_slope < 0:
        raise ValueError(f"conv2d_act: expected negative_slope of at least 0, got {negative_slope}")
    if transposed:
        if (stride_y, stride_x, pad_y, pad_x, groups, *weight.shape[2:]) != (2, 2, 1, 1, 1, 4, 4):
            raise ValueError(
                "conv2d_act: expected kernel 4, stride 2, padding 1 and no groups where transposed, got weight of shape "
                f"{tuple(weight.shape)}, stride {(stride_y, stride_x)}, padding {(pad_y, pad_x)}, groups {groups}"
            )
        _conv_stats.check_tensors("conv2d_act", x, weight, bias, weight.shape[0], weight.shape[1])
        return x.shape[0], weight.shape[1], 2 * x.shape[2], 2 * x.shape[3]
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"conv2d_act: expected groups that divide {weight.shape[0]} channels, got {groups}")
    _conv_stats.check_tensors("conv2d_act", x, weight, bias, groups * weight.shape[1], weight.shape[0])
    sizes = _conv_stats.output_sizes("conv2d_act", x, weight, (stride_y, stride_x), (pad_y, pad_x))
    return x.shape[0], weight.shape[0], *sizes


def _impl(*args: Any) -> Any:
    check(*args)
    return dispatch.run("conv2d_act", args)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(check(x, *args)).contiguous(memory_format=reference.memory_format_of(x))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    keep_arguments(ctx, inputs, range(3))
    x, weight, _, stride_y, stride_x, pad_y, pad_x, groups, transposed, *ctx.act = inputs
    ctx.save_for_backward(x, weight, output)
    ctx.geometry = Geometry((stride_y, stride_x), (pad_y, pad_x), (1, 1), transposed, (0, 0), groups)


def _through(dy: Tensor, y: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The gradient of z, dy act'(z), told by y = act(z)."""
    dz = dy
    # The derivative of a rectifier's derivative is none, rather than zeros that would run through the network.
    if activation == "tanh":
        dz = torch.ops.aten.tanh_backward(dy, y)
    elif activation == "relu":
        dz = torch.ops.aten.threshold_backward(dy, y.detach(), 0)
    elif activation == "leaky_relu":
        dz = torch.ops.aten.leaky_relu_backward(dy, y.detach(), negative_slope, True)
    return dz


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    x, weight, y = ctx.saved_tensors
    dz = _through(dy, y, *ctx.act)
    want_x, want_weight, want_bias = wanted(ctx)
    gradients = _conv_stats.convolution_gradients(dz, x, weight, ctx.geometry, want_x, want_weight)
    return *gradients, dz.sum((0, 2, 3)) if want_bias else None, *(None,) * 8


_loop = loop_vmap(lambda *args: (conv2d_act(*args),))


def _vmap(*args: Any) -> Any:
    (y,), (dim,) = _loop(*args)
    return y, dim


conv2d_act: DifferentiableOp = DifferentiableOp(
    "conv2d_act(Tensor x, Tensor weight, Tensor? bias, int stride_y, int stride_x, int pad_y, int pad_x, int groups,"
    " bool transposed, str activation, float negative_slope) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
    autocast=_conv_stats.autocast,
)
