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
from types import ModuleType

import pytest

from .build import ROOT, Unavailable, build
from .lstm_gates import EmulatedCuda

__all__ = ["EmulatedCuda", "load"]

_HERE = ROOT / "tests" / "emulator"


@functools.cache
def load(variant: str | None = None) -> EmulatedCuda:
    """The emulated kernels. Skips the running test, saying why, where they cannot be built.

    Args:
        variant: ``plain``, or ``asan`` / ``tsan`` in a process that was started with the sanitizer's library preloaded.
            Default: the environment variable FUSEBLOCK_EMULATOR_VARIANT, else ``plain``.
    """
    variant = variant or os.environ.get("FUSEBLOCK_EMULATOR_VARIANT", "plain")
    sources = [_HERE / "binding.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    try:
        path = build("emulated_lstm_gates", sources, module=True, variant=variant)
    except Unavailable as reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")
    return EmulatedCuda(_import(path))


def _import(path: os.PathLike[str]) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated_lstm_gates", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
