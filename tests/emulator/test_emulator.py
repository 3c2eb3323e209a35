"""The emulator itself: right kernels give right values, broken ones are reported."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .build import ROOT, Unavailable, build

SELF_TEST = ROOT / "tests" / "emulator" / "self_test"
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=0 exitcode=66"}


def program(variant: str) -> Path:
    try:
        # A copy of the project that holds mutants chooses among them in a file of its own.
        sources = [*sorted(SELF_TEST.glob("*.c*")), *(ROOT / "csrc" / "cuda").glob("mutants.cu")]
        return build("self_test", sources, variant=variant)
    except Unavailable as reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")


def run(name: str, *, variant: str = "plain", seed: int = 0, seeds: int = 1) -> tuple[int, str]:
    """Exit status and everything that the self-test printed, with ``seeds`` seeds from ``seed`` on."""
    done = subprocess.run(
        [program(variant), name, str(seed), str(seeds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | SANITIZER_OPTIONS,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


CORRECT = {
    "sum": "1000",
    "ring": "10",
    "mma_half": "0",
    "mma_bfloat16": "0",
    # Halves of the warp reversed by themselves; bits 0, 3, 6, ... voted.
    "half_warps": "15 6 29 20 43 34 57 48 49249249",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels(name: str, seed: int) -> None:
    assert run(name, seed=seed) == (0, CORRECT[name])


def test_seed_shuffles_the_threads() -> None:
    in_order, shuffled = run("order")[1], run("order", seed=1)[1]
    assert in_order == "0 1 2 3 4 5 6 7"
    assert shuffled != in_order
    assert sorted(shuffled.split()) == in_order.split()
    assert run("order", seed=1)[1] == shuffled


def test_missing_barrier_reads_poison() -> None:
    assert run("sum_missing_barrier")[1].removeprefix("-") == "nan"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "divergent_barrier",
            "deadlock in block (0, 0, 0): __syncthreads was not reached by all threads (16 of 32 wait)",
        ),
        ("divergent_collectives", "__syncwarp and __shfl_sync meet: the threads of a warp have diverged"),
        ("foreign_mask", "__shfl_sync: lane 16 is not in its own mask 0x0000ffff"),
        ("source_outside", "__shfl_down_sync reads lane 16, which is not in its mask 0x0000ffff"),
        ("ring_ordinary_launch", "grid.sync() in a launch that is not cooperative"),
    ],
)
def test_mistakes_are_reported(name: str, complaint: str) -> None:
    assert run(name) == (1, f"cuda emulator: {complaint}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_accept_correct_kernels(variant: str, name: str) -> None:
    assert run(name, variant=variant) == (0, CORRECT[name])


@pytest.mark.slow
def test_address_sanitizer_sees_writes_beyond_shared_memory() -> None:
    status, output = run("sum_out_of_bounds", variant="asan")
    assert status != 0
    assert "heap-buffer-overflow" in output
    assert "block_sum_kernel" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("sum_missing_barrier", "block_sum_kernel"), ("ring_missing_grid_barrier", "ring_kernel")],
)
def test_thread_sanitizer_sees_missing_barriers(name: str, kernel: str) -> None:
    status, output = run(name, variant="tsan")
    assert status == 66
    assert "data race" in output
    assert kernel in output
