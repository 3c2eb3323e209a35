"""Convolutions that return the batch statistics of their result along with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from .._library import DifferentiableOp, plain_eager, wants_gradient
from ..reference.conv_stats import conv2d_stats_reference, conv_transpose2d_subpixel_reference

__all__ = ["conv2d_stats", "conv_transpose2d_subpixel"]


def _run(
    op: DifferentiableOp, check: Any, reference: Any, args: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    if dispatch.plain_pytorch():
        args = op.cast_for_autocast(args)
        check(*args)
        y, mean, var = reference(*args)
        return y, mean, var
    if not torch.compiler.is_compiling() and plain_eager(args) and wants_gradient(args):
        # Backward asks the engine which gradients are wanted, which it answers for inner nodes only: views are such.
        args = tuple(torch.ops.aten.alias.default(a) if isinstance(a, Tensor) else a for a in args)
    y, mean, var = op(*args)
    return y, mean, var


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2:
        raise ValueError(f"conv2d_stats: expected {name} as one number or two, got {value}")
    return values


def conv2d_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution of few channels and the batch statistics of its result, for a batch norm behind it.

        y = conv2d(input, weight, bias, stride, padding)
        mean[o], var[o] = mean and biased variance of y[:, o] over batch and pixels

    On a GPU a Triton kernel (3x3, 4x4, ... up to 25 taps) takes the statistics before y leaves the chip, which saves the
    pass over y that a batch norm makes for them. Meant for up to about 192 channels: beyond, cuDNN's products are faster
    than the pass costs. **Not measured on a GPU yet**, hence never chosen by itself. Elsewhere: PyTorch's convolution.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16; contiguous or channels-last.
        weight: (O, C, KH, KW). bias: (O,) or None. Both in the dtype of input.
        stride, padding: one number or (y, x).

    Returns:
        y (N, O, OH, OW) in the dtype and memory format of input; mean and var (O,), float32 (float64 for float64). All
        three are differentiable any number of times. Run-to-run equal.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or there are no values to take statistics of.
        fuseblock.BackendError: the forced backend cannot run these tensors.
    """
    geometry = (*_pair(stride, "stride"), *_pair(padding, "padding"))
    return _run(
        ops.conv2d_stats, ops.check_conv2d_stats, conv2d_stats_reference, (input, weight, bias, *geometry)
    )


def conv_transpose2d_subpixel(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed convolution of kernel 4, stride 2, padding 1, and the batch statistics of its result.

        y = conv_transpose2d(input, weight, bias, stride=2, padding=1)
        mean[o], var[o] = mean and biased variance of y[:, o] over batch and pixels

    On a GPU a Triton kernel computes it as four 2x2 convolutions, one for each parity of output row and column, with the
    statistics taken before y leaves the chip. **Not measured on a GPU yet**, hence never chosen by itself. Elsewhere:
    PyTorch's transposed convolution.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16; contiguous or channels-last.
        weight: (C, O, 4, 4). bias: (O,) or None. Both in the dtype of input.

    Returns:
        y (N, O, 2H, 2W), mean and var (O,), as in `conv2d_stats`.

    Raises:
        As `conv2d_stats`.
    """
    return _run(
        ops.conv_transpose2d_subpixel,
        ops.check_conv_transpose2d_subpixel,
        conv_transpose2d_subpixel_reference,
        (input, weight, bias),
    )
