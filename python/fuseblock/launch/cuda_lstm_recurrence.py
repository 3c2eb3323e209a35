"""The recurrence on CUDA C++ kernels: whole sequences in one launch where w_hh fits on chip, else step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from .._library import KERNEL_DTYPES
from ..dispatch import Candidate
from . import block_recurrence, per_step

_BATCH_SIZES = {"lstm_recurrence": 6, "lstm_recurrence_bwd": 11, "lstm_recurrence_bwd_bwd": 15}


def _why_not(op: str, *args: Any) -> str | None:
    like = next(x for x in args if isinstance(x, torch.Tensor))
    if like.device.type != "cuda":
        return f"tensors are on {like.device}"
    if like.dtype not in KERNEL_DTYPES:
        return f"dtype {like.dtype} is not one of float64, float32, float16, bfloat16"
    if args[_BATCH_SIZES[op]] is not None:
        return "packed rows (batch_sizes) run on the CPU only; pad them and pass lengths"
    return None


def why_not_block(op: str, *args: Any) -> str | None:
    """The reason why the block tier cannot run ``op`` on these arguments, whatever device they are on, or None."""
    # Both ops with a block tier have ..., w_hh, w_hr, lengths, batch_sizes.
    last = _BATCH_SIZES[op]
    w_hh, w_hr, _, batch_sizes = args[last - 3 : last + 1]
    return block_recurrence.why_not(w_hh.dtype, w_hh.shape[1] // 4, w_hr, batch_sizes)


def _why_not_block_here(op: str, *args: Any) -> str | None:
    like = next(x for x in args if isinstance(x, torch.Tensor))
    return why_not_block(op, *args) if like.device.type == "cuda" else f"tensors are on {like.device}"


def candidates(op: str) -> tuple[Candidate, ...]:
    """How CUDA C++ can run ``op``, a member of the family lstm_recurrence, in order of preference."""
    raw = torch.ops.fuseblock_cuda
    steps = SimpleNamespace(
        step_fwd=raw.lstm_step_fwd.default,
        step_bwd=raw.lstm_step_bwd.default,
        step_bwd_bwd=raw.lstm_step_bwd_bwd.default,
    )
    run = partial(getattr(per_step, op), steps)
    step_by_step = Candidate("cuda", run, partial(_why_not, op), devices=("cuda",), variant="per step")
    if not hasattr(raw, "lstm_block_fwd"):
        return (step_by_step,)  # a library from before the block tier
    blocks = SimpleNamespace(block_fwd=raw.lstm_block_fwd.default, block_bwd=raw.lstm_block_bwd.default)
    return (*block_candidates(op, blocks, partial(_why_not_block_here, op)), step_by_step)


def block_candidates(
    op: str, kernels: block_recurrence.BlockKernels, why_not: Callable[..., str | None]
) -> tuple[Candidate, ...]:
    """The block tier, for the orders of derivative that it has (see `block_recurrence`)."""
    if not hasattr(block_recurrence, op):
        reason = "the block tier has first derivatives only: a second-order sweep needs w_hh and its transpose at once"
        return (Candidate("cuda", None, lambda *args: reason, devices=("cuda",), variant="block"),)
    run = partial(getattr(block_recurrence, op), kernels)
    return (Candidate("cuda", run, why_not, devices=("cuda",), variant="block"),)
