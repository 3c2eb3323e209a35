"""ReLU and LeakyReLU as autograd nodes whose undefined gradients stay undefined, and over a tensor that nobody else reads.

PyTorch's second derivative of a rectifier is a tensor of zeros where it could be none, and those zeros are then multiplied
through all layers before it: in a gradient penalty that is differentiated by itself they are most of the work.

Like PyTorch's, ReLU and what is asked to run in place keep their result for backward, and LeakyReLU keeps its input, so
that the same later changes in place are errors. `rectify_over` keeps one bit per element of a large tensor instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _ext
from ._activations import number
from ._library import KERNEL_DTYPES, backward_is_seen, forward_mode_active, plain_eager, wants_gradient
from .ops.bias_act import dense, first_order, is_channels_last, keep_mask

_aten = torch.ops.aten
_OVER = torch.ops.fuseblock_cpu.leaky_relu_.default if _ext.has("fuseblock_cpu", "leaky_relu_") else None
_OVER_BACKWARD = torch.ops.fuseblock_cpu.bias_act_bwd.default if _OVER is not None else None

#: Elements from which on an operator that saves a mask wins on a CPU, measured with leaky_relu and a gain in float32.
FEW_ELEMENTS = 32768


def can_rectify(x: Tensor, negative_slope: float) -> bool:
    """Whether `rectify` may run: plain eager execution, and a sign that survives the activation."""
    return negative_slope >= 0 and plain_eager((x,))


def rectify(x: Tensor, negative_slope: float | None, inplace: bool = False) -> Tensor:
    """max(x, 0) + negative_slope min(x, 0), differentiable to any order.

    Args:
        x: any shape and dtype that PyTorch's activations take.
        negative_slope: None for ReLU, else at least 0.
        inplace: write the result over x, as ``torch.nn.LeakyReLU(inplace=True)`` does.
    """
    if wants_gradient((x,)):
        y: Tensor = _Rectify.apply(x, negative_slope, inplace)
        return y
    return _rectified(x, negative_slope, inplace)


def rectify_over(x: Tensor, negative_slope: float | None, is_kept: bool) -> Tensor:
    """`rectify`, written over x where that is faster; x must be read by nobody else, and be no view.

    ``is_kept``: whoever reads the result next keeps it for backward, so that keeping it costs nothing.
    """
    if negative_slope is None or is_kept or not wants_gradient((x,)):
        return rectify(x, negative_slope, inplace=True)
    if (
        _OVER is not None
        and x.numel() >= FEW_ELEMENTS
        and x.is_cpu
        and x.dtype in KERNEL_DTYPES
        and 2 <= x.dim() <= 8
        and (x.is_contiguous() or is_channels_last(x))
    ):
        y: Tensor = _LeakyReLUOver.apply(x, negative_slope)
        return y
    return rectify(x, negative_slope)


def _rectified(x: Tensor, negative_slope: float | None, inplace: bool) -> Tensor:
    return F.relu(x, inplace) if negative_slope is None else F.leaky_relu(x, negative_slope, inplace)


def _through(g: Tensor, kept: Tensor, negative_slope: float | None, is_result: bool) -> Tensor:
    """G times the derivative, which ``kept`` (the result or the input) tells."""
    gated: Tensor = (
        _aten.threshold_backward(g, kept, 0)
        if negative_slope is None
        else _aten.leaky_relu_backward(g, kept, negative_slope, is_result)
    )
    return gated


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float | None, inplace: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        y = _rectified(x, negative_slope, inplace)
        is_result = inplace or negative_slope is None
        ctx.save_for_backward(y if is_result else x)
        ctx.options = negative_slope, is_result
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return _pulled(ctx, dy), None, None


class _RectifyBackward(torch.autograd.Function):
    """Linear in g; the derivative with respect to what is kept is zero wherever there is one, and so it is none."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, kept: Tensor, negative_slope: float | None, is_result: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        ctx.options = negative_slope, is_result
        return _through(g, kept, negative_slope, is_result)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        return _pulled(ctx, v), None, None, None


def _pulled(ctx: Any, g: Tensor | None) -> Tensor | None:
    if g is None:
        return None
    (kept,) = ctx.saved_tensors
    # Forward mode differentiates PyTorch's own operation, not a node of ours.
    if torch.is_grad_enabled() and not forward_mode_active():
        pulled: Tensor = _RectifyBackward.apply(g, kept, *ctx.options)
        return pulled
    return _through(g, kept, *ctx.options)


class _LeakyReLUOver(torch.autograd.Function):
    """LeakyReLU in place that keeps a mask: the derivatives are those of the operator bias_act."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float) -> Tensor:
        assert _OVER is not None
        ctx.mark_dirty(x)
        keep_mask(ctx, x, _OVER(x, negative_slope), "leaky_relu", negative_slope, 1.0, math.inf)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None or backward_is_seen():
            return first_order(ctx, dy)[0], None
        # The same without what looks for a backend: it is the one of the forward.
        assert _OVER_BACKWARD is not None
        activation, *options = ctx.constants
        mask = ctx.saved_tensors[3]
        dy = dense(dy, ctx.channels_last)
        return _OVER_BACKWARD(dy, None, None, None, mask, number(activation), *options, False)[0], None
