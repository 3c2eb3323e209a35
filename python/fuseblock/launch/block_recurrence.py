"""The recurrence in one launch, w_hh in the registers of one block per direction and 8 or 16 rows: small H, 16 bit.

Host side of csrc/cuda/lstm_recurrence_block.h. The kernels come from a namespace (any object will do) with the two functions
of `BlockKernels`. Nothing here waits for the device, so a call can be captured in a CUDA graph.

First derivatives only. The second-order sweep runs per step: it is rare, needs the weights in both orientations (twice the
registers that there are), and reads what these kernels save.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

#: The largest H, as csrc/cuda/lstm_recurrence_block.h says (a test compares them).
LARGEST_HIDDEN = 128

_DTYPES = (torch.float16, torch.bfloat16)
#: Offsets within the rows of a block have 32 bits in the kernels.
_LARGEST_ROW_STRIDE = 2**31 // 32 - 1


class BlockKernels(Protocol):
    """The two launches. Tensors as in `fuseblock.ops.lstm_recurrence`, outputs last; all are contiguous but gx and dy.

    gx and dy have contiguous columns. w_hh is padded with zeros to the next multiple of 8 columns.
    """

    def block_fwd(
        self,
        gx: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        lengths: Tensor | None,
        y: Tensor,
        h_n: Tensor,
        c_n: Tensor,
        gates: Tensor | None,
        c: Tensor | None,
    ) -> None:
        """All steps; without gates and c, no state is saved."""

    def block_bwd(
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        d_gates: Tensor | None,
        d_c: Tensor | None,
        gates: Tensor,
        c: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        lengths: Tensor | None,
        dgx: Tensor,
        dh0: Tensor,
        dc0: Tensor,
    ) -> None:
        """All steps, last to first. None among the gradients means zeros."""


def why_not(dtype: torch.dtype, hidden: int, w_hr: Tensor | None, batch_sizes: Tensor | None) -> str | None:
    """The reason why the block tier cannot run a layer, or None."""
    if dtype not in _DTYPES:
        return f"the block tier runs in float16 and bfloat16, not in {dtype}"
    if hidden > LARGEST_HIDDEN:
        return f"w_hh of H = {hidden} does not fit into the registers of a block (limit {LARGEST_HIDDEN})"
    if w_hr is not None:
        return "the block tier has no projection"
    if batch_sizes is not None:
        return "packed rows (batch_sizes) run on the CPU only; pad them and pass lengths"
    return None


def _with_near_rows(x: Tensor) -> Tensor:
    """X (T, B, columns) with contiguous columns, the rows of a block within 32-bit offsets."""
    near = 0 <= x.stride(1) <= _LARGEST_ROW_STRIDE and x.stride(0) >= 0
    return x if near and (x.stride(2) == 1 or x.shape[2] == 1) else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _padded(w_hh: Tensor) -> Tensor:
    """w_hh with rows of a multiple of 8 columns, at a multiple of 16 bytes."""
    padded = pad(w_hh, (0, -w_hh.shape[2] % 8)).contiguous()
    return padded if padded.data_ptr() % 16 == 0 else padded.clone()


def lstm_recurrence(
    kernels: BlockKernels,
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, ...]:
    """Op `lstm_recurrence`: (y, h_n, c_n, gates, c)."""
    directions, _, hidden = c0.shape
    y = gx.new_empty(*gx.shape[:2], directions * hidden)
    h_n, c_n = gx.new_empty(h0.shape), c0.new_empty(c0.shape)
    gates = gx.new_empty(gx.shape if save_state else (0,))
    c = c0.new_empty(y.shape if save_state else (0,))
    kernels.block_fwd(
        _with_near_rows(gx),
        h0.contiguous(),
        c0.contiguous(),
        _padded(w_hh),
        _contiguous(lengths),
        y,
        h_n,
        c_n,
        gates if save_state else None,
        c if save_state else None,
    )
    return y, h_n, c_n, gates, c


def lstm_recurrence_bwd(
    kernels: BlockKernels,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Op `lstm_recurrence_bwd`: (dgx, dh0, dc0, dh); dh is empty."""
    dgx, dh0, dc0 = gates.new_empty(gates.shape), gates.new_empty(c0.shape), c0.new_empty(c0.shape)
    kernels.block_bwd(
        None if dy is None else _with_near_rows(dy),
        _contiguous(dh_n),
        _contiguous(dc_n),
        _contiguous(d_gates),
        _contiguous(d_c),
        gates.contiguous(),
        c.contiguous(),
        c0.contiguous(),
        _padded(w_hh),
        _contiguous(lengths),
        dgx,
        dh0,
        dc0,
    )
    return dgx, dh0, dc0, gates.new_empty(0)
