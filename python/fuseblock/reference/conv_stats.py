"""Convolutions with the batch statistics of their result, in plain PyTorch; differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import state_dtype
from .upfirdn2d import memory_format_of as memory_format_of


def _with_stats(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = y.contiguous(memory_format=memory_format_of(x))
    var, mean = torch.var_mean(y.to(state_dtype(y.dtype)), (0, 2, 3), correction=0)
    return y, mean, var


def conv2d_stats_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride_y: int, stride_x: int, pad_y: int, pad_x: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution y (N, O, OH, OW) of x (N, C, H, W) with weight (O, C, KH, KW); mean, biased variance (O,) of y."""
    return _with_stats(F.conv2d(x, weight, bias, (stride_y, stride_x), (pad_y, pad_x)), x)


def conv_transpose2d_subpixel_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed convolution y (N, O, 2H, 2W) of x with weight (C, O, 4, 4), stride 2, padding 1; mean and variance."""
    return _with_stats(F.conv_transpose2d(x, weight, bias, 2, 1), x)
