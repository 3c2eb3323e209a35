"""Fixtures of the operator tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..backends import NAMES, Forced, available


@pytest.fixture(params=NAMES)
def forced(request: pytest.FixtureRequest) -> Iterator[Forced]:
    """The raw operators on each backend in turn."""
    with available(request.param) as operators:
        yield operators
