"""Bias, activation, gain and clamp.

    z = x + b        y = clamp(gain act(z), -clamp, clamp)        b (C,), broadcast over all but the channels

Source: Karras et al. 2020 (StyleGAN2), NVlabs' ``bias_act``; the gradient is zero where the clamp changed the value.

What a piecewise linear activation's backward needs of z are one or two bits an element, in memory order, eight to a byte,
the lowest bit first. With both bits, those of plane 1 follow those of plane 0.

    identity              nothing, or with a clamp plane 0 = not clamped
    relu                  plane 0 = passes (z > 0, and not clamped)
    leaky_relu            plane 0 = z > 0, and with a clamp plane 1 = not clamped
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._activations import NAMES, activate
from .._library import state_dtype
from ._adjoint import adjoint

IDENTITY, RELU, LEAKY_RELU, PRELU, SILU, TANH, ELU = range(len(NAMES))


def planes(activation: int, clamp: float) -> int:
    """Bits an element that backward needs of a piecewise linear activation; 0 for those that save x instead."""
    clamped = math.isfinite(clamp)
    return {IDENTITY: int(clamped), RELU: 1, LEAKY_RELU: 1 + clamped}.get(activation, 0)


def keeps_x(activation: int) -> bool:
    """Whether backward computes from x and the bias: smooth activations, and prelu for its slope's gradient."""
    return activation >= PRELU


def per_channel(p: Tensor, x: Tensor) -> Tensor:
    """P (C,) shaped to broadcast against x (N, C, ...)."""
    return p.view(1, -1, *(1,) * (x.dim() - 2))


def sum_to_channels(x: Tensor) -> Tensor:
    """(C,) sums of x (N, C, ...)."""
    return x.sum([d for d in range(x.dim()) if d != 1])


def in_memory_order(x: Tensor) -> Tensor:
    """The elements of a dense x, contiguous or channels-last, as one dimension."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).reshape(-1)


def like_in_memory(flat: Tensor, x: Tensor) -> Tensor:
    """The inverse of `in_memory_order`: flat in the shape and layout of x."""
    if x.is_contiguous():
        return flat.view(x.shape)
    return flat.view(x.movedim(1, -1).shape).movedim(-1, 1)


def pack_bits(flat: Tensor) -> Tensor:
    """uint8 (ceil(n / 8),) of n booleans."""
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.int32, device=flat.device)
    return (padded * weights).sum(1).to(torch.uint8)


def unpack_bits(mask: Tensor, x: Tensor, plane: int) -> Tensor:
    """Booleans in the shape and layout of x."""
    count = (x.numel() + 7) // 8
    bits = mask[plane * count : (plane + 1) * count, None] >> torch.arange(8, device=x.device)
    return like_in_memory((bits & 1).bool().reshape(-1)[: x.numel()], x)


def _pre_activation(x: Tensor, bias: Tensor | None) -> Tensor:
    z = x.to(state_dtype(x.dtype))
    return z if bias is None else z + per_channel(bias.to(z.dtype), x)


def _scaled(z: Tensor, slope: Tensor | None, activation: int, negative_slope: float, gain: float) -> Tensor:
    slope = None if slope is None else per_channel(slope.to(z.dtype), z)
    v = activate(z, NAMES[activation], negative_slope, slope)
    return v if gain == 1 else v * gain


def bias_act_reference(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Y of x (N, C, ...); bias and the slope of prelu (C,) or None, clamp infinity for none."""
    v = _scaled(_pre_activation(x, bias), slope, activation, negative_slope, gain)
    y = (v.clamp(-clamp, clamp) if math.isfinite(clamp) else v).to(x.dtype)
    return y.clone() if y is x else y


def with_mask(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y, mask), x dense."""
    constants = (activation, negative_slope, gain, clamp)
    y = bias_act_reference(x, bias, slope, *constants)
    if not save or not planes(activation, clamp):
        return y, torch.empty(0, dtype=torch.uint8, device=x.device)
    z = _pre_activation(x, bias)
    positive = ~(z <= 0) if activation == RELU else z > 0
    inside = _scaled(z, slope, activation, negative_slope, gain).abs() <= clamp
    if activation == LEAKY_RELU:
        bits = [positive, inside][: planes(activation, clamp)]
    elif activation == RELU and math.isfinite(clamp):
        bits = [positive & inside]
    else:
        bits = [positive if activation == RELU else inside]
    return y, torch.cat([pack_bits(in_memory_order(b)) for b in bits])


def through_mask(
    dy: Tensor, mask: Tensor | None, activation: int, negative_slope: float, gain: float, clamp: float
) -> Tensor:
    """Dy times the derivative that the mask tells; the gradient of a piecewise linear activation, and its own adjoint."""
    count = planes(activation, clamp)
    if count == 0 or mask is None:
        return dy * gain
    first = unpack_bits(mask, dy, 0)
    if activation == LEAKY_RELU:
        dz = torch.where(first, dy * gain, dy * (gain * negative_slope))
        return dz if count == 1 else torch.where(unpack_bits(mask, dy, 1), dz, 0)
    return torch.where(first, dy * gain, 0)


def _from_x(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dbias, dslope) in wide precision, differentiable to any order."""
    z = _pre_activation(x, bias)
    g = dy.to(z.dtype) * gain
    if math.isfinite(clamp):
        g = torch.where(_scaled(z, slope, activation, negative_slope, gain).abs() <= clamp, g, 0)
    below = torch.where(z > 0, 0, z)
    if activation == PRELU:
        assert slope is not None
        dz = torch.where(z > 0, g, per_channel(slope.to(z.dtype), z) * g)
        return dz, sum_to_channels(dz), sum_to_channels(g * below)
    if activation == SILU:
        s = torch.sigmoid(z)
        dz = g * (s * (1 + z * (1 - s)))
    elif activation == TANH:
        t = torch.tanh(z)
        dz = g * (1 - t * t)
    else:
        dz = g * torch.exp(torch.where(z < 0, z, 0))  # whose derivative at 0 is 0, as in PyTorch
    return dz, sum_to_channels(dz), dz.new_empty(0)


def bias_act_bwd_reference(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, dslope); the latter two in the state dtype, (0,) where not needed or not there."""
    wide = dy.to(state_dtype(dy.dtype))
    if x is None:
        dz = through_mask(wide, mask, activation, negative_slope, gain, clamp)
        dbias, dslope = sum_to_channels(dz), dz.new_empty(0)
    else:
        dz, dbias, dslope = _from_x(dy, x, bias, slope, activation, negative_slope, gain, clamp)
    return dz.to(dy.dtype), dbias if need_dbias else dz.new_empty(0), dslope


def bias_act_bwd_bwd_reference(
    v: Tensor,
    v_bias: Tensor | None,
    v_slope: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a_dy, a_x, a_bias, a_slope): adjoint of `bias_act_bwd_reference` at cotangents v, v_bias, v_slope.

    Of a piecewise linear activation (x is None) a_dy alone; the others are (0,), as is a_slope unless there is a slope.
    """
    wide = v.to(state_dtype(v.dtype))
    if x is None or dy is None:
        q = wide if v_bias is None else wide + per_channel(v_bias, v)
        a_dy = through_mask(q, mask, activation, negative_slope, gain, clamp).to(v.dtype)
        return a_dy, wide.new_empty(0), wide.new_empty(0), wide.new_empty(0)
    first = partial(_from_x, **_named(activation, negative_slope, gain, clamp))
    cotangents = _filled_cotangents(wide, v_bias, v_slope, slope, x)
    inputs = (dy.to(wide.dtype), x.to(wide.dtype), *_filled_parameters(bias, slope, wide, x))
    a_dy, a_x, a_bias, a_slope = adjoint(first, inputs, cotangents)
    return a_dy.to(v.dtype), a_x.to(v.dtype), a_bias, a_bias.new_empty(0) if slope is None else a_slope


def third_order(
    u: tuple[Tensor | None, ...],
    v: Tensor,
    v_bias: Tensor | None,
    v_slope: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    *constants: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of v, v_bias, v_slope, dy, x, bias and slope through `bias_act_bwd_bwd_reference`.

    Differentiable to any order.

    Args:
        u: cotangents of a_dy, a_x, a_bias, a_slope.
        constants: activation, negative_slope, gain, clamp.
    """
    given = (v, v_bias, v_slope, dy, x, bias, slope)
    wide = v.to(state_dtype(v.dtype))
    first = partial(_from_x, **_named(*constants))

    def second(*args: Tensor) -> tuple[Tensor, ...]:
        pull: Any = torch.func.vjp(first, *args[3:])[1]
        pulled: tuple[Tensor, ...] = pull(args[:3])
        return pulled

    inputs = (
        *_filled_cotangents(wide, v_bias, v_slope, slope, x),
        dy.to(wide.dtype),
        x.to(wide.dtype),
        *_filled_parameters(bias, slope, wide, x),
    )
    differentiated: Any = torch.func.vjp(second, *inputs)
    outputs, pull = differentiated
    # a_slope is (0,) without a slope, where the filled one has a gradient of zeros.
    wanted = (*u[:3], None if slope is None else u[3])
    cotangents = [
        torch.zeros_like(o) if w is None else w.to(o.dtype) for o, w in zip(outputs, wanted, strict=True)
    ]
    grads = pull(tuple(cotangents))
    return tuple(None if t is None else g.to(t.dtype) for t, g in zip(given, grads, strict=True))


def _named(activation: float, negative_slope: float, gain: float, clamp: float) -> dict[str, Any]:
    return {"activation": activation, "negative_slope": negative_slope, "gain": gain, "clamp": clamp}


def _filled_cotangents(
    v: Tensor, v_bias: Tensor | None, v_slope: Tensor | None, slope: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of the outputs of `_from_x`, zeros for those not given."""
    if v_bias is None:
        v_bias = v.new_zeros(x.shape[1])
    if v_slope is None or slope is None:
        v_slope = v.new_zeros(0 if slope is None else x.shape[1])
    return v, v_bias, v_slope


def _filled_parameters(
    bias: Tensor | None, slope: Tensor | None, wide: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """(bias, slope) in the dtype of `wide`, zeros for those not given."""
    zero = wide.new_zeros(x.shape[1])
    return zero if bias is None else bias.to(wide.dtype), zero if slope is None else slope.to(wide.dtype)
