"""Host side of the Triton kernels in kernels/lstm_gates.py: the op `lstm_gates` and the recurrence's step namespace.

This module is itself a step namespace (`per_step.StepKernels`): step_fwd, step_bwd, step_bwd_bwd.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import triton
from torch import Tensor

from fuseblock.kernels.lstm_gates import (
    lstm_gates_bwd_bwd_kernel,
    lstm_gates_bwd_kernel,
    lstm_gates_fwd_kernel,
)

from ..dispatch import Candidate
from . import _triton


def why_not(*args: Any) -> str | None:
    """The reason why the functions of this module cannot take the arguments of an op of the family, or None.

    gates and c are the last two arguments of each of them.
    """
    return _triton.why_not(args[-2])


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`: lstm_gates, lstm_gates_bwd or lstm_gates_bwd_bwd."""
    return (Candidate("triton", globals()[op], why_not, devices=_triton.DEVICES),)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    t: int,
    math_like: Tensor,
    hidden: int,
    **constants: bool,
) -> None:
    """Run a step kernel on (rows, columns) tensors, given in the order of its pointers."""
    rows = math_like.shape[0]
    if rows == 0 or hidden == 0:
        return
    block_r, block_h = _triton.step_blocks(rows, hidden)
    aligned = _triton.aligned(hidden, tensors)
    kernel[(triton.cdiv(rows, block_r), triton.cdiv(hidden, block_h))](
        *tensors,
        lengths,
        rows,
        hidden,
        t,
        *(0 if x is None else x.stride(0) for x in tensors),
        **constants,
        DTYPE=_triton.math_dtype(math_like),
        ALIGNED=aligned,
        BLOCK_R=block_r,
        BLOCK_H=block_h,
        num_warps=_triton.step_warps(aligned),
    )


def step_fwd(
    pre: Tensor,
    c_prev: Tensor,
    h_out: Tensor,
    c_out: Tensor,
    acts_out: Tensor | None,
    lengths: Tensor | None,
    t: int,
    h_state: Tensor | None,
) -> None:
    """See `per_step.StepKernels.step_fwd`."""
    tensors = (pre, c_prev, h_out, c_out, acts_out, h_state)
    _launch(lstm_gates_fwd_kernel, tensors, lengths, t, pre, c_prev.shape[1])


def step_bwd(
    acts: Tensor,
    c_prev: Tensor,
    c_new: Tensor,
    dm: Tensor | None,
    dc: Tensor | None,
    ext: Tensor | None,
    lengths: Tensor | None,
    t: int,
    delta_out: Tensor | None,
    dc_prev_out: Tensor,
    dm_keep: Tensor | None,
    dc_total_out: Tensor | None,
    dy: Tensor | None,
    d_c: Tensor | None,
) -> None:
    """See `per_step.StepKernels.step_bwd`."""
    tensors = (acts, c_prev, c_new, dm, dy, dc, d_c, ext, delta_out, dc_prev_out, dm_keep, dc_total_out)
    _launch(lstm_gates_bwd_kernel, tensors, lengths, t, acts, c_prev.shape[1], FROM_PRE=False)


def step_bwd_bwd(
    acts: Tensor,
    c_prev: Tensor,
    c_new: Tensor,
    dm: Tensor | None,
    dc_total: Tensor,
    ext: Tensor | None,
    v: Tensor | None,
    v_dc_prev: Tensor | None,
    lengths: Tensor | None,
    t: int,
    a_dm_out: Tensor,
    a_dc_out: Tensor,
    a_ext_out: Tensor | None,
    a_acts_out: Tensor,
    a_c_prev_out: Tensor,
    a_c_new_out: Tensor,
    a_dm_state: Tensor | None,
) -> None:
    """See `per_step.StepKernels.step_bwd_bwd`."""
    tensors = (
        acts, c_prev, c_new, dm, dc_total, ext, v, v_dc_prev,
        a_dm_out, a_dc_out, a_ext_out, a_acts_out, a_c_prev_out, a_c_new_out, a_dm_state,
    )  # fmt: skip
    _launch(lstm_gates_bwd_bwd_kernel, tensors, lengths, t, acts, c_prev.shape[1], FROM_PRE=False)


@overload
def _rows(x: Tensor) -> Tensor: ...
@overload
def _rows(x: Tensor | None) -> Tensor | None: ...
def _rows(x: Tensor | None) -> Tensor | None:
    """View or copy x as (rows, columns) with contiguous columns."""
    if x is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def lstm_gates(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Op `lstm_gates`: (h, c_new)."""
    h = torch.empty(c.shape, dtype=gates.dtype, device=gates.device)
    c_new = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    if c.numel():
        gates_rows = _rows(gates)
        tensors = (gates_rows, _rows(c), _rows(h), _rows(c_new), None, None)
        with torch.cuda.device_of(gates):
            _launch(lstm_gates_fwd_kernel, tensors, None, 0, gates_rows, c.shape[-1])
    return h, c_new


def lstm_gates_bwd(
    dh: Tensor | None, dc_new: Tensor | None, gates: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Op `lstm_gates_bwd`: (dgates, dc)."""
    dgates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    dc = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    if c.numel():
        gates_rows = _rows(gates)
        tensors = (
            gates_rows, _rows(c), None, _rows(dh), None, _rows(dc_new), None, None,
            _rows(dgates), _rows(dc), None, None,
        )  # fmt: skip
        with torch.cuda.device_of(gates):
            _launch(lstm_gates_bwd_kernel, tensors, None, 0, gates_rows, c.shape[-1], FROM_PRE=True)
    return dgates, dc


def lstm_gates_bwd_bwd(
    v_dgates: Tensor | None,
    v_dc: Tensor | None,
    dh: Tensor | None,
    dc_new: Tensor | None,
    gates: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_gates_bwd_bwd`: (a_dh, a_dc_new, a_gates, a_c)."""
    a_dh = torch.empty(c.shape, dtype=gates.dtype, device=gates.device)
    a_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    a_dc_new, a_c = (torch.empty(c.shape, dtype=c.dtype, device=c.device) for _ in range(2))
    if c.numel():
        gates_rows = _rows(gates)
        tensors = (
            gates_rows, _rows(c), None, _rows(dh), _rows(dc_new), None, _rows(v_dgates), _rows(v_dc),
            _rows(a_dh), _rows(a_dc_new), None, _rows(a_gates), _rows(a_c), None, None,
        )  # fmt: skip
        with torch.cuda.device_of(gates):
            _launch(lstm_gates_bwd_bwd_kernel, tensors, None, 0, gates_rows, c.shape[-1], FROM_PRE=True)
    return a_dh, a_dc_new, a_gates, a_c
