"""Host side of the Triton kernels in kernels/bias_act.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fuseblock.kernels.bias_act import bias_act_bwd_bwd_kernel, bias_act_bwd_kernel, bias_act_fwd_kernel

from ..dispatch import Candidate
from ..reference.bias_act import PRELU, keeps_x, planes
from . import _triton

#: Elements of a tile of the forward, and its warps: a thread owns 8 elements.
TILE, FORWARD_WARPS = 1024, 4
#: Warps of the derivatives, whose threads own 16 bytes.
WARPS = 8
#: Programs of a kernel that sums, about: a few waves of blocks on every GPU, and few partial sums.
PROGRAMS = 1024


def why_not(*args: Any) -> str | None:
    """The reason why the functions of this module cannot take the arguments of an op of the family, or None."""
    return _triton.why_not(args[0])


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`: bias_act, bias_act_bwd or bias_act_bwd_bwd."""
    return (Candidate("triton", globals()[op], why_not, devices=_triton.DEVICES),)


@dataclass(frozen=True)
class _Site:
    """Sizes and constants of a call on tensors like x, dense with the channels second."""

    x: Tensor
    activation: int
    negative_slope: float
    gain: float
    clamp: float

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def pixels(self) -> int:
        """Over all images."""
        return self.x.numel() // self.channels

    @property
    def channels_last(self) -> bool:
        return not self.x.is_contiguous() or self.inner == 1

    @property
    def inner(self) -> int:
        return self.x[0, 0].numel()

    @property
    def plane_bytes(self) -> int:
        return (self.x.numel() + 7) // 8

    def constants(self) -> dict[str, Any]:
        clamped = math.isfinite(self.clamp)
        return {
            "ACT": self.activation,
            "SLOPE": self.negative_slope,
            "GAIN": self.gain,
            "CLAMPED": clamped,
            "CLAMP": self.clamp if clamped else 0.0,
            "CHANNELS_LAST": self.channels_last,
            # Offsets of a tile's dead elements count, too.
            "INDEX64": self.x.numel() >= 2**31 - 2**24,
            "DTYPE": _triton.math_dtype(self.x),
        }


def gpu_tile(channels: int, channels_last: bool, itemsize: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) on a GPU: neighbouring threads read neighbouring elements."""
    block_c = min(max(triton.next_power_of_2(channels), 1), 128) if channels_last else 1
    return WARPS * 32 * 16 // itemsize // block_c, block_c


def _grid(site: _Site) -> tuple[tuple[int, int], int, int, int]:
    """((blocks of channels, splits), tiles of a program, BLOCK_M, BLOCK_C)."""
    if _triton.INTERPRETED:  # its time is that of the number of programs
        return (1, 1), 1, triton.next_power_of_2(site.pixels), triton.next_power_of_2(site.channels)
    block_m, block_c = gpu_tile(site.channels, site.channels_last, site.x.element_size())
    blocks, tiles = triton.cdiv(site.channels, block_c), triton.cdiv(site.pixels, block_m)
    tiles_each = triton.cdiv(tiles, max(PROGRAMS // blocks, 1))
    return (blocks, triton.cdiv(tiles, tiles_each)), tiles_each, block_m, block_c


def bias_act(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Op `bias_act`: (y, mask)."""
    site = _Site(x, activation, negative_slope, gain, clamp)
    y = torch.empty_like(x)
    count = planes(activation, clamp) if save else 0
    mask = torch.empty(count * site.plane_bytes, dtype=torch.uint8, device=x.device)
    if x.numel():
        block = max(triton.next_power_of_2(x.numel()), 8) if _triton.INTERPRETED else TILE
        with torch.cuda.device_of(x):
            bias_act_fwd_kernel[(triton.cdiv(x.numel(), block),)](
                x,
                bias,
                slope,
                y,
                mask if count else None,
                x.numel(),
                site.channels,
                site.inner,
                site.plane_bytes,
                **site.constants(),
                BLOCK=block,
                num_warps=FORWARD_WARPS,
            )
    return y, mask


def _launch_with_sums(
    kernel: Any, site: _Site, tensors: tuple[Tensor | None, ...], kinds: int
) -> list[Tensor]:
    """Run a kernel over tiles with `kinds` sums of a channel; returns those, (channels,) each."""
    grid, tiles, block_m, block_c = _grid(site)
    dtype = torch.float64 if site.x.dtype == torch.float64 else torch.float32
    sums = torch.empty((kinds, grid[1], site.channels), dtype=dtype, device=site.x.device)
    with torch.cuda.device_of(site.x):
        kernel[grid](
            *tensors,
            sums if kinds else None,
            site.pixels,
            site.channels,
            site.inner,
            site.plane_bytes,
            tiles,
            **site.constants(),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=WARPS,
        )
    return [kind.sum(0) for kind in sums]


def bias_act_bwd(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Op `bias_act_bwd`: (dx, dbias, dslope)."""
    site = _Site(dy, activation, negative_slope, gain, clamp)
    dx, kinds = torch.empty_like(dy), 2 if activation == PRELU else int(need_dbias)
    none = torch.empty(
        0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32, device=dy.device
    )
    if dy.numel():
        mask = mask if planes(activation, clamp) else None
        sums = _launch_with_sums(bias_act_bwd_kernel, site, (dy, x, bias, slope, mask, dx), kinds)
    else:
        sums = [none.new_zeros(site.channels) for _ in range(kinds)]
    # One tensor each: outputs of an operator do not alias.
    return dx, sums[0] if need_dbias else none.clone(), sums[1] if slope is not None else none


def bias_act_bwd_bwd(
    v: Tensor,
    v_bias: Tensor | None,
    v_slope: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mask: Tensor | None,
    activation: int,
    negative_slope: float,
    gain: float,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `bias_act_bwd_bwd`: (a_dy, a_x, a_bias, a_slope)."""
    site, keeps = _Site(v, activation, negative_slope, gain, clamp), keeps_x(activation)
    none = torch.empty(0, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32, device=v.device)
    a_dy, a_x = torch.empty_like(v), torch.empty_like(v) if keeps else none.clone()
    kinds = 2 if activation == PRELU else int(keeps)
    if v.numel():
        mask = mask if planes(activation, clamp) else None
        v_slope = v_slope if slope is not None else None
        tensors = (
            v,
            v_bias,
            v_slope,
            dy if keeps else None,
            x,
            bias,
            slope,
            mask,
            a_dy,
            a_x if keeps else None,
        )
        sums = _launch_with_sums(bias_act_bwd_bwd_kernel, site, tensors, kinds)
    else:
        sums = [none.new_zeros(site.channels) for _ in range(kinds)]
    return a_dy, a_x, sums[0] if keeps else none.clone(), sums[1] if slope is not None else none
