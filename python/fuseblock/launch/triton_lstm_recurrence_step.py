"""Host side of kernels/lstm_recurrence_step.py: the recurrence with one launch per time step, for any H.

A call allocates before its first launch and waits for nothing, so it can be captured in a CUDA graph. First order only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from fuseblock.kernels.lstm_recurrence_step import (
    lstm_recurrence_step_bwd_kernel,
    lstm_recurrence_step_fwd_kernel,
)

from . import _triton, per_step


@dataclass(frozen=True)
class StepConfig:
    """How a step kernel runs one size: no configuration chosen here spills registers.

    Attributes:
        block_b: rows of the batch per program.
        block_h: units per program.
        block_k: elements that one part of the matrix product sums over per pass.
        parts: independent sums, each in warps of its own.
        num_warps: warps per program.
        num_stages: passes whose operands are in flight, and one.
    """

    block_b: int
    block_h: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int

    def shared(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Bytes of shared memory that suffice, as compiled: for operands in flight, or for the sums afterwards."""
        rows, columns = self.block_b, self.block_h if backward else 4 * self.block_h
        operands = self.num_stages * (rows + columns) * self.parts * self.block_k * dtype.itemsize
        return max(operands, self.parts * rows * columns * 4) + 1024


def step_config(dtype: torch.dtype, batch: int, hidden: int, *, backward: bool) -> StepConfig:
    """The configuration for B rows of H units."""
    if _triton.INTERPRETED:
        # One program per direction: the interpreter's time is that of the number of programs. Its dots add one by one, so
        # a long BLOCK_K would round more than any GPU does.
        block_b, block_h = (max(triton.next_power_of_2(size), 16) for size in (batch, hidden))
        return StepConfig(block_b, block_h, min(block_h, 64), 1, 4, 1)
    return gpu_step_config(dtype, batch, hidden, backward=backward)


def gpu_step_config(dtype: torch.dtype, batch: int, hidden: int, *, backward: bool) -> StepConfig:
    """The configuration on a GPU: small tiles, so that W_hh spreads over many multiprocessors. Unmeasured."""
    if hidden % 16:
        # Without wide accesses every element takes an address register.
        return StepConfig(16, 16, 16, parts=2, num_warps=4, num_stages=1)
    line = 128 // dtype.itemsize
    full = dtype == torch.float32
    if batch <= 16:
        return StepConfig(
            16, 16, line if backward else line // 2, 4, num_warps=4, num_stages=3 if full else 4
        )
    num_warps, num_stages = (8, 3) if full else (4, 4)
    if batch <= 32:
        return StepConfig(32, 16, line if backward else line // 2, 4, num_warps, num_stages)
    if batch <= 64:
        return StepConfig(64, 16, line, 1, num_warps, num_stages)
    return StepConfig(64, 32, line, 1, num_warps=8, num_stages=3)


def _why_not(
    x: Tensor, w_hh: Tensor, w_hr: Tensor | None, batch_sizes: Tensor | None, backward: bool
) -> str | None:
    reason = _triton.why_not(x) or per_step.why_not(x, batch_sizes)
    if reason is not None:
        return reason
    if x.dtype == torch.float64:
        return "the fused step does not run in float64"
    if w_hr is not None:
        return "the fused step has no projection"
    config = step_config(x.dtype, x.shape[1], w_hh.shape[2], backward=backward)
    return _triton.why_not_shared(x, config.shared(x.dtype, backward=backward))


def why_not_fwd(gx: Tensor, *args: Any) -> str | None:
    """The reason why `fwd` cannot take the arguments of lstm_recurrence, or None."""
    _, _, w_hh, w_hr, _, batch_sizes, _ = args
    return _why_not(gx, w_hh, w_hr, batch_sizes, backward=False)


def why_not_bwd(*args: Any) -> str | None:
    """The reason why `bwd` cannot take the arguments of lstm_recurrence_bwd, or None."""
    gates, _, _, w_hh, w_hr, _, batch_sizes = args[5:]
    return _why_not(gates, w_hh, w_hr, batch_sizes, backward=True)


def _launch(
    kernel: Any, launches: int, like: Tensor, shape: tuple[int, int, int], config: StepConfig, *args: Any
) -> None:
    """Run a step kernel for step = 0 ... launches - 1; like: a tensor on its device; shape (B, H, D); args: all between.

    Only the first launch looks at its arguments to find the compiled kernel; the others differ in a number that nothing is
    specialised on, and start that kernel directly.
    """
    batch, hidden, directions = shape
    grid = triton.cdiv(batch, config.block_b), triton.cdiv(hidden, config.block_h), directions
    precision, aligned = _triton.precision(like.dtype), hidden % 16 == 0
    args += (precision, aligned, config.block_b, config.block_h, config.block_k, config.parts)
    with torch.cuda.device_of(like):
        launch = kernel[grid]
        compiled = launch(0, *args, num_warps=config.num_warps, num_stages=config.num_stages)
        if not _triton.INTERPRETED:
            launch = partial(compiled[grid], stream=torch.cuda.current_stream().cuda_stream)
        for step in range(1, launches):
            launch(step, *args)


def fwd(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence`: (y, h_n, c_n, gates, c)."""
    n_steps, batch, _ = gx.shape
    directions, four_h, hidden = w_hh.shape
    y = gx.new_empty(n_steps, batch, directions * hidden)
    # c is carried in c_n. Rows that are never active keep h0: no step writes their h_n.
    c_n = c0.clone(memory_format=torch.contiguous_format)
    h_n = h0.new_empty(h0.shape) if lengths is None else h0.clone(memory_format=torch.contiguous_format)
    gates = gx.new_empty((n_steps, batch, directions * four_h) if save_state else (0,))
    c = c0.new_empty((n_steps, batch, directions * hidden) if save_state else (0,))
    if batch == 0:
        return y, h_n, c_n, gates, c
    config = step_config(gx.dtype, batch, hidden, backward=False)
    gx = _triton.near_rows(gx, hidden, config.block_b)
    _launch(
        lstm_recurrence_step_fwd_kernel,
        n_steps,
        gx,
        (batch, hidden, directions),
        config,
        gx,
        _triton.dense(h0, hidden),
        _triton.dense(w_hh, hidden),
        _triton.dense(lengths, hidden),
        y,
        h_n,
        c_n,
        gates if save_state else None,
        c if save_state else None,
        n_steps,
        batch,
        hidden,
        gx.stride(0),
        gx.stride(1),
    )
    return y, h_n, c_n, gates, c


def bwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence_bwd`: (dgx, dh0, dc0, dh), with one launch more than steps; dh is empty."""
    n_steps, batch, _ = gates.shape
    directions, _, hidden = w_hh.shape
    dgx = gates.new_empty(gates.shape)
    dh0 = gates.new_empty(directions, batch, hidden)
    # The gradient of c is carried in dc0.
    dc0 = c0.new_zeros(c0.shape) if dc_n is None else dc_n.clone(memory_format=torch.contiguous_format)
    if batch == 0:
        return dgx, dh0, dc0, gates.new_empty(0)
    config = step_config(gates.dtype, batch, hidden, backward=True)
    dy = None if dy is None else _triton.near_rows(dy, hidden, config.block_b)
    _launch(
        lstm_recurrence_step_bwd_kernel,
        n_steps + 1,
        gates,
        (batch, hidden, directions),
        config,
        dy,
        *(_triton.dense(x, hidden) for x in (dh_n, d_gates, d_c, gates, c, c0, w_hh, lengths)),
        dgx,
        dh0,
        dc0,
        n_steps,
        batch,
        hidden,
        0 if dy is None else dy.stride(0),
        0 if dy is None else dy.stride(1),
    )
    return dgx, dh0, dc0, gates.new_empty(0)
