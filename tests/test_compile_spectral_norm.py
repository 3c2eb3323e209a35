"""The Triton kernels of spectral_norm compile for GPUs without spilling. No GPU is needed: see triton_aot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fuseblock.kernels import spectral_norm as kernels

from fuseblock.launch.triton_spectral_norm import GPU_BLOCKS, MAX_LAYERS, WARPS

from .test_compile_triton import ARCHITECTURES, STATE, compile_without_spills

KERNELS = tuple(name for name in vars(kernels) if name.endswith("_kernel"))
WEIGHTS = {"ws", "us", "vs", "ys", "dys", "dws"}


def _job(kernel: str, arch: int, dtype: str, layers: int, general: bool = False) -> dict[str, Any]:
    """A model of so many layers; ``general``: with transposed convolutions and channels-last weights."""
    names = getattr(kernels, kernel).arg_names
    values = {**GPU_BLOCKS, "FIRST": False, "ITERATE": True, "EPS": 1e-12, "DTYPE": STATE[dtype]}
    constants: dict[str, Any] = {name: value for name, value in values.items() if name in names}
    if not general:
        constants |= {"lengths": None, "taps": None}
    signature: dict[str, Any] = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in WEIGHTS:
            signature[name] = [f"*{dtype}"] * layers
        elif name == "states":
            signature[name] = [f"*{STATE[dtype]}"] * layers
        else:
            signature[name] = f"*{STATE[dtype]}" if name.endswith("_ptr") else ["i32"] * layers
    # The last layer has one output.
    ones = [[name, layers - 1] for name in ("rows", "taps") if name not in constants]
    for name, n in ones:
        signature[name][n] = "constexpr"
    return {
        "name": f"{kernel} sm_{arch} {dtype} layers={layers} general={general}",
        "module": kernels.__name__,
        "kernel": kernel,
        "arch": arch,
        "signature": signature,
        "constants": constants,
        "ones": ones,
        "divisible": [[name, n] for name in names if name in WEIGHTS for n in range(layers)],
        "options": {"num_warps": WARPS},
    }


def _jobs() -> Iterator[dict[str, Any]]:
    for kernel in KERNELS:
        for arch in ARCHITECTURES:
            yield _job(kernel, arch, "fp32", 4)
    for kernel in ("spectral_norm_columns_kernel", "spectral_norm_gradient_kernel"):
        yield _job(kernel, 90, "fp64", 2, general=True)
        yield _job(kernel, 90, "bf16", 2)
    yield _job("spectral_norm_scale_kernel", 90, "fp32", MAX_LAYERS, general=True)


def test_kernels_do_not_spill(tmp_path: Path, record_property: Any) -> None:
    results, _ = compile_without_spills(list(_jobs()), tmp_path, record_property)
    narrow = [r["name"] for r in results if "general=False" in r["name"] and not r["wide"]]
    assert not narrow, f"narrow accesses: {narrow}"
