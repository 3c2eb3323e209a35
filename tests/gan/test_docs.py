"""The examples in the docstrings run and print what they say; what is public is complete."""

from __future__ import annotations

import doctest
import importlib

import pytest

from fuseblock import gan


@pytest.mark.parametrize("name", ["ema", "models"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"{gan.__name__}.{name}"))
    assert result.attempted > 1 and result.failed == 0


def test_every_loss_is_public():
    for name in gan.LOSSES:
        for side in ("discriminator", "generator"):
            function = f"{name.replace('-', '_')}_{side}_loss"
            assert function in gan.__all__ and getattr(gan, function).__doc__
        assert gan.LOSSES[name].__name__ in gan.__all__
    assert all(hasattr(gan, name) for name in gan.__all__)
