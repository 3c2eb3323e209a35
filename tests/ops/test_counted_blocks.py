"""Whole blocks move over the activation what docs/performance.md says: a module is called, and every launch is counted.

The modules, who runs them, and the passes and launches that are expected come from what writes the page: `CALLS` of
benchmarks/model_blocks.py. What a convolution moves itself is left out where PyTorch's runs, and held to the formula of its
kernel where one of Triton's does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseblock
from fuseblock import _conv_engine
from fuseblock.launch.cuda_batch_norm_act import CudaKernels

from .. import emulator, traffic
from ..backends import DEVICE, available, emulating
from ..benchmarks_package import load
from ..emulator.batch_norm_act import EmulatedBatchNormAct
from ..emulator.bias_act import EmulatedBiasAct
from ..traffic import Launch, PyTorchsLaunches, unseen

model, registry, blocks = load("model"), load("model_kernels"), load("model_blocks")

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="blocks are counted in emulator and interpreter")
TOLERANCE = 0.05
SHAPE = (3, 8, 40, 50)
CONVOLUTIONS = "|".join(kernel.triton for kernel in registry.CONVOLUTION.kernels)
Count = Callable[[], AbstractContextManager[list[Launch]]]


@pytest.fixture
def counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Count]]:
    """A call of the table, with its backend forced, and the context that counts the launches of that backend's kernels."""
    call = request.param
    with contextlib.ExitStack() as stack:
        if call.backend == "cuda":
            norm, bias_act = (
                emulator.load_family(name, "counted") for name in ("batch_norm_act", "bias_act")
            )
            stack.enter_context(emulating(_emulated(norm, bias_act)))
            if call.how != "one sweep":
                norm.set_device(clusters=False, shared_bytes=20 << 10)
                stack.callback(norm.set_device)
            count: Count = partial(traffic.of_emulated, [norm, bias_act], monkeypatch)
        else:
            stack.enter_context(available("triton"))
            _share_sums(monkeypatch)
            stack.enter_context(_conv_engine.measuring("triton" if call.convolution else "aten"))
            count = traffic.of_interpreted
        stack.enter_context(fuseblock.backend(call.backend))
        yield call, count


def _emulated(norm: Any, bias_act: Any) -> Any:
    """Operators on emulated kernels, whose allocations (poisoned, which no GPU does) nobody counts."""

    class Unseen:
        def __init__(self, kernels: Any) -> None:
            self._kernels = kernels

        def __getattr__(self, name: str) -> Any:
            return unseen(getattr(self._kernels, name))

    norms, activations = EmulatedBatchNormAct(norm), EmulatedBiasAct(bias_act)
    norms.kernels = CudaKernels(Unseen(norms))
    others = {op: unseen(run) for op, run in activations.operators().items()}
    return SimpleNamespace(**norms.operators(), **others, tiers={})


def _share_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two programs share a sum, as several do on a GPU, and nobody count what the interpreter itself does."""
    from triton.runtime.interpreter import GridExecutor

    from fuseblock.launch import triton_batch_norm_act

    monkeypatch.setattr(GridExecutor, "__call__", unseen(GridExecutor.__call__))
    monkeypatch.setattr(triton_batch_norm_act, "programs", lambda chunks, channel_blocks: min(chunks, 2))


def counted(count: Count, run: Callable[[], Any]) -> tuple[Any, list[Launch], list[tuple[str, int]]]:
    """(result, launches of ours, launches of PyTorch's)."""
    with count() as launches, PyTorchsLaunches() as plain:
        result = run()
    return result, launches, plain.launches


def split(launches: list[Launch]) -> tuple[list[Launch], list[Launch]]:
    """Those of the convolution's kernel, and the others."""
    own = [launch for launch in launches if re.fullmatch(CONVOLUTIONS, launch.name)]
    return own, [launch for launch in launches if launch not in own]


def check_convolution(call: Any, launches: list[Launch], x: Tensor, y: Tensor) -> None:
    """It moves its input, its weight and its result once, as its formula says."""
    first = launches[0]
    kernel = registry.CONVOLUTION.kernel(call.convolution)
    taps = 16 if "Transpose" in call.module else 9
    channels = x.shape[1]
    statistics = int(len(launches) > 1)
    sizes = {"X": x.numel(), "Y": y.numel(), "W": taps * channels**2, "b": x.element_size(), "p": 0, "g": 0}
    sizes |= {"C": channels, "O": channels, "q": statistics, "P": 2 if taps == 16 else 1}
    assert first.read + first.written == pytest.approx(kernel.moved(sizes), rel=TOLERANCE)


@pytest.mark.parametrize(
    "counting",
    blocks.CALLS,
    indirect=True,
    ids=[f"{call.module} {call.backend} {call.how}" for call in blocks.CALLS],
)
def test_passes_and_launches(counting: tuple[Any, Count]) -> None:
    call, count = counting
    module = eval(call.module, dict(vars(fuseblock.nn)))
    orders = len(call.kernels)
    x = torch.randn(SHAPE, requires_grad=True)
    y, *forward = counted(count, lambda: module(x))
    dy = torch.randn_like(y).requires_grad_(orders > 2)
    sources = [x, *module.parameters()]
    (dx, *_), *backward = counted(count, lambda: torch.autograd.grad(y, sources, dy, create_graph=orders > 2))
    phases = [forward, backward]
    if orders > 2:
        v = torch.randn_like(dx)
        _, *second = counted(count, lambda: torch.autograd.grad(dx, [x, dy], v))
        phases.append(second)

    expected = zip(phases, call.passes(y.element_size()), call.launches, call.small, strict=True)
    for (ours, plain), passes, launches, most in expected:
        convolution, others = split(ours)
        if convolution:
            check_convolution(call, convolution, x, y)
        small = [name for name, moved in plain if moved < y.nbytes / 4]
        large = sum(moved for _, moved in plain if moved >= y.nbytes / 4)
        moved = sum(launch.read + launch.written for launch in others) + large
        assert moved / y.nbytes == pytest.approx(passes, rel=TOLERANCE)
        assert len(ours) == launches, [launch.name for launch in ours]
        assert len(small) <= most, small
