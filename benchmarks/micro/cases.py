"""What is measured, what it should compute, and what the design assumed before anything was measured.

Predictions are for a Hopper GPU (H100, H200): 132 multiprocessors at 1.755 GHz, 128 bytes of shared memory a clock,
180 to 200 clocks to another block's shared memory, 5.5 TB/s from L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLUSTERS = (2, 4, 8, 16)
CLOCK_HZ = 1.755e9
GATHERED_BYTES = 32 << 10
COPIED_BYTES = 1 << 30
#: Of a block with a multiprocessor to itself, where the GPU has so much.
SHARED_BYTES = 200 << 10


@dataclass(frozen=True)
class Problem:
    """Buffers of a run.

    Attributes:
        result: written by the kernel; zero before.
        expected: ``(rounds) -> Tensor``: what ``result`` must then be, bit for bit.
        source: read by the kernel.
        workspace: of 4-byte counters, zero before the first launch.
    """

    result: Tensor
    expected: Callable[[int], Tensor]
    source: Tensor | None = None
    workspace: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """One number.

    Attributes:
        name: with the parameters but for the cluster's size.
        kernel: ``micro_<kernel>`` of the library.
        unit: ``us`` or ``clk`` (of a round), ``us/launch`` (replayed in a graph), ``GB/s``, or ``clusters`` (at a time).
        predicted: from, to.
        problem: ``(blocks, cluster, device) -> Problem``; the work of a round is the same for any number of blocks.
        cluster: blocks of a cluster, 1 for none.
        threads: of a block.
        most_blocks: fewer than fit, if given.
        alone: whether a block has a multiprocessor to itself.
        least_capability: major compute capability of devices that have the kernel's instructions.
    """

    name: str
    kernel: str
    unit: str
    predicted: tuple[float, float]
    problem: Callable[[int, int, str], Problem]
    cluster: int = 1
    threads: int = 256
    most_blocks: int | None = None
    alone: bool = True
    least_capability: int = 8

    @property
    def label(self) -> str:
        """Unique."""
        return self.name if self.cluster == 1 else f"{self.name}/{self.cluster}"


def _ring(size: Callable[[int, int], int], every_round: bool) -> Callable[[int, int, str], Problem]:
    """Numbers passed on in rings of ``size(blocks, cluster)`` blocks, in every round or in the last alone."""

    def problem(blocks: int, cluster: int, device: str) -> Problem:
        def expected(rounds: int) -> Tensor:
            passes = rounds if every_round else 1
            rings = torch.arange(blocks, dtype=torch.int32).reshape(-1, size(blocks, cluster))
            return rings.roll(passes, dims=1).flatten() + passes

        # A barrier of two counters, two slots of each block.
        workspace = torch.zeros(2 + 2 * blocks, dtype=torch.int32, device=device)
        return Problem(torch.zeros(blocks, dtype=torch.int32, device=device), expected, workspace=workspace)

    return problem


def _swap(blocks: int, cluster: int, device: str) -> Problem:
    def expected(rounds: int) -> Tensor:
        first = torch.arange(blocks, dtype=torch.int32).reshape(-1, 2, cluster // 2)
        return first.roll(rounds, dims=1).flatten() + rounds

    return Problem(torch.zeros(blocks, dtype=torch.int32, device=device), expected)


def _all_to_all(blocks: int, cluster: int, device: str) -> Problem:
    words = 128

    def expected(rounds: int) -> Tensor:
        sent = torch.arange(blocks * words, dtype=torch.int32).reshape(-1, cluster, words)
        for t in range(rounds - 1):
            sent = sent.roll(-t, dims=1) + 1
        return sent[:, None].expand(-1, cluster, -1, -1).reshape(blocks, -1)

    return Problem(torch.zeros(blocks, cluster * words, dtype=torch.int32, device=device), expected)


def _gather(every_piece: bool) -> Callable[[int, int, str], Problem]:
    """Sums over all rounds of a thread's pieces: of all, or of one a round."""

    def problem(blocks: int, cluster: int, device: str) -> Problem:
        threads, pieces = 256, GATHERED_BYTES // 16
        source = torch.randint(2**20, (2, pieces, 4), dtype=torch.int32)
        mixed = source[..., 0] ^ source[..., 1] ^ source[..., 2] ^ source[..., 3]
        shares = mixed.reshape(2, pieces // threads, threads)

        def expected(rounds: int) -> Tensor:
            total = torch.zeros(threads, dtype=torch.int64)
            for t in range(rounds):
                total += shares[t % 2].sum(0) if every_piece else shares[t % 2, t % shares.shape[1]]
            wrapped = total % 2**32
            signed = torch.where(wrapped < 2**31, wrapped, wrapped - 2**32).int()
            return signed.expand(blocks, threads)

        result = torch.zeros(blocks, threads, dtype=torch.int32, device=device)
        return Problem(result, expected, source.to(device))

    return problem


def _products(dtype: torch.dtype, chains: int) -> Callable[[int, int, str], Problem]:
    """Sums of products of small integers, which are exact."""

    def problem(blocks: int, cluster: int, device: str) -> Problem:
        warps, row_bytes = 8, 32 * 32 // chains
        k = row_bytes // dtype.itemsize
        a, b = (torch.randint(-2, 3, shape).float() for shape in ((warps, chains, 16, k), (8, k)))
        source = torch.cat([a.flatten(), b.flatten()]).to(dtype)
        result = torch.zeros(blocks, warps, chains, 16, 8, device=device)
        return Problem(
            result, lambda rounds: rounds * (a @ b.T).expand(blocks, -1, -1, -1, -1), source.to(device)
        )

    return problem


def _count(blocks: int, cluster: int, device: str) -> Problem:
    return Problem(
        torch.zeros(1, dtype=torch.int32, device=device), lambda launches: torch.tensor([launches]).int()
    )


def _copy(size: int) -> Callable[[int, int, str], Problem]:
    def problem(blocks: int, cluster: int, device: str) -> Problem:
        source = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
        return Problem(torch.zeros_like(source), lambda rounds: source, source)

    return problem


def _barriers() -> list[Case]:
    whole, cluster = (lambda blocks, cluster: blocks), (lambda blocks, cluster: cluster)
    l2_load, remote_store = 263 / CLOCK_HZ * 1e6, (180 / CLOCK_HZ * 1e6, 200 / CLOCK_HZ * 1e6)
    exchange = (0.12 + remote_store[0], 0.3 + remote_store[1])
    cases = [
        Case("grid barrier", "grid_barrier", "us", (0.6, 0.6), _ring(whole, False)),
        Case("grid barrier and exchange", "grid_exchange", "us", (0.6 + l2_load,) * 2, _ring(whole, True)),
        Case("grid.sync of cooperative_groups", "grid_sync", "us", (1.1, 1.1), _ring(whole, False)),
    ]
    for size in CLUSTERS:
        cases += [
            Case("cluster barrier", "cluster_barrier", "us", (0.12, 0.3), _ring(cluster, False), size),
            Case(
                "cluster barrier and exchange", "cluster_exchange", "us", exchange, _ring(cluster, True), size
            ),
        ]
    return cases


def _exchanges() -> list[Case]:
    cases = [
        Case("st.async, one way", "swap", "clk", (180, 200), _swap, size, threads=32) for size in CLUSTERS
    ]
    for size in CLUSTERS:
        # 11 to 13 bytes a clock leave a multiprocessor; no exchange is shorter than a single value's way.
        sent = 512 * (size - 1)
        predicted = (max(180.0, sent / 13), max(200.0, sent / 11))
        cases += [
            Case("512 B to each, st.async", "all_to_all_stores", "clk", predicted, _all_to_all, size),
            Case("512 B to each, bulk copies", "all_to_all_copies", "clk", predicted, _all_to_all, size),
        ]
    return cases


def _gathers() -> list[Case]:
    blocks = 128
    whole = blocks * GATHERED_BYTES / 5.5e12 * 1e6
    predicted = (whole, whole)
    cases = [
        Case("32 KB by all, loads", "gather_loads", "us", predicted, _gather(True), most_blocks=blocks),
        Case(
            "32 KB by all, bulk copies",
            "gather_copies",
            "us",
            predicted,
            _gather(False),
            most_blocks=blocks,
            least_capability=9,
        ),
    ]
    cases += [
        Case(
            "32 KB by all, multicast",
            "gather_multicast",
            "us",
            (whole / size,) * 2,
            _gather(False),
            size,
            most_blocks=blocks,
        )
        for size in CLUSTERS
    ]
    return cases


def _mma() -> list[Case]:
    """A round is 256 mma of a multiprocessor: 1.0 to 1.6 clocks each, but 24 from one to the next of a chain."""
    cases = []
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32)):
        for chains in (1, 2, 4):
            waits = 24.0 * 32 / chains
            predicted = (max(256.0, waits), max(1.6 * 256, waits))
            problem = _products(dtype, chains)
            label = f"256 mma {name}, {chains} chain{'s' * (chains > 1)} a warp"
            cases.append(Case(label, f"mma_{name}_{chains}", "clk", predicted, problem))
    return cases


def _occupancy() -> list[Case]:
    """Of the 132 multiprocessors, groups of 16 or 18 can host a cluster."""
    predicted = {2: (66, 66), 4: (32, 33), 8: (16, 16), 16: (7, 8)}
    ring = _ring(lambda blocks, cluster: cluster, False)
    return [
        Case("clusters at a time", "cluster_barrier", "clusters", predicted[n], ring, n) for n in CLUSTERS
    ]


CASES: tuple[Case, ...] = (
    *_barriers(),
    *_exchanges(),
    *_gathers(),
    *_mma(),
    *_occupancy(),
    Case(
        "launch in a graph",
        "count",
        "us/launch",
        (1.3, 2.0),
        _count,
        threads=128,
        most_blocks=132,
        alone=False,
    ),
    Case("copy of 1 GiB", "copy", "GB/s", (4300, 4300), _copy(COPIED_BYTES), threads=512, alone=False),
)
