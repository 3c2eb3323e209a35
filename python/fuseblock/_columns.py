"""A convolution and a weight gradient of the same images as two matrix products on a CPU.

Both terms of a convolution's second derivative that a gradient penalty asks for multiply the columns of the same image, for
each sample W columns(v) and dy columns(v)^T (`csrc/torch/conv2d_columns_cpu.cpp`). oneDNN works in blocks of sixteen
channels, and in those a convolution from 50 to 100 channels multiplies by zero three times of ten; a matrix product does
not. With full blocks oneDNN is faster, and columns need not be written.

Columns are made of some rows of output at a time, and stay in the second cache between the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ext
from ._library import plain_eager, wants_gradient

if TYPE_CHECKING:
    from ._convolution import Geometry

_PRESENT = _ext.has("fuseblock_cpu", "conv2d_columns")
_CONV2D_COLUMNS = torch.ops.fuseblock_cpu.conv2d_columns.default if _PRESENT else None
#: Channels of a block of oneDNN's convolutions with AVX-512, where this has been measured, and those of images, for which it
#: has other kernels.
_BLOCK, _IMAGE = 16, 3
#: Writing an element of the columns takes as long as the multiply-adds of so many outputs with it; what else columns have
#: to win.
_WRITE, _MARGIN = 12, 1.1
#: Floating-point operations and pixels of an image's result from on which calls cost little beside products.
_FLOP, _PIXELS = 4_000_000, 64
#: Bytes of columns made at a time: in fewer, products are too short; more would leave the caches.
_TILE_BYTES = 2 << 20
_MEASURED = (
    _PRESENT and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def fits(dy: Tensor, v: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether `convolution_and_weight_gradient` can run and is the faster way."""
    if not _MEASURED or geometry.transposed or geometry.groups != 1 or dy.dim() != 4:
        return False
    if any(not t.is_cpu or t.dtype is not torch.float32 or not t.is_contiguous() for t in (dy, v, w)):
        return False
    outputs, inputs = w.shape[:2]
    blocks = -(-inputs // _BLOCK) * -(-outputs // _BLOCK)
    pixels = dy.shape[2] * dy.shape[3]
    return (
        inputs > _IMAGE
        and _MARGIN * inputs * (outputs + _WRITE) <= blocks * _BLOCK**2
        and dy.shape[0] > 0
        and pixels >= _PIXELS
        and 4 * w.numel() * pixels >= _FLOP
        and torch.get_float32_matmul_precision() == "highest"
        and plain_eager((dy, v, w))
        and not wants_gradient((dy, v, w))
    )


def convolution_and_weight_gradient(
    dy: Tensor, v: Tensor, w: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """(v * w, the gradient of <dy, v * w> with respect to w), where `fits`.

    dy: (N, C_out, H', W'), v: (N, C_in, H, W), w: (C_out, C_in, kh, kw); float32, contiguous. Padding is multiplied like any
    zero: with a value that is not finite it gives NaN.
    """
    assert _CONV2D_COLUMNS is not None
    y, gradient = _CONV2D_COLUMNS(dy, v, w, *geometry[:3], _TILE_BYTES)
    return y, gradient
