"""The recurrence on CUDA C++ kernels: whole sequences in one launch where w_hh fits on chip, else step by step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

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


def _why_not_resident(
    op: str,
    tier: resident_recurrence.Tier,
    kernels: resident_recurrence.ResidentKernels,
    on_device: bool,
    *args: Any,
) -> str | None:
    # Both ops with resident weights have ..., w_hh, w_hr, lengths, batch_sizes.
    last = _BATCH_SIZES[op]
    w_hh, w_hr, _, batch_sizes = args[last - 3 : last + 1]
    if on_device and w_hh.device.type != "cuda":
        return f"tensors are on {w_hh.device}"
    gpu = resident_recurrence.gpu_of(w_hh)
    reason = tier.why_not(w_hh, w_hr, batch_sizes, gpu)
    if reason is None and hasattr(kernels, "resident"):
        hidden, backward = w_hh.shape[-2] // 4, op.endswith("_bwd")
        if kernels.resident(w_hh, backward) < tier.least_blocks(w_hh.dtype, hidden, backward, gpu):
            return f"the {tier.name} tier's blocks for H = {hidden} cannot run at the same time on {gpu.name}"
    return reason


def _asked_once(resident: Callable[[torch.Tensor, bool], int]) -> Callable[[torch.Tensor, bool], int]:
    """The driver's answer, remembered by what it depends on."""
    answers: dict[tuple[Any, ...], int] = {}

    def answer(w_hh: torch.Tensor, backward: bool) -> int:
        if isinstance(w_hh, FakeTensor):
            return sys.maxsize  # there is no device to ask
        key = (w_hh.device, w_hh.dtype, w_hh.shape[-1], backward)
        if key not in answers:
            answers[key] = resident(w_hh, backward)
        return answers[key]

    return answer


def _compiled(tier: str) -> resident_recurrence.ResidentKernels:
    raw = torch.ops.fuseblock_cuda
    kernels = SimpleNamespace(
        fwd=getattr(raw, f"lstm_{tier}_fwd").default, bwd=getattr(raw, f"lstm_{tier}_bwd").default
    )
    if hasattr(raw, f"lstm_{tier}_resident"):
        kernels.resident = _asked_once(getattr(raw, f"lstm_{tier}_resident").default)
    return kernels


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
        tier: _compiled(tier)
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
        why_not = partial(_why_not_resident, op, tier, namespace, on_device)
        found.append(Candidate("cuda", run, why_not, devices=("cuda",), variant=name))
    return tuple(found)
