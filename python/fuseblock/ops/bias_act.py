"""Operator ``bias_act``: y = clamp(gain act(x + b), -clamp, clamp) of x (N, C, ...), differentiable to any order.

Saved is what backward needs: of a piecewise linear activation one or two bits an element (`reference.bias_act.planes`),
of a smooth one x and the bias, whose sum is recomputed. prelu saves x, too: the gradient of its slope needs min(z, 0).

Piecewise linear: `_bwd` scales dy, is linear in it and its adjoint `_bwd_bwd` scales the same way, so each is the
other's gradient and any order is fused. Others: first and second order are kernels, the third is that of the equations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._activations import check_activation, number
from .._library import DifferentiableOp, backward_is_seen, loop_vmap, plain_eager, state_dtype
from ..reference import bias_act as reference
from . import _candidates

for _op, _reference in (
    ("bias_act", reference.with_mask),
    ("bias_act_bwd", reference.bias_act_bwd_reference),
    ("bias_act_bwd_bwd", reference.bias_act_bwd_bwd_reference),
):
    # Kernels take dense tensors of one layout, the number of the activation, bias and slope in the state dtype.
    dispatch.register(
        _op,
        _candidates.compiled("cpu", _op),
        _candidates.compiled("cuda", _op),
        *_candidates.triton(_op, "triton_bias_act"),
        _candidates.reference(_reference),
    )


def check(
    x: Tensor, bias: Tensor | None, slope: Tensor | None, activation: str, gain: float, clamp: float
) -> None:
    """Raise ValueError or TypeError when the arguments of the operator do not fit together."""
    if x.dim() < 2:
        raise ValueError(f"bias_act: expected x of shape (N, C, ...), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"bias_act: expected floating point x, got {x.dtype}")
    channels = x.shape[1]
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias_act: expected bias of shape ({channels},), got {tuple(bias.shape)}")
    check_activation("bias_act", activation, slope, channels)
    for name, p in (("bias", bias), ("slope", slope)):
        if p is None:
            continue
        if p.dtype not in (x.dtype, state_dtype(x.dtype)):
            wanted = " or ".join(str(d) for d in dict.fromkeys((x.dtype, state_dtype(x.dtype))))
            raise TypeError(f"bias_act: expected {name} of dtype {wanted}, got {p.dtype}")
        if p.device != x.device:
            raise ValueError(f"bias_act: expected x and {name} on one device, got {x.device} and {p.device}")
    if not math.isfinite(gain):
        raise ValueError(f"bias_act: expected a finite gain, got {gain}")
    if not clamp >= 0:
        raise ValueError(f"bias_act: expected clamp >= 0 or None, got {clamp}")


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, ...) is dense with its channels last in memory, and not contiguous."""
    if x.dim() < 3 or x.is_contiguous():
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """x, copied unless it has the layout already."""
    if not channels_last or x.dim() < 3:
        return x.contiguous()
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _wide(p: Tensor | None, x: Tensor) -> Tensor | None:
    if p is None:
        return None
    return (p if p.dtype == x.dtype and p.dtype.itemsize > 2 else p.to(state_dtype(x.dtype))).contiguous()


def _mask_bytes(x: Tensor, activation: str, clamp: float, save: bool) -> Any:
    return reference.planes(number(activation), clamp) * ((x.numel() + 7) // 8) if save else 0


def _check_mask(mask: Tensor | None, x: Tensor, activation: str, clamp: float, is_needed: bool) -> None:
    """Raise ValueError where backward lacks what forward leaves out without ``save``."""
    wanted = _mask_bytes(x, activation, clamp, is_needed)
    if (0 if mask is None else mask.numel()) != wanted:
        raise ValueError(f"bias_act: expected a mask of {wanted} bytes; was forward called with save=False?")


def _fwd_impl(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    save: bool,
) -> Any:
    check(x, bias, slope, activation, gain, clamp)
    x = dense(x, is_channels_last(x))
    constants = (number(activation), negative_slope, gain, clamp)
    return dispatch.run("bias_act", (x, _wide(bias, x), _wide(slope, x), *constants, save))


def _fwd_fake(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check(x, bias, slope, activation, gain, clamp)
    y = torch.empty_like(dense(x, is_channels_last(x)))
    return y, x.new_empty(_mask_bytes(x, activation, clamp, save), dtype=torch.uint8)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, slope, activation, negative_slope, gain, clamp, _ = inputs
    ctx.set_materialize_grads(False)
    if not reference.keeps_x(number(activation)):
        keep_mask(ctx, x, output[1], activation, negative_slope, gain, clamp, bias)
        return
    ctx.save_for_backward(x, bias, slope, None)
    _keep_options(ctx, x, bias, activation, negative_slope, gain, clamp)


def keep_mask(
    ctx: Any,
    x: Tensor,
    mask: Tensor,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    bias: Tensor | None = None,
) -> None:
    """Keep in a node's ctx what `first_order` needs of an activation that has a mask."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None, None, None, mask)
    _keep_options(ctx, x, bias, activation, negative_slope, gain, clamp)


def _keep_options(ctx: Any, x: Tensor, bias: Tensor | None, *constants: Any) -> None:
    ctx.constants = constants
    ctx.channels_last = is_channels_last(x)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.forced = dispatch.forced()


def _fwd_backward(ctx: Any, dy: Tensor | None, _mask: None) -> Any:
    return _first_order(ctx, dy, bias_act_bwd)


def first_order(ctx: Any, dy: Tensor | None) -> Any:
    """The gradients of the operator's arguments in a node that called the kernels without the dispatcher."""
    return _first_order(ctx, dy, bias_act_bwd if backward_is_seen() else _bwd_impl)


def _first_order(ctx: Any, dy: Tensor | None, bwd: Any) -> Any:
    if dy is None:
        return (None,) * 8
    x, bias, slope, mask = ctx.saved_tensors
    need_dbias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    with dispatch.backend(ctx.forced):
        dx, dbias, dslope = bwd(dy, x, bias, slope, mask, *ctx.constants, ctx.channels_last, need_dbias)
    return (
        dx,
        dbias.to(ctx.bias_dtype) if need_dbias else None,
        None if slope is None else dslope.to(slope.dtype),
        *(None,) * 5,
    )


def _bwd_impl(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    channels_last: bool,
    need_dbias: bool,
) -> Any:
    _check_mask(mask, dy, activation, clamp, x is None)
    constants = (number(activation), negative_slope, gain, clamp)
    dy = dense(dy, channels_last)
    x = None if x is None else dense(x, channels_last)
    args = (dy, x, _wide(bias, dy), _wide(slope, dy), mask, *constants, need_dbias)
    return dispatch.run("bias_act_bwd", args)


def _bwd_fake(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    channels_last: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dense(dy, channels_last)),
        _sums(dy, need_dbias),
        _sums(dy, slope is not None),
    )


def _sums(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape[1] if wanted else 0, dtype=state_dtype(x.dtype))


def _bwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    dy, x, bias, slope, mask, *constants, channels_last, need_dbias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if x is None else dy, x, bias, slope, mask)
    ctx.shape, ctx.dtype = dy.shape, dy.dtype
    ctx.constants, ctx.channels_last, ctx.forced = constants, channels_last, dispatch.forced()


def _bwd_backward(ctx: Any, v: Tensor | None, v_bias: Tensor | None, v_slope: Tensor | None) -> Any:
    given = next((t for t in (v, v_bias, v_slope) if t is not None), None)
    if given is None:
        return (None,) * 11
    dy, x, bias, slope, mask = ctx.saved_tensors
    if v is None:
        v = given.new_zeros(ctx.shape, dtype=ctx.dtype)
    with dispatch.backend(ctx.forced):
        a_dy, a_x, a_bias, a_slope = bias_act_bwd_bwd(
            v, v_bias, v_slope, dy, x, bias, slope, mask, *ctx.constants, ctx.channels_last
        )
    if x is None:
        return (a_dy, *(None,) * 10)
    return (
        a_dy,
        a_x,
        None if bias is None else a_bias.to(bias.dtype),
        None if slope is None else a_slope.to(slope.dtype),
        *(None,) * 7,
    )


def _bwd_bwd_impl(
    v: Tensor,
    v_bias: Tensor | None,
    v_slope: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    channels_last: bool,
) -> Any:
    _check_mask(mask, v, activation, clamp, x is None)
    v = dense(v, channels_last)
    rest = [None if t is None else dense(t, channels_last) for t in (dy, x)]
    parameters = [_wide(p, v) for p in (v_bias, v_slope, bias, slope)]
    args = (v, *parameters[:2], *rest, *parameters[2:], mask)
    return dispatch.run("bias_act_bwd_bwd", (*args, number(activation), negative_slope, gain, clamp))


def _bwd_bwd_fake(
    v: Tensor,
    v_bias: Tensor | None,
    v_slope: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    full, keeps = dense(v, channels_last), x is not None
    a_x = torch.empty_like(full) if keeps else v.new_empty(0, dtype=state_dtype(v.dtype))
    return torch.empty_like(full), a_x, _sums(v, keeps), _sums(v, slope is not None)


def _bwd_bwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, activation, negative_slope, gain, clamp, channels_last = inputs
    ctx.set_materialize_grads(False)
    v, v_bias, v_slope, dy, x, bias, slope, mask = tensors
    if x is None:
        ctx.save_for_backward(mask)
    else:
        ctx.save_for_backward(v, v_bias, v_slope, dy, x, bias, slope)
    ctx.keeps_x, ctx.bias_dtype = x is not None, None if v_bias is None else v_bias.dtype
    ctx.constants = (activation, negative_slope, gain, clamp)
    ctx.channels_last, ctx.forced = channels_last, dispatch.forced()


def _bwd_bwd_backward(ctx: Any, *u: Tensor | None) -> Any:
    nothing = (None,) * 13
    if all(t is None for t in u):
        return nothing
    if ctx.keeps_x:
        activation, *others = ctx.constants
        return (*reference.third_order(u, *ctx.saved_tensors, number(activation), *others), *nothing[7:])
    if u[0] is None:
        return nothing
    need_dbias = ctx.bias_dtype is not None
    with dispatch.backend(ctx.forced):
        d_v, d_v_bias, _ = bias_act_bwd(
            u[0], None, None, None, *ctx.saved_tensors, *ctx.constants, ctx.channels_last, need_dbias
        )
    return (d_v, d_v_bias.to(ctx.bias_dtype) if need_dbias else None, *nothing[2:])


_CONSTANTS = "str activation, float negative_slope, float gain, float clamp"

bias_act: DifferentiableOp = DifferentiableOp(
    f"bias_act(Tensor x, Tensor? bias, Tensor? slope, {_CONSTANTS}, bool save) -> (Tensor, Tensor)",
    impl=_fwd_impl,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
    vmap=loop_vmap(lambda *args: bias_act(*args)),
)
bias_act_bwd: DifferentiableOp = DifferentiableOp(
    f"bias_act_bwd(Tensor dy, Tensor? x, Tensor? bias, Tensor? slope, Tensor? mask, {_CONSTANTS},"
    " bool channels_last, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    impl=_bwd_impl,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
    vmap=loop_vmap(lambda *args: bias_act_bwd(*args)),
)
bias_act_bwd_bwd: DifferentiableOp = DifferentiableOp(
    "bias_act_bwd_bwd(Tensor v, Tensor? v_bias, Tensor? v_slope, Tensor? dy, Tensor? x, Tensor? bias, Tensor? slope,"
    f" Tensor? mask, {_CONSTANTS}, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_bwd_bwd_impl,
    fake=_bwd_bwd_fake,
    setup_context=_bwd_bwd_setup,
    backward=_bwd_bwd_backward,
    vmap=loop_vmap(lambda *args: bias_act_bwd_bwd(*args)),
)


class _Node(torch.autograd.Function):
    """The operator as a plain autograd node: dispatching and registered formulas cost more than a small image."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        y, mask = _fwd_impl(*args)
        _fwd_setup(ctx, args, (y, mask))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return first_order(ctx, dy)


def differentiable(*args: Any) -> Tensor:
    """Y of the operator's arguments, ``save`` set; for calls that autograd records."""
    y: Tensor = _Node.apply(*args) if plain_eager(args[:3]) else bias_act(*args)[0]
    return y
