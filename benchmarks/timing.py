"""Paired, interleaved timing: A B C A B C ... in one process, so that the machine's noise meets all providers alike.

A sample of a provider is the mean over enough calls to last `SAMPLE_S`. Rounds go on until the time budget is spent or
the ratios are known to one per cent. The ratio of two providers is the median over rounds of the ratio within the
round, not the ratio of two medians.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

#: Shortest sample, in seconds.
SAMPLE_S = 0.01
#: After another provider ran, its threads may still spin (OpenMP and ONNX Runtime both do, for a few milliseconds).
SETTLE_S = 0.003
MIN_ROUNDS, MAX_ROUNDS = 5, 101


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of a sample."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q25, q75)

    def times(self, factor: float) -> Spread:
        """The spread of the values times a positive factor."""
        return Spread(self.median * factor, self.q25 * factor, self.q75 * factor)


@dataclass
class Runnable:
    """A step to time, and the context (forced backend, ``no_grad``) that is entered around each sample, untimed."""

    step: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    calls: int = 1
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sample(run: Runnable, cuda: bool, *, settle: bool) -> tuple[float, float]:
    """Wall and device seconds per call (on a CPU the second is the first)."""
    if settle:
        time.sleep(SETTLE_S)
    with run.context():
        if run.calls > 1:
            run.step()
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
        begin = time.perf_counter()
        for _ in range(run.calls):
            run.step()
        if cuda:
            end.record()
            torch.cuda.synchronize()
        wall = (time.perf_counter() - begin) / run.calls
        return wall, start.elapsed_time(end) / 1e3 / run.calls if cuda else wall


def _known(runs: list[Runnable]) -> bool:
    """Whether every ratio to the first provider has a standard error of its median below one per cent."""
    base = runs[0].wall
    for run in runs[1:]:
        spread = Spread.of([a / b for a, b in zip(base, run.wall, strict=True)])
        # 0.93 IQR / sqrt(n) is the standard error of a median of normal values.
        if 0.93 * (spread.q75 - spread.q25) > 0.01 * spread.median * math.sqrt(len(base)):
            return False
    return True


def interleave(runs: list[Runnable], *, budget_s: float, cuda: bool = False) -> None:
    """Time steps against each other; fills ``calls``, ``wall`` and ``device`` of each.

    Args:
        runs: what to time; all of them must have run before (the parity check does that).
        budget_s: seconds to spend for each provider; at least `MIN_ROUNDS` rounds are made, or 3 where a single step
            takes longer than the budget allows.
        cuda: whether the steps run on a GPU.
    """
    if not runs:
        return
    for run in runs:
        wall = min(_sample(run, cuda, settle=True)[0] for _ in range(2))
        run.calls = min(max(1, math.ceil(SAMPLE_S / max(wall, 1e-9))), 20_000)
    deadline = time.perf_counter() + budget_s * len(runs)
    with _collector_off():
        for number in range(MAX_ROUNDS):
            if (
                number >= 3
                and time.perf_counter() > deadline
                and (number >= MIN_ROUNDS or _slow(runs, budget_s))
            ):
                break
            if number >= 2 * MIN_ROUNDS and _known(runs):
                break
            # Turn the order round by round: nobody always runs after the same neighbour.
            shift = number % len(runs)
            for run in runs[shift:] + runs[:shift]:
                wall, device = _sample(run, cuda, settle=len(runs) > 1)
                run.wall.append(wall)
                run.device.append(device)
            gc.collect()


def _slow(runs: list[Runnable], budget_s: float) -> bool:
    return max(run.wall[-1] for run in runs) * MIN_ROUNDS > budget_s


def paired_ratio(base: Runnable, other: Runnable) -> Spread:
    """How many times faster ``other`` is than ``base``: the spread over rounds of the ratio within a round."""
    return Spread.of([a / b for a, b in zip(base.wall, other.wall, strict=True)])
