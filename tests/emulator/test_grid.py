"""Blocks of one grid that wait for each other: adversarial orders, slow blocks, three launches on one workspace."""

from __future__ import annotations

import pytest

from .test_emulator import run

CORRECT = ["spread", "spread_many_steps", "spread_clusters"]
WRONG = ["grid_no_wait", "grid_waits_for_too_few", "grid_arrive_without_barrier", "grid_no_leave"]


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels(name: str) -> None:
    status, output = run(name, seeds=12)
    assert (status, set(output.splitlines())) == (0, {"right"})


@pytest.mark.parametrize("name", WRONG)
def test_some_order_of_events_shows_mistakes(name: str) -> None:
    status, output = run(name, seed=1, seeds=12)
    assert status == 0
    assert output.splitlines().count("wrong") >= 4


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("grid_no_arrive", "threads wait for a counter to reach 8; it is 7"),
        (
            "grid_leaves_early",
            "deadlock in block (1, 0, 0): 1 threads wait for a counter to reach 20; it is 17",
        ),
        ("grid_ordinary_launch", "1 threads wait for a counter to reach 4; it is"),
        ("grid_sleeps_forever", "threads do nothing but sleep"),
    ],
)
def test_waits_that_never_end_are_reported(name: str, complaint: str) -> None:
    for seed in range(4):
        status, output = run(name, seed=seed)
        assert status == 1
        assert complaint in output


def test_grids_that_do_not_fit_are_refused() -> None:
    """720: cudaErrorCooperativeLaunchTooLarge."""
    assert run("grid_too_large") == (0, "error 720")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spread", "spread_clusters"])
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_accept_correct_kernels(variant: str, name: str) -> None:
    for seed in (0, 1, 2):
        assert run(name, variant=variant, seed=seed) == (0, "right")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid_no_wait", "grid_arrive_without_barrier"])
def test_thread_sanitizer_sees_missing_waits(name: str) -> None:
    status, output = run(name, variant="tsan", seed=1)
    assert status == 66
    assert "data race" in output
