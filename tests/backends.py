"""The backends that a test can run an operator on here, each behind `fuseblock.backend(name)`.

Without a GPU, ``triton`` runs in Triton's interpreter and ``cuda`` in the CUDA-on-CPU emulator, both on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

import fuseblock
from fuseblock import _ext, dispatch, ops
from fuseblock.launch import cuda_lstm_recurrence, per_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
NAMES = ["reference", "cpu", pytest.param("triton", marks=_ON_GPU), pytest.param("cuda", marks=_ON_GPU)]


class Forced:
    """The raw operators, run by one backend; CPU tensors are moved to the device of the backend and back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = DEVICE if name in ("triton", "cuda") else "cpu"

    def __getattr__(self, op: str) -> Any:
        def call(*args: Any) -> Any:
            with fuseblock.backend(self.name):
                outputs = getattr(ops, op)(*map(self._moved, args))
            return tuple(x.cpu() for x in outputs)

        return call

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or self.device == "cpu":
            return x
        # Strides are part of what is tested, and Tensor.to keeps those of dense tensors only.
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        return moved.copy_(x) if 0 not in x.stride() else x.to(self.device)


@contextmanager
def available(name: str, family: str | None = None) -> Iterator[Forced]:
    """Run the operators on backend ``name``, emulated or interpreted where there is no GPU; skip if that is impossible.

    Of CUDA's kernels, those of one family of `emulator.OPERATORS` do where no others are needed.
    """
    if name == "cpu" and _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    if name == "triton":
        pytest.importorskip("triton")
        if DEVICE == "cpu":
            from .triton_interpreter import install

            install()
    if name == "cuda" and DEVICE == "cpu":
        from .emulator import load, load_operators

        with emulating(load() if family is None else load_operators(family)):
            yield Forced(name)
        return
    yield Forced(name)


@contextmanager
def emulating(kernels: Any) -> Iterator[None]:
    """Put emulated CUDA kernels in the place of the compiled ones."""
    steps = per_step if hasattr(kernels, "lstm_gates") else None
    emulates = [op for op in dispatch.operators() if hasattr(kernels, op) or hasattr(steps, op)]
    before = {op: dispatch.candidates(op) for op in emulates}

    def emulated(op: str) -> list[dispatch.Candidate]:
        run = getattr(kernels, op, None)
        if run is not None:
            return [dispatch.Candidate("cuda", run, lambda *args: None)]
        step_by_step = dispatch.Candidate(
            "cuda", partial(getattr(per_step, op), kernels), lambda *args: None, variant="per step"
        )
        return [*cuda_lstm_recurrence.resident_candidates(op, kernels.tiers), step_by_step]

    def replaced(op: str, candidates: tuple[dispatch.Candidate, ...]) -> list[dispatch.Candidate]:
        first = next(n for n, c in enumerate(candidates) if c.name == "cuda")
        others = [c for c in candidates[first:] if c.name != "cuda"]
        return [*candidates[:first], *emulated(op), *others]

    for op, candidates in before.items():
        dispatch.register(op, *replaced(op, candidates))
    try:
        yield
    finally:
        for op, candidates in before.items():
            dispatch.register(op, *candidates)
