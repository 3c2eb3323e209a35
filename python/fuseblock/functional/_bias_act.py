"""Bias, activation, gain and clamp in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import dispatch, ops
from .._activations import NAMES, activate, number
from .._library import plain_eager, wants_gradient
from .._rectifier import FEW_ELEMENTS, rectify
from ..ops.bias_act import differentiable as differentiable_bias_act
from ..reference.bias_act import bias_act_reference, per_channel

__all__ = ["bias_act"]

_PLAIN_DTYPES = (torch.float32, torch.float64)
_FIXED_SLOPE = frozenset(NAMES) - {"prelu"}


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    negative_slope: float = 0.01,
    slope: Tensor | None = None,
    gain: float = 1.0,
    clamp: float | None = None,
    dim: int = 1,
) -> Tensor:
    """Add a bias, activate, scale, clamp; in one pass over memory, differentiable to any order.

        y = clamp(gain * act(x + bias), -clamp, clamp)

    For backward, ``"relu"`` and ``"leaky_relu"`` keep one bit an element (leaky_relu with a clamp two) in place of an
    activation; ``"silu"``, ``"tanh"``, ``"elu"`` and ``"prelu"`` keep x, which a convolution's output usually is anyway.
    Small float32 and float64 tensors on a CPU run on PyTorch's operations, which are faster there and keep more.
    Where the clamp changed a value the gradient is zero. Derivatives beyond the second of the activations that keep x
    run on plain PyTorch. The bias gradient is summed in the backward pass itself, in a fixed order.

    Args:
        x: (N, C, ...), float64, float32, float16 or bfloat16; contiguous and channels-last tensors are taken as they
            are, others are copied. The result has the memory format of x.
        bias: (C,) in the dtype of x, or float32 when x is 16 bit. None: no bias.
        activation: "identity", "relu", "leaky_relu", "prelu", "silu", "tanh" or "elu".
        negative_slope: factor of negative values of "leaky_relu".
        slope: (C,) or (1,), the learned factor of "prelu".
        gain: factor of the activated value.
        clamp: limit of the absolute value of the result, None for none.
        dim: the dimension of size C.

    Returns:
        y, shape and dtype of x. Autocast leaves the dtype alone.

    Raises:
        ValueError: shapes, devices, the activation, ``gain`` or ``clamp`` do not fit. TypeError: dtypes do not fit.
        IndexError: no dimension ``dim``. fuseblock.BackendError: the forced backend cannot run these tensors.

    Source: NVlabs' ``bias_act`` (StyleGAN2, Karras et al. 2020), whose default gains are not taken over: the gain is 1.
    """
    if dim == 1 and slope is None and _is_small(x, bias):
        y = _composed(x, bias, activation, negative_slope, gain, clamp)
        if y is not None:
            return y
    if dim not in (1, 1 - x.dim()) and x.dim() > 1:
        moved = bias_act(
            x.movedim(dim, 1),
            bias,
            activation=activation,
            negative_slope=negative_slope,
            slope=slope,
            gain=gain,
            clamp=clamp,
        )
        return moved.movedim(1, dim)
    limit = math.inf if clamp is None else float(clamp)
    if slope is not None and slope.shape == (1,) and x.dim() > 1:
        slope = slope.expand(x.shape[1])
    args = (x, bias, slope, activation, float(negative_slope), float(gain), limit)
    if dispatch.plain_pytorch():
        ops.check_bias_act(x, bias, slope, activation, gain, limit)
        return bias_act_reference(*args[:3], number(activation), *args[4:])
    # A wrapped tensor of a transform does not tell whether an outer one will differentiate it.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if transformed or wants_gradient((x, bias, slope)):
        return differentiable_bias_act(*args, True)
    result: Tensor = ops.bias_act(*args, False)[0]
    return result


def _is_small(x: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's own operations are faster: a Python operator's fixed cost on a CPU is that of their arithmetic.

    The learned slope and 16-bit types, which take PyTorch more operations, are left to the operator.
    """
    # Sizes come last: asking for one in a trace would compile for it.
    return (
        plain_eager((x, bias))
        and dispatch.forced() == "auto"
        and x.device.type == "cpu"
        and x.dtype in _PLAIN_DTYPES
        and x.numel() < FEW_ELEMENTS
    )


def _composed(
    x: Tensor, bias: Tensor | None, activation: str, negative_slope: float, gain: float, clamp: float | None
) -> Tensor | None:
    """The equations by PyTorch's operations; None where the arguments do not fit, which the caller will say."""
    if activation not in _FIXED_SLOPE or not math.isfinite(gain) or x.dim() < 2:
        return None
    z = x
    if bias is not None:
        if bias.shape != x.shape[1:2] or bias.dtype != x.dtype or bias.device != x.device:
            return None
        z = x + (bias if x.dim() == 2 else per_channel(bias, x))
    if activation in ("relu", "leaky_relu") and negative_slope >= 0:
        y = rectify(z, None if activation == "relu" else negative_slope, inplace=z is not x)
    else:
        y = activate(z, activation, negative_slope)
    if gain != 1:
        y = y * gain
    if clamp is None:
        return y.clone() if y is x else y
    return y.clamp(-clamp, clamp) if clamp >= 0 else None
