"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

import fuseblock


@pytest.mark.parametrize("name", ["nn.lstm", "nn.lstm_cell", "fuse"])
def test_examples(name: str) -> None:
    # By its full name: the package's attribute `fuse` is the function.
    module = importlib.import_module(f"{fuseblock.__name__}.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 3 and result.failed == 0
