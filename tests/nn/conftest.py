"""The backends that the module tests run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuseblock import _ext, backend


@pytest.fixture(params=["auto", "reference", "cpu"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once as a user would and once on each backend that a CPU-only machine has."""
    if request.param == "cpu" and not _ext.has("fuseblock_cpu", "lstm_recurrence"):
        pytest.skip(_ext.why_not or "the compiled library has no CPU kernels")
    with backend(request.param):
        yield request.param
