"""The backends that a test can run an operator on here, each behind `fuseblock.backend(name)`.

Without a GPU, ``triton`` runs in Triton's interpreter and ``cuda`` in the CUDA-on-CPU emulator, both on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fuseblock
from fuseblock import _ext, dispatch, ops
from fuseblock.launch import per_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("reference", "cpu", "triton", "cuda") if DEVICE == "cpu" else ("reference", "triton", "cuda")
FAMILY = ("", "_bwd", "_bwd_bwd")


class Forced:
    """The raw operators, run by one backend."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, op: str) -> Any:
        def call(*args: Any) -> Any:
            with fuseblock.backend(self.name):
                return getattr(ops, op)(*args)

        return call


@contextmanager
def available(name: str) -> Iterator[Forced]:
    """Run the operators on backend ``name``, emulated or interpreted where there is no GPU; skip if that is impossible."""
    if name == "cpu" and _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    if name == "triton":
        pytest.importorskip("triton")
        if DEVICE == "cpu":
            from .triton_interpreter import install

            install()
    if name == "cuda" and DEVICE == "cpu":
        with _emulated_cuda():
            yield Forced(name)
        return
    yield Forced(name)


@contextmanager
def _emulated_cuda() -> Iterator[None]:
    """Put the emulated CUDA kernels in the place of the compiled ones."""
    from .emulator import load

    kernels = load()
    before = {op: dispatch.candidates(op) for op in dispatch.operators()}

    def emulated(op: str) -> dispatch.Candidate:
        run = getattr(kernels, op, None)
        if run is None:
            driver = getattr(per_step, op)

            def run(*args: Any) -> Any:
                return driver(kernels, *args)

        return dispatch.Candidate("cuda", run, lambda *args: None)

    for op, candidates in before.items():
        dispatch.register(op, *(emulated(op) if c.name == "cuda" else c for c in candidates))
    try:
        yield
    finally:
        for op, candidates in before.items():
            dispatch.register(op, *candidates)
