"""Tests of CUDA kernels again, with the kernels built for AddressSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .build import ROOT


def library(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{name} was not found")
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("variant", "selection"), [("asan", "float16 and (33 or 8 or 129)"), ("tsan", "inputs")]
)
def test_step_kernels(variant: str, selection: str) -> None:
    run_tests("tests/emulator/test_lstm_gates_emulated.py", variant, selection)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("variant", "selection"), [("asan", "parity and not 33 and not every"), ("tsan", "any_order")]
)
def test_block_tier(variant: str, selection: str) -> None:
    run_tests("tests/ops/test_lstm_recurrence_block.py", variant, selection)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("variant", "selection"),
    [("asan", "layouts or (parity and not 33 and not every)"), ("tsan", "any_order")],
)
def test_block_tiers_layers(variant: str, selection: str) -> None:
    run_tests("tests/ops/test_lstm_layer_cuda.py", variant, selection)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("variant", "selection"), [("asan", "parity and not 33 and not every"), ("tsan", "any_order and 24-132")]
)
def test_cluster_tier(variant: str, selection: str) -> None:
    run_tests("tests/ops/test_lstm_recurrence_cluster.py", variant, selection)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("variant", "selection"),
    [("asan", "parity and not 33 and not every"), ("tsan", "any_order and 2-17-40-1")],
)
def test_grid_tier(variant: str, selection: str) -> None:
    run_tests("tests/ops/test_lstm_recurrence_grid.py", variant, selection)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("file", "variant", "selection"),
    [
        ("whole", "asan", "shared_memory or several or room"),
        ("whole", "tsan", "order"),
        ("kernels", "asan", "cuda and (values or several_blocks)"),
        ("kernels", "tsan", "order and not triton"),
    ],
)
def test_norms(file: str, variant: str, selection: str) -> None:
    run_tests(f"tests/ops/test_batch_norm_act_{file}.py", variant, selection)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "variant", "selection"),
    [
        ("bias_act", "asan", "shapes or values"),
        ("bias_act", "tsan", "shapes and prelu"),
        ("upfirdn2d", "asan", "values"),
        ("upfirdn2d", "tsan", "values"),
    ],
)
def test_bias_and_images(family: str, variant: str, selection: str) -> None:
    run_tests(f"tests/ops/test_{family}.py", variant, f"cuda and ({selection})")


def run_tests(file: str, variant: str, selection: str) -> None:
    """Run the selected tests of a file with the kernels built for a sanitizer."""
    # The C++ library must be there when the sanitizer starts, or it cannot follow exceptions.
    preload = f"{library(f'lib{variant}.so')}:{library('libstdc++.so')}"
    settings = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66",
        "FUSEBLOCK_EMULATOR_VARIANT": variant,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
    done = subprocess.run(
        [*command, "--capture=sys", file],  # a report that ends the process is seen
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
