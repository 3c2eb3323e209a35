"""Runs cases: parity first, then time (interleaved), then memory; one row for each case, mode and provider.

Method: all providers of a case and mode get equal values, are checked against one float64 run (`benchmarks.parity`),
are timed against each other in one process (`benchmarks.timing`), and each step's peak memory is taken
(`benchmarks.memory`). A row that fails the check is red and shows no speed-up. Rows that cannot run say why.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import memory
from benchmarks.parity import Results, Verdict
from benchmarks.providers import BASE, COPY, OURS
from benchmarks.timing import Runnable, Spread, interleave, paired_ratio

if TYPE_CHECKING:
    from benchmarks.suites import Suite

GREEN, RED, UNAVAILABLE, FAILED = "green", "red", "unavailable", "failed"


@dataclass(frozen=True)
class Settings:
    """Parameters of a run; written into the JSON.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: name of a floating dtype.
        threads: PyTorch's and ONNX Runtime's threads.
        seed: of parameters and inputs.
        budget_s: seconds of timing for each provider of a case and mode.
        rss: also measure the process's peak memory (CPU).
        tf32: whether CUDA may round float32 products to TF32.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    seed: int = 0
    budget_s: float = 2.0
    rss: bool = False
    tf32: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass
class Row:
    """One provider's result on one case and mode. Times are seconds per call; None means not measured.

    ``speedup_*`` are times of the other over ours, paired; None unless the row is green. ``best_peer`` is the fastest
    provider that is not fuseblock, red ones included (a peer with larger errors is still a peer, and marked).
    ``saved``: what a training step saves for its backward.
    ``moved``: bytes that a case of norms, activations or filters moves by the performance model's formulas; ``of_copy``:
    their rate over that of a plain copy of what forward moves, paired. The copy is a row, too, of provider `COPY`.
    ``error_over_bound`` at most 1 is green; ``tensor`` is where it was reached.
    """

    case: str
    mode: str
    provider: str
    status: str
    reason: str = ""
    suite: str = "lstm"
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: Spread | None = None
    device_seconds: Spread | None = None
    rounds: int = 0
    calls: int = 0
    speedup_stock: Spread | None = None
    best_peer: str | None = None
    best_peer_red: bool = False
    speedup_peer: Spread | None = None
    gflops: float | None = None
    gemm_fraction: float | None = None
    gbytes: float | None = None
    copy_fraction: float | None = None
    tensor_peak: int | None = None
    saved: int | None = None
    moved: float | None = None
    of_copy: Spread | None = None
    process_peak: int | None = None
    error_over_bound: float | None = None
    tensor: str = ""
    error: float | None = None
    bound: float | None = None


def apply(settings: Settings) -> None:
    """Set PyTorch's global switches for a run."""
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = settings.tf32


def run(
    suite: Suite,
    cases: list[Any],
    modes: list[str],
    providers: list[Any],
    settings: Settings,
    ceilings: dict[str, float],
    progress: Callable[[str], None] = lambda text: None,
    deadline: float = math.inf,
) -> Iterator[Row]:
    """Measure; yields rows as they are complete, and reports each case and mode to ``progress`` before it runs.

    Args:
        suite: the family of the cases.
        cases, modes: what to run; modes that a case does not have are left out.
        providers: whom to run; the base provider comes first.
        settings: how.
        ceilings: from `benchmarks.machine.ceilings`.
        progress: told what runs next.
        deadline: when, on `time.perf_counter`'s clock, no further case and mode is begun.
    """
    for case in cases:
        for mode in modes:
            if mode in case.modes and time.perf_counter() < deadline:
                progress(f"{case.name} {mode}")
                yield from _measure(suite, case, mode, providers, settings, ceilings)


def one_line(error: Exception) -> str:
    """An error as text for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


def _results(step: Callable[[], Results], context: Callable[[], Any]) -> Results:
    with context():
        return {name: tensor.detach() for name, tensor in step().items()}


def _measure(
    suite: Suite,
    case: Any,
    mode: str,
    providers: list[Any],
    settings: Settings,
    ceilings: dict[str, float],
) -> list[Row]:
    dtype, cuda = settings.torch_dtype, settings.device == "cuda"
    problem = suite.make_problem(case, dtype=dtype, device=settings.device, seed=settings.seed)
    stock = next(provider for provider in providers if provider.name == BASE)
    # Without cuDNN the reference has no limit on T and is independent of what is measured.
    with torch.backends.cudnn.flags(enabled=False):
        reference = _results(*stock.step(problem.to(torch.float64), mode))

    rows: dict[str, Row] = {}
    runnables: dict[str, Runnable] = {}
    stock_results: Results | None = None
    sizes = suite.sizes(case)

    def evaluate(provider: Any, problem: Any) -> Results:
        return _results(*provider.step(problem, mode))

    for provider in sorted(providers, key=lambda p: p.name != BASE):
        row = Row(case.name, mode, provider.name, UNAVAILABLE, suite=suite.name, sizes=sizes)
        rows[provider.name] = row
        row.reason = provider.why_not(case, mode, settings.device, dtype) or ""
        if row.reason:
            continue
        if provider.name == COPY:
            row.status = GREEN
            runnables[COPY] = Runnable(*provider.step(problem, mode))
            continue
        # A provider that cannot run a case must not end the run of the others: the row carries its message.
        try:
            step, context = provider.step(problem, mode)
            results = _results(step, context)
            if provider.name == BASE:
                stock_results = results
            verdict = suite.verdict(evaluate, provider, problem, results, reference, stock_results, dtype)
        except Exception as error:
            row.status, row.reason = FAILED, one_line(error)
            continue
        _note_verdict(row, verdict)
        runnables[provider.name] = Runnable(step, context)
    del reference, stock_results
    gc.collect()

    interleave(list(runnables.values()), budget_s=settings.budget_s, cuda=cuda)
    itemsize = torch.empty((), dtype=dtype).element_size()
    for name, runnable in runnables.items():
        row = rows[name]
        row.seconds, row.rounds, row.calls = Spread.of(runnable.wall), len(runnable.wall), runnable.calls
        row.device_seconds = Spread.of(runnable.device) if cuda else None
        median = (row.device_seconds or row.seconds).median
        row.moved = suite.moved(case, mode, itemsize, _has_clusters(settings))
        row.gflops = 0.0 if name == COPY else case.flop(mode) / median / 1e9
        if name == COPY:
            row.moved = suite.moved(case, "forward", itemsize, False)
        row.gbytes = (row.moved or case.least_bytes(mode, itemsize)) / median / 1e9
        row.gemm_fraction = row.gflops / ceilings["gemm_gflops"]
        row.copy_fraction = row.gbytes / ceilings["copy_gbytes"]
        if name != COPY:
            _note_memory(row, runnable, settings)
    _note_speedups(rows, runnables, {provider.name for provider in providers if provider.peer})
    _note_copy(rows, runnables)
    return [rows[provider.name] for provider in providers]


def _note_verdict(row: Row, verdict: Verdict) -> None:
    row.status = GREEN if verdict.green else RED
    row.error_over_bound, row.tensor = verdict.ratio, verdict.tensor
    row.error, row.bound = verdict.error, verdict.bound
    if not verdict.green:
        row.reason = f"{verdict.tensor} is off by {verdict.error:.3g}, bound {verdict.bound:.3g}"


def _note_memory(row: Row, runnable: Runnable, settings: Settings) -> None:
    cuda = settings.device == "cuda"
    # ONNX Runtime has an allocator of its own: only the process's peak sees it.
    if row.provider != "onnxruntime":
        with runnable.context():
            row.tensor_peak = memory.peak_of_tensors(runnable.step, cuda=cuda)
            if row.mode == "train":
                row.saved = memory.saved_for_backward(runnable.step)
    if settings.rss and not cuda:
        try:
            row.process_peak = memory.in_fresh_process(
                row.case,
                row.mode,
                row.provider,
                dtype=settings.dtype,
                threads=settings.threads,
                seed=settings.seed,
            )
        except RuntimeError as error:
            row.reason = (row.reason + "; " if row.reason else "") + f"process memory: {error}"


def _note_speedups(rows: dict[str, Row], runnables: dict[str, Runnable], peers: set[str]) -> None:
    """Fill the speed-ups of green rows."""
    timed = {name: row.seconds.median for name, row in rows.items() if row.seconds is not None}
    ranked = sorted(peers & timed.keys(), key=lambda name: timed[name])
    for name in timed:
        row = rows[name]
        if row.status != GREEN or name == COPY:
            continue
        if BASE in runnables:
            row.speedup_stock = paired_ratio(runnables[BASE], runnables[name])
        if ranked and name not in peers:
            row.best_peer, row.best_peer_red = ranked[0], rows[ranked[0]].status == RED
            row.speedup_peer = paired_ratio(runnables[ranked[0]], runnables[name])


def _note_copy(rows: dict[str, Row], runnables: dict[str, Runnable]) -> None:
    """Fill the shares of green rows of a plain copy's rate."""
    copied = rows[COPY].moved if COPY in runnables else None
    for name, runnable in runnables.items():
        row = rows[name]
        if copied and row.moved and row.status == GREEN and name != COPY:
            row.of_copy = paired_ratio(runnables[COPY], runnable).times(row.moved / copied)


def _has_clusters(settings: Settings) -> bool:
    return settings.device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)


def ours(rows: list[Row]) -> list[Row]:
    """The rows of what users get: fuseblock with its own choice of engine."""
    return [row for row in rows if row.provider == OURS]
