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
    shown = f"{factors} channels_last={channels_last} far={far}"
    return _typed(kernel, arch, dtype, constants, shown)


def _row_job(
    arch: int, dtype: str, factors: tuple[int, int], taps: tuple[int, int] = (4, 4)
) -> dict[str, Any]:
    """The kernel of rows, NCHW; what taps meet is not aligned."""
    (up, down), (taps_y, taps_x), n = factors, taps, 128 // int(dtype[-2:])
    block_m, _ = gpu_blocks(1, n)
    constants: dict[str, Any] = {"UP_X": up, "UP_Y": up, "DOWN_X": down, "DOWN_Y": down}
    constants |= {"TAPS_X": taps_x, "TAPS_Y": taps_y, "START": n - 1, "TILE_Y": TILES[factors][1], "N": n}
    constants |= {
        "FLIP": False,
        "GAIN": 4.0,
        "INDEX64": dtype == "fp64",
        "DTYPE": STATE[dtype],
        "BLOCK_M": block_m,
    }
    return _typed("upfirdn2d_row_kernel", arch, dtype, constants, f"{factors} {taps}")


def _typed(kernel: str, arch: int, dtype: str, constants: dict[str, Any], shown: str) -> dict[str, Any]:
    """A job of triton_aot; pointers are aligned, and so is the number of channels."""
    pointers = {"x_ptr": f"*{dtype}", "f_ptr": f"*{STATE[dtype]}", "y_ptr": f"*{dtype}"}
    names = getattr(kernels, kernel).arg_names
    return {
        "name": f"{kernel} sm_{arch} {dtype} {shown}",
        "module": kernels.__name__,
        "kernel": kernel,
        "arch": arch,
        "signature": {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names},
        "constants": constants,
        "divisible": [n for n in names if n in {*pointers, "channels"} - constants.keys()],
        "options": {"num_warps": WARPS},
    }


def _usual_jobs() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        yield _row_job(arch, "bf16", (1, 1))
    yield _row_job(90, "bf16", (2, 1))
    yield _job(90, "bf16", (1, 2), channels_last=True)
    yield _job(90, "bf16", None, channels_last=True)


def _other_jobs() -> Iterator[dict[str, Any]]:
    for factors in TILES.keys() - {(1, 2)}:
        yield _job(90, "bf16", factors, channels_last=True)
    for factors in ((1, 1), None):
        for arch in ARCHITECTURES:
            if arch != 90:
                yield _job(arch, "bf16", factors, channels_last=True)
        yield _job(90, "bf16", factors, channels_last=False)
        yield _job(90, "fp64", factors, channels_last=True)
        yield _job(90, "fp32", factors, channels_last=True, far=True)
    yield _row_job(90, "bf16", (1, 2))
    yield _row_job(90, "fp64", (2, 1))
    yield _row_job(90, "bf16", (1, 1), taps=(1, 12))


def _jobs() -> Iterator[dict[str, Any]]:
    yield from _usual_jobs()
    yield from _other_jobs()


@pytest.mark.parametrize(
    "jobs",
    [list(_usual_jobs()), pytest.param(list(_other_jobs()), marks=pytest.mark.slow)],
    ids=["usual", "others"],
)
def test_kernels_do_not_spill(jobs: list[dict[str, Any]], tmp_path: Path, record_property: Any) -> None:
    results, report = compile_without_spills(jobs, tmp_path, record_property)
    narrow = {}
    for job, result in zip(jobs, results, strict=True):
        # What a vector of y is upsampled from is a shorter one of x.
        least = 16 // job["constants"].get("UP_X", 1)
        accesses = result["loads"], result["stores"]
        if "channels_last=False" not in job["name"] and (accesses[0] < least or accesses[1] < 16):
            narrow[job["name"]] = accesses
    assert not narrow, f"bytes of the widest loads and stores: {narrow}\n{report}"
    assert not any(result["shared"] for result in results), f"elements leave their threads:\n{report}"
