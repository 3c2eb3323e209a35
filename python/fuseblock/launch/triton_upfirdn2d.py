"""Host side of the Triton kernels in kernels/upfirdn2d.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fuseblock.kernels.upfirdn2d import TAPS, upfirdn2d_kernel, upfirdn2d_tile_kernel

from ..dispatch import Candidate
from ..reference.upfirdn2d import memory_format_of
from . import _triton

#: Outputs of a tile in x and y, by (up, down): all phases of an upsampling, and in y a few more.
TILES = {(1, 1): (1, 4), (2, 1): (2, 2), (1, 2): (1, 2)}
WARPS = 4


def why_not(*args: Any) -> str | None:
    """The reason why `upfirdn2d` cannot take the arguments, or None."""
    return _triton.why_not(args[0])


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`."""
    return (Candidate("triton", globals()[op], why_not, devices=_triton.DEVICES),)


def gpu_blocks(channels: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) on a GPU.

    With the channels last a thread has 8 neighbouring ones. One channel leaves it an address for each of its elements, so it
    has 2 of these.
    """
    if channels == 1:
        return 256, 1
    block_c = min(triton.next_power_of_2(channels), 128)
    return 1024 // block_c, block_c


def _blocks(places: int, channels: int) -> tuple[int, int]:
    if _triton.INTERPRETED:  # its time is that of the number of programs
        return triton.next_power_of_2(places), triton.next_power_of_2(channels)
    return gpu_blocks(channels)


def upfirdn2d(
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
    """Op `upfirdn2d`."""
    n, c, in_h, in_w = x.shape
    taps_y, taps_x = f.shape
    out_h = (in_h * up_y + pad_y0 + pad_y1 - taps_y) // down_y + 1
    out_w = (in_w * up_x + pad_x0 + pad_x1 - taps_x) // down_x + 1
    layout = memory_format_of(x)
    x, f = x.contiguous(memory_format=layout), f.contiguous()
    y = torch.empty((n, c, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=layout)
    if not y.numel():
        return y
    planes, channels = (n, c) if layout == torch.channels_last else (n * c, 1)
    tile = TILES.get((up_x, down_x)) if (up_x, down_x, taps_x) == (up_y, down_y, taps_y) else None
    constants: dict[str, Any] = {
        "FLIP": flip_filter,
        "GAIN": gain,
        # Offsets of places that do not exist count, too.
        "INDEX64": max(x.numel(), y.numel()) >= 2**31 - 2**24,
        "DTYPE": _triton.math_dtype(x),
    }
    sizes = channels, in_h, in_w, out_h, out_w
    head: tuple[int, ...]
    tail: tuple[int, ...]
    if tile is not None and taps_x == TAPS.value:
        tile_x, tile_y = tile
        shift_x, shift_y = -pad_x0 % up_x, -pad_y0 % up_y
        columns, rows = triton.cdiv(out_w + shift_x, tile_x), triton.cdiv(out_h + shift_y, tile_y)
        places = planes * rows * columns
        kernel, head, tail = (
            upfirdn2d_tile_kernel,
            (places, columns, rows),
            (pad_x0, pad_y0, shift_x, shift_y),
        )
        constants |= {"UP": up_x, "DOWN": down_x, "TILE_X": tile_x, "TILE_Y": tile_y}
    else:
        places = planes * out_h * out_w
        kernel, head = upfirdn2d_kernel, (places,)
        tail = taps_x, taps_y, up_x, up_y, down_x, down_y, pad_x0, pad_y0
    block_m, block_c = _blocks(places, channels)
    grid = triton.cdiv(places, block_m), triton.cdiv(channels, block_c)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, f, y, *head, *sizes, *tail, **constants, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS
        )
    return y
