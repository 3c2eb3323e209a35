"""Matrix fragments and asynchronous copies in the emulator: right kernels give right values, broken ones are noticed."""

from __future__ import annotations

import pytest

from .test_emulator import run

CORRECT = {
    "product_half": "0",
    "product_half_row_major": "0",
    "product_bfloat16": "0",
    "product_bfloat16_row_major": "0",
    "product_tf32": "0",
    "product_tf32_truncated": "0",
    "transpose": "transposed",
    "stream": "right",
    "producer": "right",
}
#: Wrong values for some order of events; the mistakes below are reported for every one.
WRONG = ["copy_without_wait", "copy_waits_for_too_few", "copy_without_barrier"]


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels(name: str) -> None:
    status, output = run(name, seeds=8)
    assert (status, set(output.splitlines())) == (0, {CORRECT[name]})


@pytest.mark.parametrize("name", WRONG)
def test_copies_that_are_not_waited_for_arrive_too_late(name: str) -> None:
    assert run(name) == (0, "wrong")
    assert run(name, seed=1, seeds=8)[1].splitlines().count("wrong") >= 4


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("copy_misaligned", "is not a multiple of 16"),
        ("copy_outside", "are not in the block's shared memory"),
        ("copy_left", "a thread returns while its cp.async is under way"),
        ("producer_missing_arrival", "barrier.sync was not reached by all threads (32 of 128 wait)"),
        ("producer_barrier_missing", "barrier.sync was not reached by all threads (64 of 128 wait)"),
        ("producer_unequal_counts", "barrier.sync: named barrier 1 is for"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mistakes_are_reported(name: str, complaint: str, seed: int) -> None:
    status, output = run(name, seed=seed)
    assert status == 1
    assert complaint in output


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_accept_correct_kernels(variant: str, name: str) -> None:
    assert run(name, variant=variant, seed=1) == (0, CORRECT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_thread_sanitizer_sees_missing_waits(name: str) -> None:
    status, output = run(name, variant="tsan")
    assert status == 66
    assert "data race" in output
