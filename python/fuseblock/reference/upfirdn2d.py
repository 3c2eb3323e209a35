"""Upsample, pad, filter and downsample images in plain PyTorch: the oracle for the kernels, differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import state_dtype


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format of x (N, C, H, W) that its result keeps: channels-last if it is dense in that order alone."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def upfirdn2d_reference(
    x: Tensor,
    f: Tensor,
    up_x: int,
    up_y: int,
    down_x: int,
    down_y: int,
    pad_x0: int,
    pad_x1: int,
    pad_y0: int,
    pad_y1: int,
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """Zero insertion, padding (cropping where negative), FIR filter, every down-th sample; see `functional.upfirdn2d`.

    Args:
        x: (N, C, H, W). f: (fh, fw). Further arguments as in the operator.

    Returns:
        (N, C, (H up_y + pad_y0 + pad_y1 - fh) // down_y + 1, the same in x), in the memory format of x.
    """
    n, c, h, w = x.shape
    dtype = state_dtype(x.dtype)
    taps = f.to(dtype) if flip_filter else f.to(dtype).flip((0, 1))
    planes = F.pad(x.to(dtype).reshape(n * c, 1, h, 1, w, 1), (0, up_x - 1, 0, 0, 0, up_y - 1))
    pads = (pad_x0, pad_x1, pad_y0, pad_y1)
    planes = F.pad(planes.reshape(n * c, 1, h * up_y, w * up_x), [max(p, 0) for p in pads])
    x0, x1, y0, y1 = (max(-p, 0) for p in pads)
    planes = planes[:, :, y0 : planes.shape[2] - y1, x0 : planes.shape[3] - x1]
    y = F.conv2d(planes, (taps * gain)[None, None], stride=(down_y, down_x))
    y = y.reshape(n, c, *y.shape[2:]).to(x.dtype)
    return y.contiguous(memory_format=memory_format_of(x))
