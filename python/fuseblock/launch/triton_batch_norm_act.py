"""Host side of the Triton kernels in kernels/batch_norm_act.py.

This module is itself a kernel namespace of the driver (`batch_norm_act.Kernels`): stats, fwd_apply, bwd_reduce, bwd_apply,
bwd_bwd_reduce, bwd_bwd_apply. Tensors are dense NCHW-contiguous or channels-last, all of one call alike.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, cast

import torch
import triton
from torch import Tensor

from fuseblock.kernels.batch_norm_act import (
    batch_norm_act_bwd_bwd_kernel,
    batch_norm_act_bwd_bwd_reduce_kernel,
    batch_norm_act_bwd_kernel,
    batch_norm_act_bwd_reduce_kernel,
    batch_norm_act_combine_kernel,
    batch_norm_act_fwd_kernel,
    batch_norm_act_stats_kernel,
)
from fuseblock.kernels.channel_tiles import CHANNELS_LAST, FLAT, ROWS, SAMPLES_LAST

from .._activations import number
from .._library import state_dtype
from ..dispatch import Candidate
from . import _triton
from .batch_norm_act import DRIVERS, Kernels, Site, number_of_channels

_PRELU = number("prelu")
#: Programs of a reduction: a few blocks for every multiprocessor of a large GPU, whatever the device, so that the order
#: of a sum depends on the shape alone.
_PROGRAMS = 1024

#: Elements of a tile, of 4 warps: 16 bytes a thread in 16 bit. The up to twelve sums of the second order take small ones, or
#: they would run out of registers.
TILE, SECOND_SUMS_TILE, COMBINE_TILE = 1024, 512, 2048


def why_not(*args: Any) -> str | None:
    """The reason why Triton cannot take the arguments of an operator of the family, or None."""
    return _triton.why_not(next(x for x in args if isinstance(x, Tensor)))


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`: batch_norm_act, batch_norm_act_bwd or batch_norm_act_bwd_bwd."""
    run = partial(DRIVERS[op], cast(Kernels, sys.modules[__name__]))
    return (Candidate("triton", run, why_not, devices=_triton.DEVICES),)


def gpu_blocks(layout: int, row: int, others: int, tile: int) -> tuple[int, int]:
    """(neighbouring elements, rows) of a tile on a GPU: as many rows as make up a tile."""
    # Sums of channels are written once per program, so channels-last programs own few of them and many positions.
    longest = tile if layout in (ROWS.value, FLAT.value) else min(tile, 128)
    block = min(max(triton.next_power_of_2(row), 8), longest)
    return block, min(triton.next_power_of_2(others), tile // block)


def blocks(layout: int, row: int, others: int, tile: int) -> tuple[int, int]:
    """As `gpu_blocks`; in the interpreter, whose time is that of the number of programs, tiles are large."""
    if not _triton.INTERPRETED:
        return gpu_blocks(layout, row, others, tile)
    return max(triton.next_power_of_2(row), 8), min(triton.next_power_of_2(others), 64)


def programs(chunks: int, channel_blocks: int) -> int:
    """How many programs share the tiles of a block of channels in a reduction: each has several."""
    return 1 if _triton.INTERPRETED else min(triton.cdiv(chunks, 8), triton.cdiv(_PROGRAMS, channel_blocks))


def tile_elements(tile: int, dtype: torch.dtype) -> int:
    """Elements of a tile: half as many where each takes two registers."""
    return tile // 2 if dtype is torch.float64 else tile


def second_tile(dtype: torch.dtype, *, sums: bool) -> int:
    """Elements of a tile of the second order; those of float64 fill registers as the sums do."""
    return SECOND_SUMS_TILE if sums or dtype is torch.float64 else TILE


class Tiles:
    """How a tensor is cut into tiles, see kernels/channel_tiles.py.

    Attributes:
        sizes: samples, channels, positions.
        constants: LAYOUT, BLOCK_C, BLOCK_S.
        chunks: tiles of one block of channels.
        channel_blocks: blocks of channels.
        row: elements from the start of a row of tiles to the next one.
        parts: how many times as many blocks of channels have sums of their own: samples, with statistics per sample.
    """

    def __init__(self, x: Tensor, tile: int, per_sample: bool, *, whole_bytes: bool = False) -> None:
        samples, channels = x.shape[:2]
        tile = tile_elements(tile, x.dtype)
        size = x.numel() // (samples * channels)
        self.parts = 1
        if per_sample and x.is_contiguous():
            samples, channels = 1, samples * channels
        if per_sample and not x.is_contiguous():
            self.layout, self.row, self.parts = SAMPLES_LAST.value, channels, samples
            block_c, block_s = blocks(self.layout, channels, size, tile)
        elif size == 1 or not x.is_contiguous():
            self.layout, self.row = CHANNELS_LAST.value, channels
            samples, size = 1, samples * size
            block_c, block_s = blocks(self.layout, channels, size, tile)
        else:
            self.layout, self.row = ROWS.value, size
            block_s, block_c = blocks(self.layout, size, channels, tile)
        self.sizes = samples, channels, size
        if whole_bytes and self.row % 8 != 0:
            if self.layout == CHANNELS_LAST.value:
                self.sizes = size, channels, 1
            self.layout, self.row = FLAT.value, x.numel()
            block_c, block_s = 1, blocks(self.layout, x.numel(), 1, tile)[0]
            self.chunks, self.channel_blocks = triton.cdiv(x.numel(), block_s), 1
        else:
            self.chunks, self.channel_blocks = (
                samples * triton.cdiv(size, block_s),
                triton.cdiv(channels, block_c),
            )
        self.constants = {"LAYOUT": self.layout, "BLOCK_C": block_c, "BLOCK_S": block_s}


def _launch(
    kernel: Any, grid_x: int, tiles: Tiles, tensors: tuple[Tensor | None, ...], x: Tensor, **constants: Any
) -> None:
    """Run a kernel whose arguments are tensors, sizes, the number of tiles and constants."""
    # Rows of tiles start at multiples of 16 bytes if the tensors do; per-channel operands are read one by one.
    aligned = tiles.row % 16 == 0 and all(
        t is None or t.data_ptr() % 16 == 0 for t in tensors if t is None or t.shape == x.shape
    )
    with torch.cuda.device_of(x):
        kernel[(grid_x, tiles.channel_blocks)](
            *tensors,
            *tiles.sizes,
            tiles.chunks,
            **constants,
            **tiles.constants,
            DTYPE=_triton.math_dtype(x),
            ALIGNED=aligned,
            num_warps=4,
        )


def _reduce(
    kernel: Any,
    sums: int,
    tensors: tuple[Tensor | None, ...],
    x: Tensor,
    tile: int,
    per_sample: bool,
    **constants: Any,
) -> Tensor:
    """Run a reduction; the partial sums (programs, sums, channels)."""
    tiles = Tiles(x, tile, per_sample)
    count = programs(tiles.chunks // tiles.parts, tiles.channel_blocks * tiles.parts)
    channels = number_of_channels(x, per_sample)
    partial = torch.empty(count, sums, channels, dtype=state_dtype(x.dtype), device=x.device)
    _launch(kernel, count * tiles.parts, tiles, (*tensors, partial), x, **constants)
    return partial


def _total(partial: Tensor) -> Tensor:
    """The sums of all programs, added in a fixed order."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def _activation(site: Site) -> dict[str, Any]:
    return {
        "ACT": site.activation,
        "NEGATIVE_SLOPE": site.negative_slope,
        "ONE_SLOPE": site.slope is not None and site.slope.numel() == 1,
    }


def _affine(site: Site) -> tuple[Tensor | None, ...]:
    return site.x, site.mean, site.invstd, site.weight, site.bias, site.residual


def _zeros(x: Tensor, count: int, per_sample: bool) -> Tensor:
    channels = number_of_channels(x, per_sample)
    return torch.zeros(count, channels, dtype=state_dtype(x.dtype), device=x.device)


def stats(x: Tensor, per_sample: bool = False) -> Tensor:
    """(2, C): mean and sum of squared deviations per channel; zeros of nothing."""
    if x.numel() == 0:
        return _zeros(x, 2, per_sample)
    partial = _reduce(batch_norm_act_stats_kernel, 3, (x,), x, TILE, per_sample)
    if partial.shape[0] == 1:
        return partial[0, 1:]
    out = torch.empty_like(partial[0, 1:])
    channels = partial.shape[2]
    block_c = min(triton.next_power_of_2(channels), 32)
    with torch.cuda.device_of(x):
        batch_norm_act_combine_kernel[(triton.cdiv(channels, block_c),)](
            partial,
            out,
            channels,
            partial.shape[0],
            DTYPE=_triton.math_dtype(x),
            BLOCK_C=block_c,
            BLOCK_P=COMBINE_TILE // block_c,
            num_warps=4,
        )
    return out


def fwd_apply(site: Site, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    """(y, mask): see the driver."""
    x = site.x
    y = torch.empty_like(x)
    mask = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device) if want_mask else None
    if x.numel():
        tiles = Tiles(x, TILE, site.per_sample, whole_bytes=want_mask)
        tensors = (*_affine(site), site.slope, y, mask)
        _launch(batch_norm_act_fwd_kernel, tiles.chunks, tiles, tensors, x, **_activation(site))
    return y, mask


def bwd_reduce(dy: Tensor, site: Site) -> Tensor:
    """(2 or 3, C): sums of G, G xhat and, for prelu, dy min(z, 0)."""
    count = 3 if site.activation == _PRELU else 2
    if dy.numel() == 0:
        return _zeros(dy, count, site.per_sample)
    tensors = (dy, *_affine(site), site.mask, site.slope)
    kernel, each = batch_norm_act_bwd_reduce_kernel, site.per_sample
    return _total(_reduce(kernel, count, tensors, dy, TILE, each, **_activation(site)))


def bwd_apply(dy: Tensor, site: Site, k: Tensor, want_dresidual: bool) -> tuple[Tensor, Tensor | None]:
    """(dx, dresidual) from the coefficients k (3, C)."""
    dx = torch.empty_like(site.x)
    dresidual = torch.empty_like(site.x) if want_dresidual else None
    if dx.numel():
        tiles = Tiles(dx, TILE, site.per_sample)
        tensors = (dy, *_affine(site), site.mask, site.slope, k, dx, dresidual)
        _launch(batch_norm_act_bwd_kernel, tiles.chunks, tiles, tensors, dx, **_activation(site))
    return dx, dresidual


def bwd_bwd_reduce(v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site) -> Tensor:
    """(5, 10 or 12, C): the sums of the second order."""
    count = 5 if site.activation < _PRELU else 10 if v_residual is None else 12
    if dy.numel() == 0:
        return _zeros(dy, count, site.per_sample)
    tensors = (v, v_residual if count == 12 else None, dy, *_affine(site), site.mask, site.slope)
    kernel, each = batch_norm_act_bwd_bwd_reduce_kernel, site.per_sample
    tile = second_tile(dy.dtype, sums=True)
    return _total(_reduce(kernel, count, tensors, dy, tile, each, SUMS=count, **_activation(site)))


def bwd_bwd_apply(
    v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site, k: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a_x, a_dy, a_residual) from the coefficients k (9, C); a_residual where the residual is saved."""
    a_x, a_dy = torch.empty_like(site.x), torch.empty_like(site.x)
    a_residual = None if site.residual is None else torch.empty_like(site.x)
    if dy.numel():
        tiles = Tiles(dy, second_tile(dy.dtype, sums=False), site.per_sample)
        tensors = (v, v_residual, dy, *_affine(site), site.mask, site.slope, k, a_x, a_dy, a_residual)
        _launch(batch_norm_act_bwd_bwd_kernel, tiles.chunks, tiles, tensors, dy, **_activation(site))
    return a_x, a_dy, a_residual
