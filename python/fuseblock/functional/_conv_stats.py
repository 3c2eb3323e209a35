"""Convolutions that run with their neighbours in a block: a norm's pass before, statistics or an activation behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from .._library import DifferentiableOp, plain_eager, wants_gradient
from ..reference import conv_stats as reference

__all__ = ["conv2d_act", "conv2d_stats", "conv_transpose2d_act", "conv_transpose2d_subpixel"]


def _run(op: DifferentiableOp, check: Any, equations: Any, args: tuple[Any, ...]) -> Any:
    if dispatch.plain_pytorch():
        args = op.cast_for_autocast(args)
        check(*args)
        return equations(*args)
    if not torch.compiler.is_compiling() and plain_eager(args) and wants_gradient(args):
        # Backward asks the engine which gradients are wanted, which it answers for inner nodes only: views are such.
        args = tuple(torch.ops.aten.alias.default(a) if isinstance(a, Tensor) else a for a in args)
    return op(*args)


def _pair(op: str, value: int | Sequence[int], name: str) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{op}: expected {name} as one number or two, got {value}")
    if not all(isinstance(v, int) for v in values):
        raise TypeError(f"{op}: expected {name} of integers, got {value}")
    return values


def conv2d_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution of few channels, between the batch norm before it and the one behind it.

        a = act(scale[c] input + shift[c]), or input;   y = conv2d(a, weight, bias, stride, padding)
        mean[o], var[o] = mean and biased variance of y[:, o] over batch and pixels

    On a GPU a Triton kernel (3x3, 4x4, ... up to 25 taps) takes the statistics before y leaves the chip, which saves the
    pass over y that a batch norm makes for them (`batch_norm_act` takes them as ``statistics``), and normalises and
    activates the input as it loads it, which saves the pass that would write a. Meant for up to about 192 channels: beyond,
    cuDNN's products are faster than the passes cost. **Not measured on a GPU yet.** Elsewhere: PyTorch's convolution.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16; contiguous or channels-last.
        weight: (O, C, KH, KW). bias: (O,) or None. Both in the dtype of input.
        stride, padding: one number or (y, x). The padding is zeros of a.
        scale, shift: (C,), of a norm before: weight / sqrt(var + eps), and bias - mean scale. Gradients go through them.
        activation: behind scale and shift: identity, relu, leaky_relu, silu, tanh or elu. negative_slope: of leaky_relu.

    Returns:
        y (N, O, OH, OW) in the dtype and memory format of input; mean and var (O,), float32 (float64 for float64). All
        three are differentiable any number of times, with scale and shift twice. Run-to-run equal.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or there are no values to take statistics of.
        fuseblock.BackendError: the forced backend cannot run these tensors.
    """
    geometry = (*_pair("conv2d_stats", stride, "stride"), *_pair("conv2d_stats", padding, "padding"))
    args = (input, weight, bias, *geometry, scale, shift, activation, float(negative_slope))
    y, mean, var = _run(ops.conv2d_stats, ops.check_conv2d_stats, reference.conv2d_stats_reference, args)
    return y, mean, var


def conv_transpose2d_subpixel(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed convolution of kernel 4, stride 2, padding 1, between two batch norms.

        a = act(scale[c] input + shift[c]), or input;   y = conv_transpose2d(a, weight, bias, stride=2, padding=1)
        mean[o], var[o] = mean and biased variance of y[:, o] over batch and pixels

    On a GPU a Triton kernel computes it as four 2x2 convolutions, one for each parity of output row and column, with
    statistics, normalisation and activation as in `conv2d_stats`. **Not measured on a GPU yet.** Elsewhere: PyTorch's
    transposed convolution.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16; contiguous or channels-last.
        weight: (C, O, 4, 4). bias: (O,) or None. Both in the dtype of input.
        scale, shift, activation, negative_slope: as in `conv2d_stats`.

    Returns:
        y (N, O, 2H, 2W), mean and var (O,), as in `conv2d_stats`.

    Raises:
        As `conv2d_stats`.
    """
    args = (input, weight, bias, scale, shift, activation, float(negative_slope))
    y, mean, var = _run(
        ops.conv_transpose2d_subpixel,
        ops.check_conv_transpose2d_subpixel,
        reference.conv_transpose2d_subpixel_reference,
        args,
    )
    return y, mean, var


def conv2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """A convolution and its activation: act(conv2d(input, weight, bias, stride, padding, groups=groups)).

    On a GPU a Triton kernel applies bias and activation before the result leaves the chip, which saves a pass that reads
    and writes it. Meant for what is bound by memory: 3 channels of an image to 64, or back, and groups of few channels.
    **Not measured on a GPU yet.** Elsewhere: PyTorch's convolution and activation.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16; contiguous or channels-last.
        weight: (O, C / groups, KH, KW), up to 25 taps on a GPU. bias: (O,) or None. Both in the dtype of input.
        stride, padding: one number or (y, x).
        activation: identity, relu, leaky_relu or tanh, whose derivative the result tells. negative_slope: of leaky_relu,
            at least 0.

    Returns:
        (N, O, OH, OW) in the dtype and memory format of input, differentiable any number of times. Input, weight and
        result are saved.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not fit, or there is no result.
        fuseblock.BackendError: the forced backend cannot run these tensors.
    """
    geometry = (*_pair("conv2d_act", stride, "stride"), *_pair("conv2d_act", padding, "padding"))
    return _run_act((input, weight, bias, *geometry, groups, False, activation, float(negative_slope)))


def conv_transpose2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
) -> Tensor:
    """The transposed convolution of kernel 4, stride 2, padding 1 and its activation: a generator's last layer.

        act(conv_transpose2d(input, weight, bias, stride=2, padding=1))

    Args:
        input: (N, C, H, W). weight: (C, O, 4, 4). bias: (O,) or None.
        activation, negative_slope: as in `conv2d_act`.

    Returns:
        (N, O, 2H, 2W), as in `conv2d_act`.

    Raises:
        As `conv2d_act`.
    """
    return _run_act((input, weight, bias, 2, 2, 1, 1, 1, True, activation, float(negative_slope)))


def _run_act(args: tuple[Any, ...]) -> Tensor:
    y: Tensor = _run(ops.conv2d_act, ops.check_conv2d_act, reference.conv2d_act_reference, args)
    return y
