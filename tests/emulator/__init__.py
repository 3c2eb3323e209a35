"""The CUDA kernels on CPU tensors: csrc/cuda compiled by g++ and run by the emulator in ``runtime/``.

``load()`` returns an object with the operators of the ``cuda`` backend that is a step namespace too, so that a test can
treat the kernels as one more backend::

    cuda = emulator.load()
    h, c_new = cuda.lstm_gates(gates, c)
    y, h_n, c_n, gates, c = per_step.lstm_recurrence(cuda, gx, h0, c0, w_hh, None, lengths, None, True)
"""

from __future__ import annotations

import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fuseblock.launch import resident_recurrence

from .batch_norm_act import EmulatedBatchNormAct
from .bias_act import EmulatedBiasAct
from .build import ROOT, Unavailable, build
from .lstm_gates import EmulatedCuda
from .lstm_recurrence import EmulatedRecurrence
from .upfirdn2d import EmulatedUpfirdn2d

__all__ = ["EmulatedCuda", "EmulatedRecurrence", "load", "load_recurrence"]

_HERE = ROOT / "tests" / "emulator"

#: The families of kernels that are a module each, and their bindings.
FAMILIES = {
    "lstm_gates": "binding.cpp",
    "batch_norm_act": "binding_batch_norm_act.cpp",
    "bias_act": "binding_bias_act.cpp",
    "upfirdn2d": "binding_upfirdn2d.cpp",
}
#: The families that need no other, and their operators.
OPERATORS = {
    "batch_norm_act": EmulatedBatchNormAct,
    "bias_act": EmulatedBiasAct,
    "upfirdn2d": EmulatedUpfirdn2d,
}


@functools.cache
def load(variant: str | None = None) -> EmulatedCuda:
    """The emulated kernels. Skips the running test, saying why, where they cannot be built.

    Args:
        variant: ``plain``, ``counted`` (see tests/traffic.py), or ``asan`` / ``tsan`` in a process that was started with the
            sanitizer's library preloaded.
            Default: the environment variable FUSEBLOCK_EMULATOR_VARIANT, else ``plain``.
    """
    variant = variant or os.environ.get("FUSEBLOCK_EMULATOR_VARIANT", "plain")
    with ThreadPoolExecutor() as pool:
        gates, *_ = pool.map(lambda family: load_family(family, variant), FAMILIES)
    kernels = EmulatedCuda(gates, load_norm(variant), load_operators("bias_act", variant))
    kernels.upfirdn2d = load_operators("upfirdn2d", variant).upfirdn2d
    kernels.tiers = {tier: load_recurrence(tier, variant) for tier in resident_recurrence.TIERS}
    return kernels


@functools.cache
def load_family(family: str, variant: str) -> ModuleType:
    """The launchers of one of `FAMILIES`."""
    return _module(family, FAMILIES[family], variant)


@functools.cache
def load_operators(family: str, variant: str | None = None) -> Any:
    """The operators of one of `OPERATORS` alone; otherwise like `load`."""
    variant = variant or os.environ.get("FUSEBLOCK_EMULATOR_VARIANT", "plain")
    return OPERATORS[family](load_family(family, variant))


def load_norm(variant: str | None = None) -> EmulatedBatchNormAct:
    """The kernels of batch_norm_act alone; otherwise like `load`."""
    return load_operators("batch_norm_act", variant)


@functools.cache
def load_recurrence(tier: str, variant: str | None = None) -> EmulatedRecurrence:
    """The kernels of one tier of the recurrence alone, e.g. ``block``; otherwise like `load`."""
    variant = variant or os.environ.get("FUSEBLOCK_EMULATOR_VARIANT", "plain")
    name = f"lstm_recurrence_{tier}"
    return EmulatedRecurrence(_module(name, "binding_lstm_recurrence.cpp", variant, (f"FB_TIER={tier}",)))


def _module(op: str, binding: str, variant: str, defines: tuple[str, ...] = ()) -> ModuleType:
    """The launchers of csrc/cuda/<op>*.cu as a Python module of their own: one emulator each."""
    kernels = ROOT / "csrc" / "cuda"
    # A copy of the project that holds mutants chooses among them in a file of its own.
    sources = [*sorted(kernels.glob(f"{op}*.cu")), *kernels.glob("mutants.cu")]
    try:
        path = build(f"emulated_{op}", sources, binding=_HERE / binding, variant=variant, defines=defines)
    except Unavailable as reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")
    return _import(f"emulated_{op}", path)


def _import(name: str, path: os.PathLike[str]) -> ModuleType:
    # pybind11 gives what it has loaded under the same name before, whatever the path: variants need names of their own.
    spec = importlib.util.spec_from_file_location(f"{Path(path).parent.name}.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
