"""The backends that the module tests run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuseblock import backend

from ..backends import DEVICE, available


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `engine`: the backends of a CPU-only machine, and those that ``also_on`` adds to a test."""
    if "engine" in metafunc.fixturenames:
        added = [name for mark in metafunc.definition.iter_markers("also_on") for name in mark.args]
        metafunc.parametrize("engine", ["auto", "reference", "cpu", *added], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once as a user would and once on each of its backends, always on CPU tensors."""
    if request.param in ("triton", "cuda") and DEVICE == "cuda":
        pytest.skip("it is neither interpreted nor emulated on this machine")
    with available(request.param), backend(request.param):
        yield request.param
