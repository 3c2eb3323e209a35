"""What the operators share that run a convolution with its neighbours in a block: checks, and the backward of those that
return their result's batch statistics.

With a = act(scale x + shift) or x, y = conv(a, w) + b, M values per channel, mean = sum y / M, var = sum (y - mean)^2 / M
and gradients dy, dm, dv:

    dy' = dy + (dm + 2 dv (y - mean)) / M;     da, dw = gradients of the convolution at dy';     db = sum dy'

The prologue is a batch norm with mean 0 and variance 1, and has its derivatives; a is computed again for dw. All of it is
made of differentiable operations, y and mean being outputs, so that autograd composes further orders (the third with a
prologue: ``fuseblock.backend("reference")``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _activations, _convolution, dispatch
from .._convolution import Geometry
from .._library import keep_arguments, state_dtype, wanted
from .batch_norm_act import batch_norm_act, batch_norm_act_bwd


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


def check_prologue(op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> None:
    """Raise ValueError or TypeError where scale, shift (C,) and activation are no prologue of x."""
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: expected scale and shift together, got one of them")
    if activation not in _activations.NAMES or activation == "prelu":
        known = ", ".join(name for name in _activations.NAMES if name != "prelu")
        raise ValueError(f"{op}: expected an activation among {known}, got {activation!r}")
    if scale is None and activation != "identity":
        raise ValueError(f"{op}: expected scale and shift where there is an activation, got {activation!r}")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[1:2]:
            raise ValueError(f"{op}: expected {name} of shape ({x.shape[1]},), got {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: expected {name} of a floating point dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")


def output_sizes(
    op: str, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(OH, OW) of a convolution; raises ValueError where stride and padding are none or there is no output."""
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op}: expected {name} of at least {least}, got {tuple(pair)}")
    out_h, out_w = (
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    )
    if min(out_h, out_w) < 1 or x.shape[0] == 0:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)} gives no values")
    return out_h, out_w


def setup_context(
    ctx: Any, inputs: Sequence[Any], positions: Sequence[int], outputs: Sequence[Tensor], geometry: Geometry
) -> None:
    """Save what `backward` needs; x, weight, bias, scale, shift are at these positions of ``inputs``, act at their end."""
    ctx.set_materialize_grads(False)
    keep_arguments(ctx, inputs, positions)
    x, weight, _, scale, shift = (inputs[n] for n in positions)
    y, mean, _ = outputs
    ctx.save_for_backward(x, weight, y, mean, scale, shift)
    ctx.before, ctx.geometry = inputs[-2:], geometry
    ctx.forced = dispatch.forced()


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


def convolution_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, want_x: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of a convolution, those that are wanted."""
    if not want_x and not want_weight:
        return None, None
    mask = (want_x, want_weight, False)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        gradients = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, mask)
    else:
        gradients = _convolution._convolution_backward(dy, x, weight, geometry, mask)
    return gradients[0], gradients[1]


def backward(
    ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dscale, dshift)."""
    x, weight, y, mean, scale, shift = ctx.saved_tensors
    total = _total(dy, dmean, dvar, y, mean)
    if total is None:
        return (None,) * 5
    want_x, want_weight, want_bias, want_scale, want_shift = wanted(ctx)
    dbias = total.sum((0, 2, 3)) if want_bias else None
    if scale is None:
        return *convolution_gradients(total, x, weight, ctx.geometry, want_x, want_weight), dbias, None, None
    affine = scale, shift, None, None
    zero = scale.new_zeros(scale.shape, dtype=state_dtype(x.dtype))
    one = zero + 1
    want_a, want_affine = want_x or want_scale or want_shift, want_scale or want_shift
    with dispatch.backend(ctx.forced):
        a = batch_norm_act(x, *affine, zero, one, 0.0, *ctx.before, False, "", False)[0] if want_weight else x
        da, dweight = convolution_gradients(total, a, weight, ctx.geometry, want_a, want_weight)
        if da is None:
            return None, dweight, dbias, None, None
        statistics = zero, one, zero.new_zeros(()), None
        dx, dscale, dshift, *_ = batch_norm_act_bwd(
            da, x, *affine, *statistics, *ctx.before, False, "", 0.0, want_x, want_affine, False
        )
    return (
        dx if want_x else None,
        dweight,
        dbias,
        dscale if want_scale else None,
        dshift if want_shift else None,
    )


def autocast(dtype: torch.dtype, args: Sequence[Any]) -> tuple[Any, ...]:
    """x, weight and bias in the autocast dtype, unless they are float64."""
    if args[0].dtype == torch.float64:
        return tuple(args)
    return *(a.to(dtype) if isinstance(a, Tensor) else a for a in args[:3]), *args[3:]
