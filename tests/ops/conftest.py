"""Fixtures of the operator tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..backends import NAMES, Forced, available


@pytest.fixture(params=NAMES)
def forced(request: pytest.FixtureRequest) -> Iterator[Forced]:
    """The raw operators on each backend in turn; a test module may need one FAMILY of emulated kernels only."""
    with available(request.param, getattr(request.module, "FAMILY", None)) as operators:
        yield operators
