from __future__ import annotations

import pytest

from . import EmulatedCuda, load


@pytest.fixture(scope="session")
def emulated_cuda() -> EmulatedCuda:
    """The emulated CUDA kernels."""
    return load()
