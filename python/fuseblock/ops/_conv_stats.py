"""Backward of a convolution that returns its result's batch statistics, shared by the operators of that kind.

With y = conv(x, w) + b, M values per channel, mean = sum y / M, var = sum (y - mean)^2 / M and gradients dy, dm, dv:

    dy' = dy + (dm + 2 dv (y - mean)) / M;     dx, dw = gradients of the convolution at dy';     db = sum dy'

Made of differentiable operations on the outputs y and mean, so that autograd composes every further order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _convolution, dispatch
from .._convolution import Geometry
from .._library import state_dtype


def check_tensors(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, out_channels: int
) -> None:
    """Raise ValueError or TypeError where x (N, channels, H, W), weight and bias (out_channels,) do not fit together."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{op}: expected x of shape (N, {channels}, H, W), got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise ValueError(f"{op}: expected bias of shape ({out_channels},), got {tuple(bias.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: expected x of a floating point dtype, got {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: expected {name} of dtype {x.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")


def setup_context(ctx: Any, x: Tensor, weight: Tensor, outputs: Sequence[Tensor], geometry: Geometry) -> None:
    """Save what `backward` needs."""
    ctx.set_materialize_grads(False)
    y, mean, _ = outputs
    ctx.save_for_backward(x, weight, y, mean)
    ctx.geometry = geometry
    ctx.forced = dispatch.forced()


def _wanted(ctx: Any) -> list[bool]:
    """Which of x, weight, bias the running backward wants a gradient of; all that need one if it cannot be asked."""
    try:
        return [*_convolution._wanted(ctx), False][:3]  # an absent bias has no node
    except AttributeError:  # contexts of torch.func transforms and of tracing
        return list(ctx.needs_input_grad[:3])


def _total(
    dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, y: Tensor, mean: Tensor
) -> Tensor | None:
    """The dy' of this file's equations."""
    if dmean is None and dvar is None:
        return dy
    count = y.numel() // y.shape[1]
    term: Tensor | None = None
    if dvar is not None:
        term = (y.to(state_dtype(y.dtype)) - mean[:, None, None]) * (2 * dvar / count)[:, None, None]
    if dmean is not None:
        shift = (dmean / count)[:, None, None]
        term = shift.expand_as(y) if term is None else term + shift
    assert term is not None
    return term.to(y.dtype) if dy is None else dy + term.to(y.dtype)


def backward(
    ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias)."""
    x, weight, y, mean = ctx.saved_tensors
    total = _total(dy, dmean, dvar, y, mean)
    if total is None:
        return None, None, None
    want_x, want_weight, want_bias = _wanted(ctx)
    dx = dweight = None
    if want_x or want_weight:
        mask = (want_x, want_weight, False)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            gradients = torch.ops.aten.convolution_backward(total, x, weight, None, *ctx.geometry, mask)
        else:
            gradients = _convolution._convolution_backward(total, x, weight, ctx.geometry, mask)
        dx, dweight = gradients[:2]
    return dx, dweight, total.sum((0, 2, 3)) if want_bias else None


def autocast(dtype: torch.dtype, args: Sequence[Any]) -> tuple[Any, ...]:
    """x, weight and bias in the autocast dtype, unless they are float64."""
    if args[0].dtype == torch.float64:
        return tuple(args)
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)
