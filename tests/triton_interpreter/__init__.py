"""Triton's CPU interpreter, hardened for tests.

Triton's own interpreter runs kernels with NumPy when TRITON_INTERPRET=1 is set before they are decorated. On top of it,
`install()` gives

* right results for bfloat16: the stock casts truncate, tl.dot multiplies the bit patterns, atomic_add refuses;
* what the CUDA backend refuses, refused: tl.dot with an inner dimension below 16;
* detection of out-of-bounds loads, stores and atomics, per tensor view: `OutOfBoundsError` instead of a corrupted heap;
* programs that take turns at atomics, so that kernels which wait for each other run: see `program_order`;
* sums of tiles as trees, as GPUs add, not one by one;
* loops over run-time ranges with NumPy 2.4 and newer, autotuned kernels without a GPU, and cheaper nested @jit calls.

It patches private names of Triton; it was written for 3.6.0. TF32 rounding is not modelled.
"""

from __future__ import annotations

import os
import sys

from ._errors import LivelockError, OutOfBoundsError

__all__ = ["LivelockError", "OutOfBoundsError", "install", "program_order"]


_installed = False


def install() -> None:
    """Switch the interpreter on and harden it; further calls do nothing.

    Unless TRITON_INTERPRET=1 is in the environment already, call it before any module with Triton kernels is imported.
    """
    global _installed
    if _installed:
        return
    _installed = True
    if os.environ.get("TRITON_INTERPRET") != "1" and any(
        m.startswith("fuseblock.kernels.") for m in sys.modules
    ):
        raise RuntimeError("Triton kernels were decorated before the interpreter was switched on")
    os.environ["TRITON_INTERPRET"] = "1"
    from . import _arithmetic, _bounds, _programs

    _arithmetic.install()
    _bounds.install()
    _programs.install()


def program_order(order: str, seed: int = 0):  # type: ignore[no-untyped-def]
    """Context in which the programs of a launch are resumed in this order: "fifo" (default), "lifo" or "random"."""
    from . import _programs

    return _programs.program_order(order, seed)
