"""Builds the candidate lists of the operators from what is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ext
from .._library import KERNEL_DTYPES
from ..dispatch import Candidate, absent


def _first(args: tuple[Any, ...]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


def _why_not_dtype(x: Tensor) -> str | None:
    return (
        None
        if x.dtype in KERNEL_DTYPES
        else f"dtype {x.dtype} is not one of float64, float32, float16, bfloat16"
    )


def compiled(device: str, op: str) -> Candidate:
    """The C++ (``cpu``) or CUDA C++ (``cuda``) implementation, ``torch.ops.fuseblock_<device>.<op>``."""
    namespace = f"fuseblock_{device}"
    if not _ext.has(namespace, op):
        return absent(device, _why_not_compiled(device))

    def why_not(*args: Any) -> str | None:
        x = _first(args)
        if x.device.type != device:
            return f"tensors are on {x.device}"
        return _why_not_dtype(x)

    return Candidate(device, getattr(getattr(torch.ops, namespace), op).default, why_not, devices=(device,))


def _why_not_compiled(device: str) -> str:
    return _ext.why_not or f"the compiled library was built without {device} kernels (no nvcc at build time?)"


def cuda_recurrence(op: str) -> tuple[Candidate, ...]:
    """The candidates of ``op``, a member of the family lstm_recurrence, on CUDA C++ kernels."""
    if not _ext.has("fuseblock_cuda", "lstm_step_fwd"):
        return (absent("cuda", _why_not_compiled("cuda")),)
    from ..launch import cuda_lstm_recurrence

    return cuda_lstm_recurrence.candidates(op)


def cpu_batch_norm_act(op: str) -> tuple[Candidate, ...]:
    """The candidates of ``op``, a member of the family batch_norm_act, on C++ kernels."""
    if not _ext.has("fuseblock_cpu", "batch_norm_act"):
        return (absent("cpu", _why_not_compiled("cpu")),)
    from ..launch import cpu_batch_norm_act

    return cpu_batch_norm_act.candidates(op)


def cuda_batch_norm_act(op: str) -> tuple[Candidate, ...]:
    """The candidates of ``op``, a member of the family batch_norm_act, on CUDA C++ kernels."""
    if not _ext.has("fuseblock_cuda", "batch_norm_act_stats"):
        return (absent("cuda", _why_not_compiled("cuda")),)
    from ..launch import cuda_batch_norm_act

    return cuda_batch_norm_act.candidates(op)


def triton(op: str, module: str) -> tuple[Candidate, ...]:
    """The candidates that the launcher ``fuseblock.launch.<module>`` lists for ``op``."""
    if importlib.util.find_spec("triton") is None:
        return (absent("triton", "triton is not installed"),)
    launcher = importlib.import_module(f"fuseblock.launch.{module}")
    return tuple(launcher.candidates(op))


def reference(run: Callable[..., Any]) -> Candidate:
    """Plain PyTorch; it can always run."""
    return Candidate("reference", run, lambda *args: None)
