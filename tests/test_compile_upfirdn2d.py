"""The Triton kernels of upfirdn2d compile for GPUs without spilling. No GPU is needed: see triton_aot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fuseblock.kernels import upfirdn2d as kernels

from fuseblock.launch.triton_upfirdn2d import TILES, WARPS, gpu_blocks

from .test_compile_triton import ARCHITECTURES, STATE, compile_without_spills

CHANNELS = 96


def _job(
    arch: int, dtype: str, factors: tuple[int, int] | None, channels_last: bool, far: bool = False
) -> dict[str, Any]:
    """The tile kernel for (up, down), or the generic one."""
    kernel = "upfirdn2d_kernel" if factors is None else "upfirdn2d_tile_kernel"
    block_m, block_c = gpu_blocks(CHANNELS if channels_last else 1)
    constants: dict[str, Any] = {
        "FLIP": False,
        "GAIN": 4.0,
        "INDEX64": far,
        "DTYPE": STATE[dtype],
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
    }
    if factors is not None:
        tile_x, tile_y = TILES[factors]
        constants |= {"UP": factors[0], "DOWN": factors[1], "TILE_X": tile_x, "TILE_Y": tile_y}
    if not channels_last:
        constants["channels"] = 1
    pointers = {"x_ptr": f"*{dtype}", "f_ptr": f"*{STATE[dtype]}", "y_ptr": f"*{dtype}"}
    names = getattr(kernels, kernel).arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    return {
        "name": f"{kernel} sm_{arch} {dtype} {factors} channels_last={channels_last} far={far}",
        "module": kernels.__name__,
        "kernel": kernel,
        "arch": arch,
        "signature": signature,
        "constants": constants,
        "divisible": [n for n in names if n in {*pointers, "channels"} - constants.keys()],
        "options": {"num_warps": WARPS},
    }


def _jobs() -> Iterator[dict[str, Any]]:
    for factors in (*TILES, None):
        yield _job(90, "bf16", factors, channels_last=True)
    for factors in ((1, 1), None):
        for arch in ARCHITECTURES:
            if arch != 90:
                yield _job(arch, "bf16", factors, channels_last=True)
        yield _job(90, "bf16", factors, channels_last=False)
        yield _job(90, "fp64", factors, channels_last=True)
        yield _job(90, "fp32", factors, channels_last=True, far=True)


def test_kernels_do_not_spill(tmp_path: Path, record_property: Any) -> None:
    results, _ = compile_without_spills(list(_jobs()), tmp_path, record_property)
    narrow = [r["name"] for r in results if "channels_last=True" in r["name"] and not r["wide"]]
    assert not narrow, f"narrow accesses: {narrow}"
