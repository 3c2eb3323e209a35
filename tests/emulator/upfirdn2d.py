"""The operator ``upfirdn2d`` on the emulated launcher: layout and allocation as csrc/torch does them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fuseblock.reference.upfirdn2d import memory_format_of

_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class EmulatedUpfirdn2d:
    """``upfirdn2d`` with the signature of ``torch.ops.fuseblock_cuda``; its output starts as NaN."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def upfirdn2d(
        self,
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
        n, c, h, w = x.shape
        out_h = (h * up_y + pad_y0 + pad_y1 - f.shape[0]) // down_y + 1
        out_w = (w * up_x + pad_x0 + pad_x1 - f.shape[1]) // down_x + 1
        layout = memory_format_of(x)
        x, f = x.contiguous(memory_format=layout), f.contiguous()
        y = torch.full((n, c, out_h, out_w), float("nan"), dtype=x.dtype).contiguous(memory_format=layout)
        rows = layout == torch.contiguous_format
        self._module.upfirdn2d(
            *(t.data_ptr() for t in (x, f, y)),
            *((n * c, 1) if rows else (n, c)),
            *(h, w, out_h, out_w, f.shape[1], f.shape[0]),
            *(up_x, up_y, down_x, down_y, pad_x0, pad_y0, flip_filter, gain),
            _DTYPES.index(x.dtype),
        )
        return y
