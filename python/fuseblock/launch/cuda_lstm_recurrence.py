"""The recurrence on the CUDA C++ step kernels: one GEMM and one kernel per time step.

Persistent engines, which keep w_hh on chip over all steps, join the list that `candidates` returns, ahead of this one.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ..dispatch import Candidate
from . import per_step

_BATCH_SIZES = {"lstm_recurrence": 6, "lstm_recurrence_bwd": 11, "lstm_recurrence_bwd_bwd": 15}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _why_not(op: str, *args: Any) -> str | None:
    like = next(x for x in args if isinstance(x, torch.Tensor))
    if like.device.type != "cuda":
        return f"tensors are on {like.device}"
    if like.dtype not in _DTYPES:
        return f"dtype {like.dtype} is not one of float64, float32, float16, bfloat16"
    if args[_BATCH_SIZES[op]] is not None:
        return "packed rows (batch_sizes) run on the CPU only; pad them and pass lengths"
    return None


def candidates(op: str) -> tuple[Candidate, ...]:
    """How CUDA C++ can run ``op``, a member of the family lstm_recurrence, in order of preference."""
    raw = torch.ops.fuseblock_cuda
    steps = SimpleNamespace(
        step_fwd=raw.lstm_step_fwd.default,
        step_bwd=raw.lstm_step_bwd.default,
        step_bwd_bwd=raw.lstm_step_bwd_bwd.default,
    )
    run = partial(getattr(per_step, op), steps)
    return (Candidate("cuda", run, partial(_why_not, op), devices=("cuda",), variant="per step"),)
