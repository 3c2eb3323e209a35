"""ReLU and LeakyReLU as autograd nodes that keep their result, which the next layer keeps anyway, and nothing else.

PyTorch's LeakyReLU keeps its input. Its second derivative, and ReLU's, is a tensor of zeros where it could be none, and
those zeros are then multiplied through all layers before it: in a gradient penalty that is differentiated by itself
they are most of the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import plain_eager, wants_gradient

_aten = torch.ops.aten


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


def _rectified(x: Tensor, negative_slope: float | None, inplace: bool) -> Tensor:
    return F.relu(x, inplace) if negative_slope is None else F.leaky_relu(x, negative_slope, inplace)


def _through(g: Tensor, y: Tensor, negative_slope: float | None) -> Tensor:
    """G times the derivative at the result y."""
    gated: Tensor = (
        _aten.threshold_backward(g, y, 0)
        if negative_slope is None
        else _aten.leaky_relu_backward(g, y, negative_slope, True)
    )
    return gated


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float | None, inplace: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        y = _rectified(x, negative_slope, inplace)
        ctx.save_for_backward(y)
        ctx.negative_slope = negative_slope
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return _pulled(ctx, dy), None, None


class _RectifyBackward(torch.autograd.Function):
    """Linear in g; the derivative with respect to y is zero wherever there is one, and so it is none."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, negative_slope: float | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        ctx.negative_slope = negative_slope
        return _through(g, y, negative_slope)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        return _pulled(ctx, v), None, None


def _pulled(ctx: Any, g: Tensor | None) -> Tensor | None:
    if g is None:
        return None
    (y,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        pulled: Tensor = _RectifyBackward.apply(g, y, ctx.negative_slope)
        return pulled
    return _through(g, y, ctx.negative_slope)
