"""Convolutions with their neighbours in a block, in plain PyTorch; differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activations import activate
from .._library import state_dtype
from .upfirdn2d import memory_format_of as memory_format_of


def _normalised(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    """act(scale x + shift) in the dtype of x; x where there is no scale."""
    if scale is None or shift is None:
        return x
    z = x.to(state_dtype(x.dtype)) * scale[:, None, None] + shift[:, None, None]
    return activate(z, activation, negative_slope).to(x.dtype)


def _with_stats(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = y.contiguous(memory_format=memory_format_of(x))
    var, mean = torch.var_mean(y.to(state_dtype(y.dtype)), (0, 2, 3), correction=0)
    return y, mean, var


def conv2d_stats_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution y (N, O, OH, OW) of act(scale x + shift) (N, C, H, W) with weight (O, C, KH, KW); mean, variance of y."""
    a = _normalised(x, scale, shift, activation, negative_slope)
    return _with_stats(F.conv2d(a, weight, bias, (stride_y, stride_x), (pad_y, pad_x)), x)


def conv_transpose2d_subpixel_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed convolution y (N, O, 2H, 2W) of act(scale x + shift), weight (C, O, 4, 4), k4 s2 p1; mean, variance."""
    a = _normalised(x, scale, shift, activation, negative_slope)
    return _with_stats(F.conv_transpose2d(a, weight, bias, 2, 1), x)


def conv2d_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    groups: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The activation of the convolution, or transposed convolution, of x; arguments as in ``ops/conv2d_act.py``."""
    z = torch.convolution(
        x, weight, bias, (stride_y, stride_x), (pad_y, pad_x), (1, 1), transposed, (0, 0), groups
    )
    return activate(z, activation, negative_slope).contiguous(memory_format=memory_format_of(x))
