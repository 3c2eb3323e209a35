"""The recurrence on CUDA C++ kernels: whole sequences in one launch where w_hh fits on chip, else step by step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from .._library import KERNEL_DTYPES
from ..dispatch import Candidate
from . import per_step, resident_recurrence

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


def _why_not_resident(op: str, tier: resident_recurrence.Tier, on_device: bool, *args: Any) -> str | None:
    # Both ops with resident weights have ..., w_hh, w_hr, lengths, batch_sizes.
    last = _BATCH_SIZES[op]
    w_hh, w_hr, _, batch_sizes = args[last - 3 : last + 1]
    if on_device and w_hh.device.type != "cuda":
        return f"tensors are on {w_hh.device}"
    return tier.why_not(w_hh, w_hr, batch_sizes, resident_recurrence.gpu_of(w_hh))


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
    tiers = {
        tier: SimpleNamespace(
            fwd=getattr(raw, f"lstm_{tier}_fwd").default, bwd=getattr(raw, f"lstm_{tier}_bwd").default
        )
        for tier in resident_recurrence.TIERS
        if hasattr(raw, f"lstm_{tier}_fwd")  # else the library is from before that tier
    }
    return (*resident_candidates(op, tiers, on_device=True), step_by_step)


def resident_candidates(
    op: str, kernels: Mapping[str, resident_recurrence.ResidentKernels], *, on_device: bool = False
) -> tuple[Candidate, ...]:
    """The tiers with resident weights, for the orders of derivative that they have, in order of preference.

    Args:
        op: a member of the family lstm_recurrence.
        kernels: by the names of `resident_recurrence.TIERS`.
        on_device: decline CPU tensors, which only emulated kernels take.
    """
    if not hasattr(resident_recurrence, op):
        reason = "first derivatives only: a second-order sweep needs w_hh and its transpose at once"
        return tuple(Candidate("cuda", None, lambda *args: reason, ("cuda",), tier) for tier in kernels)
    found = []
    for name, namespace in kernels.items():
        tier = resident_recurrence.TIERS[name]
        run = partial(getattr(resident_recurrence, op), tier, namespace)
        why_not = partial(_why_not_resident, op, tier, on_device)
        found.append(Candidate("cuda", run, why_not, devices=("cuda",), variant=name))
    return tuple(found)
