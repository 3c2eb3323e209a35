"""Convolutions with their neighbours in a block, in plain PyTorch; differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activations import activate
from .._library import state_dtype
from .batch_norm_act import batch_norm_act_bwd_reference
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


def norm_act_conv_bwd_reference(
    x: Tensor,
    conv_weight: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    groups: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) as in ``ops/norm_act_conv_bwd.py``; what there is not is empty."""
    geometry = (stride_y, stride_x), (pad_y, pad_x), (1, 1), transposed, (0, 0), groups
    da, *_ = torch.ops.aten.convolution_backward(dy, x, conv_weight, None, *geometry, (True, False, False))
    constants = mean, invstd, mean.new_zeros(()), None, activation, negative_slope, False, "", 0.0
    of_norm = da.to(mean.dtype), x.to(mean.dtype), weight, bias, None, None, *constants
    # As if the statistics were constants, and then through them.
    dx, dweight, dbias, _, g = batch_norm_act_bwd_reference(*of_norm, True, True, True)
    xhat = (x - mean[:, None, None]) * invstd[:, None, None]
    of_mean, of_var = (t.mean((0, 2, 3)) for t in (g, g * xhat))
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    dx = dx - scale[:, None, None] * (of_mean[:, None, None] + xhat * of_var[:, None, None])
    return dx.to(x.dtype).contiguous(memory_format=memory_format_of(x)), dweight, dbias
