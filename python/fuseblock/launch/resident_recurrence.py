"""The recurrence in one launch, w_hh kept on chip over all steps: host side of csrc/cuda/lstm_recurrence.h.

Where w_hh lies is the *tier*: in one block, in a cluster of blocks, in the whole grid (`TIERS`). All tiers compute the same
from the same tensors and save the same. The kernels come from a namespace (any object will do) with the two functions of
`ResidentKernels`. Nothing here waits for the device, so a call can be captured in a CUDA graph.

First derivatives only. The second-order sweep runs per step: it is rare, needs the weights in both orientations (twice the
memory on chip), and reads what these kernels save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _tables
from . import lstm_grid
from .gpu import H200, Gpu
from .gpu import gpu_of as gpu_of

#: Offsets within the rows of a slice of the batch have 32 bits in the kernels.
_LARGEST_ROW_STRIDE = 2**31 // 256 - 1


@dataclass(frozen=True)
class Tier:
    """Where the recurrent weights lie during a launch.

    Attributes:
        name: ``block``, ... as in csrc/cuda/lstm_recurrence_<name>.h and the names of the operators.
        dtypes: that its kernels run in.
        largest_hidden: (dtype, gpu) -> the largest H, 0 where it cannot run at all.
        workspace_bytes: (dtype, directions, batch, hidden, backward, gpu) -> bytes that a launch needs beside its operands.
        least_blocks: (dtype, hidden, backward, gpu) -> blocks that must run at the same time, where they wait for each
            other, for any launch at all.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    largest_hidden: Callable[[torch.dtype, Gpu], int]
    workspace_bytes: Callable[[torch.dtype, int, int, int, bool, Gpu], int] = lambda *args: 0
    least_blocks: Callable[[torch.dtype, int, bool, Gpu], int] = lambda *args: 1

    def why_not(
        self, w_hh: Tensor, w_hr: Tensor | None, batch_sizes: Tensor | None, gpu: Gpu = H200
    ) -> str | None:
        """The reason why this tier cannot run a layer on that GPU, or None."""
        hidden = w_hh.shape[-2] // 4
        if w_hh.dtype not in self.dtypes:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"the {self.name} tier runs in {names}, not in {w_hh.dtype}"
        if w_hr is not None:
            return f"the {self.name} tier has no projection"
        if batch_sizes is not None:
            return "packed rows (batch_sizes) run on the CPU only; pad them and pass lengths"
        limit = self.largest_hidden(w_hh.dtype, gpu)
        if limit == 0:
            return f"the {self.name} tier does not run on {gpu.name}"
        if hidden > limit:
            return (
                f"w_hh of H = {hidden} does not fit into the {self.name} tier on {gpu.name} (limit {limit})"
            )
        return None


_HALF = (torch.float16, torch.bfloat16)

#: Bytes of shared memory that the block tier needs for float32 above H = 96.
_BLOCK_SHARED_ABOVE_96 = 164_224


def _largest_of_a_block(dtype: torch.dtype, gpu: Gpu) -> int:
    return 96 if dtype == torch.float32 and gpu.shared_bytes < _BLOCK_SHARED_ABOVE_96 else 128


def _largest_of_a_cluster(dtype: torch.dtype, gpu: Gpu) -> int:
    return (512 if dtype == torch.float32 else 640) if gpu.has_clusters else 0


#: In order of preference. The limits are those of the C interface (tests compare them).
TIERS = {
    tier.name: tier
    for tier in (
        Tier("block", (*_HALF, torch.float32), _largest_of_a_block),
        Tier("cluster", (*_HALF, torch.float32), _largest_of_a_cluster),
        Tier(
            "grid",
            (*_HALF, torch.float32),
            lstm_grid.largest_hidden,
            lstm_grid.workspace_bytes,
            lstm_grid.least_blocks,
        ),
    )
}


class ResidentKernels(Protocol):
    """The two launches of a tier. Tensors as in `fuseblock.ops.lstm_recurrence`, outputs last.

    All are contiguous but gx and dy, which have contiguous columns. w_hh is padded with zeros to the next multiple of 8
    columns. workspace: uint8, as many as the tier wants. passes: see `passes`.
    """

    def fwd(
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
        workspace: Tensor | None,
        passes: int,
    ) -> None:
        """All steps; without gates and c, no state is saved."""

    def bwd(
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
        workspace: Tensor | None,
        passes: int,
    ) -> None:
        """All steps, last to first. None among the gradients means zeros."""

    # Tiers that a GPU with the right limits may still refuse have a third function,
    #
    #   resident(w_hh: Tensor, backward: bool) -> int
    #
    # the blocks of the kernel for w_hh (D, 4H, H) that run at the same time. With fewer than the tier's least_blocks,
    # launches would be refused.


def with_near_rows(x: Tensor) -> Tensor:
    """X (T, B, columns) with contiguous columns, the rows of a slice within 32-bit offsets."""
    near = 0 <= x.stride(1) <= _LARGEST_ROW_STRIDE and x.stride(0) >= 0
    return x if near and (x.stride(2) == 1 or x.shape[2] == 1) else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """An operand, if it is there, in one piece."""
    return None if x is None else x.contiguous()


def padded_rows(w_hh: Tensor) -> Tensor:
    """w_hh with rows of a multiple of 8 columns, at a multiple of 16 bytes."""
    missing = -w_hh.shape[2] % 8
    padded = (pad(w_hh, (0, missing)) if missing else w_hh).contiguous()
    return padded if padded.data_ptr() % 16 == 0 else padded.clone()


def passes(dtype: torch.dtype) -> int:
    """Of the tensor cores over the digits of float32 operands: 1 where PyTorch may use TF32 for matmuls, else 3.

    One pass rounds operands to TF32 (10 bits of mantissa), three multiply their leading and their remaining digits: the
    error is that of float32. In 16 bit one pass is exact.
    """
    return 3 if dtype == torch.float32 and not _tables.tf32("matmul") else 1


def _workspace(tier: Tier, w_hh: Tensor, c0: Tensor, backward: bool) -> Tensor | None:
    """What a launch of the tier needs beside its operands: of the caching allocator, so safe on any stream."""
    directions, batch, hidden = c0.shape
    size = tier.workspace_bytes(w_hh.dtype, directions, batch, hidden, backward, gpu_of(w_hh))
    return torch.empty(size, dtype=torch.uint8, device=w_hh.device) if size else None


def lstm_recurrence(
    tier: Tier,
    kernels: ResidentKernels,
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
    kernels.fwd(
        with_near_rows(gx),
        h0.contiguous(),
        c0.contiguous(),
        padded_rows(w_hh),
        contiguous(lengths),
        y,
        h_n,
        c_n,
        gates if save_state else None,
        c if save_state else None,
        _workspace(tier, w_hh, c0, False),
        passes(w_hh.dtype),
    )
    return y, h_n, c_n, gates, c


def lstm_recurrence_bwd(
    tier: Tier,
    kernels: ResidentKernels,
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
    kernels.bwd(
        None if dy is None else with_near_rows(dy),
        contiguous(dh_n),
        contiguous(dc_n),
        contiguous(d_gates),
        contiguous(d_c),
        gates.contiguous(),
        c.contiguous(),
        c0.contiguous(),
        padded_rows(w_hh),
        contiguous(lengths),
        dgx,
        dh0,
        dc0,
        _workspace(tier, w_hh, c0, True),
        passes(w_hh.dtype),
    )
    return dgx, dh0, dc0, gates.new_empty(0)
