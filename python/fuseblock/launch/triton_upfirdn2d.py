"""Host side of the Triton kernels in kernels/upfirdn2d.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fuseblock.kernels.upfirdn2d import (
    TAPS,
    upfirdn2d_kernel,
    upfirdn2d_row_kernel,
    upfirdn2d_tile_kernel,
)

from ..dispatch import Candidate
from ..reference.upfirdn2d import memory_format_of
from . import _triton

#: Outputs of a tile in x and y, by (up, down): all phases of an upsampling, and in y a few more.
TILES = {(1, 1): (1, 4), (2, 1): (2, 2), (1, 2): (1, 2)}
#: Taps of a filter that is unrolled over rows of vectors, at most: those of 4 x 4, or a pass of a separable one.
ROW_TAPS = 16
WARPS = 4


def why_not(*args: Any) -> str | None:
    """The reason why `upfirdn2d` cannot take the arguments, or None."""
    return _triton.why_not(args[0])


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`."""
    return (Candidate("triton", globals()[op], why_not, devices=_triton.DEVICES),)


def gpu_blocks(channels: int, vector: int = 1) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) on a GPU, of places that have `vector` elements of a row.

    With the channels last a thread has 8 neighbouring ones. One channel leaves it an address for each of its elements, so it
    has 2 of these, or one vector.
    """
    if vector > 1:
        return WARPS * 32, 1
    if channels == 1:
        return 256, 1
    block_c = min(triton.next_power_of_2(channels), 128)
    return 1024 // block_c, block_c


def _blocks(places: int, channels: int, vector: int) -> tuple[int, int]:
    if _triton.INTERPRETED:  # its time is that of the number of programs
        return triton.next_power_of_2(places), triton.next_power_of_2(channels)
    return gpu_blocks(channels, vector)


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
    square = (up_x, down_x, taps_x) == (up_y, down_y, taps_y)
    vector = 16 // x.element_size()
    # Widths of whole vectors, of y's rows and of what x's become.
    whole = channels == 1 and out_w % vector == 0 and in_w * up_x % vector == 0
    unrolled = {(up_x, down_x), (up_y, down_y)} <= TILES.keys() and taps_x * taps_y <= ROW_TAPS
    constants: dict[str, Any] = {
        "FLIP": flip_filter,
        "GAIN": gain,
        # Offsets of places that do not exist count, too.
        "INDEX64": max(x.numel(), y.numel()) >= 2**31 - 2**24,
        "DTYPE": _triton.math_dtype(x),
    }
    sizes = channels, in_h, in_w, out_h, out_w
    kernel: Any
    arguments: tuple[int, ...]
    if whole and unrolled:
        tile_y = TILES[up_y, down_y][1]
        shift_y = -pad_y0 % up_y
        first, start = divmod(-pad_x0, vector)
        columns, rows = out_w // vector, triton.cdiv(out_h + shift_y, tile_y)
        places = planes * rows * columns
        kernel = upfirdn2d_row_kernel
        arguments = places, columns, rows, in_w * up_x // vector, in_h, out_h, first, pad_y0, shift_y
        constants |= {"UP_X": up_x, "UP_Y": up_y, "DOWN_X": down_x, "DOWN_Y": down_y, "START": start}
        constants |= {"TAPS_X": taps_x, "TAPS_Y": taps_y, "TILE_Y": tile_y, "N": vector}
    elif square and taps_x == TAPS.value and (up_x, down_x) in TILES:
        tile_x, tile_y = TILES[up_x, down_x]
        shift_x, shift_y = -pad_x0 % up_x, -pad_y0 % up_y
        columns, rows = triton.cdiv(out_w + shift_x, tile_x), triton.cdiv(out_h + shift_y, tile_y)
        places = planes * rows * columns
        kernel = upfirdn2d_tile_kernel
        arguments = places, columns, rows, *sizes, pad_x0, pad_y0, shift_x, shift_y
        constants |= {"UP": up_x, "DOWN": down_x, "TILE_X": tile_x, "TILE_Y": tile_y}
    else:
        places = planes * out_h * out_w
        kernel = upfirdn2d_kernel
        arguments = places, *sizes, taps_x, taps_y, up_x, up_y, down_x, down_y, pad_x0, pad_y0
    block_m, block_c = _blocks(places, channels, constants.get("N", 1))
    if "BLOCK_C" in kernel.arg_names:
        constants["BLOCK_C"] = block_c
    grid = triton.cdiv(places, block_m), triton.cdiv(channels, block_c)
    with torch.cuda.device_of(x):
        kernel[grid](x, f, y, *arguments, **constants, BLOCK_M=block_m, num_warps=WARPS)
    return y
