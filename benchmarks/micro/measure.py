"""Runs cases: what a kernel computed is checked before and after it is timed.

The time of a round is the difference between launches of many and of few rounds, taken by events: what a launch costs drops
out. Clocks of a round are read by the kernel around its rounds; the slowest block counts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.micro.cases import SHARED_BYTES, Case
from benchmarks.micro.library import Launch, Library
from benchmarks.timing import Spread
from fuseblock.launch.gpu import present

MEASURED, REFUSED, WRONG, FAILED = "measured", "refused", "wrong", "failed"
FEW, MANY, SAMPLES = 100, 2000, 21


@dataclass
class Row:
    """A case's result. ``ratio`` is measured over predicted: over the nearer end of a range, 1 inside of it."""

    case: str
    cluster: int
    unit: str
    predicted: tuple[float, float]
    status: str
    reason: str = ""
    blocks: int | None = None
    threads: int | None = None
    value: Spread | None = None
    ratio: float | None = None
    us_of_round: float | None = None
    clocks_of_round: float | None = None


class Run:
    """A case with its buffers.

    Args:
        case: what to run.
        library: its kernels.
        blocks: of a launch.
        shared_bytes: dynamic shared memory of a block.
        device: where tensors lie; on ``"cpu"`` the library is an emulated one.
    """

    def __init__(self, case: Case, library: Library, blocks: int, shared_bytes: int, device: str) -> None:
        self.case, self.problem, self._library = case, case.problem(blocks, case.cluster, device), library
        self.clocks = torch.zeros(blocks, dtype=torch.int64, device=device)
        self._shared_bytes, self._device = shared_bytes, device

    def launch(self, rounds: int) -> None:
        """On the current stream."""
        problem, cuda = self.problem, self._device != "cpu"
        launch = Launch(
            blocks=len(self.clocks),
            threads=self.case.threads,
            cluster=self.case.cluster,
            shared_bytes=self._shared_bytes,
            rounds=rounds,
            bytes=problem.result.nbytes,
            result=problem.result.data_ptr(),
            clocks=self.clocks.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream if cuda else None,
        )
        for name, tensor in (("source", problem.source), ("workspace", problem.workspace)):
            if tensor is not None:
                setattr(launch, name, ctypes.c_void_p(tensor.data_ptr()))
        self._library.launch(self.case.kernel, launch)

    def is_right(self, rounds: int) -> bool:
        """Whether a launch computes what it should."""
        self.problem.result.zero_()
        self.launch(rounds)
        return self.matches(rounds)

    def matches(self, rounds: int) -> bool:
        """Whether the result is that of so many rounds."""
        result = self.problem.result
        return torch.equal(result, self.problem.expected(rounds).to(result.device))


def _milliseconds(step: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _rounds(run: Run, row: Row) -> bool:
    """Time rounds; whether they were right."""
    if not (run.is_right(FEW) and run.is_right(MANY)):
        return False
    times, clocks = [], []
    for _ in range(SAMPLES):
        few, many = (_milliseconds(partial(run.launch, n)) for n in (FEW, MANY))
        times.append((many - few) * 1e3 / (MANY - FEW))
        clocks.append(run.clocks.max().item() / MANY)
    row.us_of_round, row.clocks_of_round = Spread.of(times).median, Spread.of(clocks).median
    row.value = Spread.of(times if run.case.unit == "us" else clocks)
    return run.matches(MANY)


def _graph(run: Run, row: Row) -> bool:
    """Time launches in a graph."""
    run.launch(1)
    run.problem.result.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(MANY):
            run.launch(1)
    graph.replay()
    right = run.matches(MANY)
    row.value = Spread.of([_milliseconds(graph.replay) * 1e3 / MANY for _ in range(SAMPLES)])
    return right


def _copies(run: Run, row: Row) -> bool:
    """Bytes read and written in a second."""
    if not run.is_right(1):
        return False
    moved, repeats = 2 * run.problem.result.nbytes, 5

    def copy() -> None:
        for _ in range(repeats):
            run.launch(1)

    row.value = Spread.of([repeats * moved / _milliseconds(copy) / 1e6 for _ in range(SAMPLES)])
    return True


_MEASURES = {"us": _rounds, "clk": _rounds, "us/launch": _graph, "GB/s": _copies}


def ratio(value: float, predicted: tuple[float, float]) -> float:
    """Measured over predicted: over the nearer end of the range, 1 inside of it."""
    return value / min(max(value, predicted[0]), predicted[1])


def measure(case: Case, library: Library, device: str = "cuda") -> Row:
    """Run a case on the current CUDA device. Never raises what the runtime says: that is in the row."""
    row = Row(case.label, case.cluster, case.unit, case.predicted, MEASURED, threads=case.threads)
    gpu = present()
    assert gpu is not None
    if gpu.capability[0] < case.least_capability:
        row.status, row.reason = REFUSED, "this GPU has no bulk copies"
        return row
    # What the kernels have in shared memory of fixed size comes on top.
    shared = min(SHARED_BYTES, gpu.shared_bytes - (10 << 10)) if case.alone else 0
    try:
        fit, row.reason = library.resident(
            case.kernel, threads=case.threads, cluster=case.cluster, shared_bytes=shared
        )
        if not fit:
            row.status = REFUSED
            return row
        row.blocks = min(fit, case.most_blocks or fit) // case.cluster * case.cluster
        if case.unit == "clusters":
            clusters = float(fit // case.cluster)
            row.value = Spread(clusters, clusters, clusters)
        elif not _MEASURES[case.unit](Run(case, library, row.blocks, shared, device), row):
            row.status, row.value, row.reason = WRONG, None, "the result is not what it should be"
    except RuntimeError as error:
        row.status, row.value, row.reason = FAILED, None, str(error).splitlines()[0]
    if row.value is not None:
        row.ratio = ratio(row.value.median, case.predicted)
    return row
