"""Regression cases for pytest-benchmark; not part of the default test run.

    python -m pytest benchmarks/test_regression.py --benchmark-autosave
    python -m pytest benchmarks/test_regression.py --benchmark-compare --benchmark-compare-fail=median:10%

Run from the repository root on a quiet machine. Each group holds one case and mode, stock beside fuseblock. What
is compared with the saved run should be fuseblock's share of stock's time where the machine has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Case, longest_sum
from benchmarks.parity import check
from benchmarks.providers import BASE, OURS, PROVIDERS
from benchmarks.workloads import make_problem

pytest.importorskip("pytest_benchmark")

_PROVIDERS = {provider.name: provider for provider in PROVIDERS if provider.name in (BASE, OURS)}
_RUNS = [(case, mode) for case in CASES if case.quick or case.name == "hidden-64-b16" for mode in case.modes]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("provider", list(_PROVIDERS))
@pytest.mark.parametrize(("case", "mode"), _RUNS, ids=[f"{case.name}-{mode}" for case, mode in _RUNS])
def test_time(benchmark: Callable[..., Any], case: Case, mode: str, provider: str) -> None:
    """Time one step; its results must pass the parity gate first."""
    problem = make_problem(case, dtype=torch.float32, device="cpu", seed=0)
    stock, _ = _PROVIDERS[BASE].step(problem, mode)
    reference, _ = _PROVIDERS[BASE].step(problem.to(torch.float64), mode)
    step, context = _PROVIDERS[provider].step(problem, mode)
    with context():
        verdict = check(step(), reference(), stock(), dtype=torch.float32, terms=longest_sum(case))
    assert verdict.green, verdict
    benchmark.group = f"{case.name} {mode}"  # type: ignore[attr-defined]
    benchmark.extra_info["size"] = case.size  # type: ignore[attr-defined]
    with context():
        benchmark(step)
