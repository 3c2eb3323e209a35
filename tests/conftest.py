"""Set-up that every test relies on."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# The kernels are interpreted unless a GPU is there to compile them for; Triton reads this when it decorates them.
if "TRITON_INTERPRET" not in os.environ:
    import torch

    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU tensors on one backend, an indirect parameter: as chosen, forced, interpreted or emulated."""
    import fuseblock

    from .backends import DEVICE, available

    if request.param in ("triton", "cuda") and DEVICE == "cuda":
        pytest.skip("it is neither interpreted nor emulated on this machine")
    with available(request.param), fuseblock.backend(request.param):
        yield request.param


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite measures next to nothing."""
    from .benchmarks_package import load

    timing = load("timing")
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(timing, "SETTLE_S", 0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _worst_ratios() -> dict[str, tuple[float, str]]:
    from .ops.bounds import WORST  # late: kernels must be decorated after TRITON_INTERPRET is set

    return WORST


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["worst_ratios"] = _worst_ratios()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Collect what a worker of pytest-xdist measured."""
    worst = _worst_ratios()
    for dtype, (ratio, test) in getattr(node, "workeroutput", {}).get("worst_ratios", {}).items():
        if ratio > worst.get(dtype, (-1.0, ""))[0]:
            worst[dtype] = ratio, test


def pytest_terminal_summary(terminalreporter) -> None:
    for dtype, (ratio, test) in sorted(_worst_ratios().items()):
        terminalreporter.write_line(
            f"parity: {dtype} worst error is {ratio:.2f} of the allowed one, in {test}"
        )
