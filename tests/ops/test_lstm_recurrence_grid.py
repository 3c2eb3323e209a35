"""The recurrence's grid tier, emulated: values over odd sizes and small GPUs, any order of events, plans, refusals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fuseblock
from fuseblock import dispatch
from fuseblock.launch import cuda_lstm_recurrence, lstm_grid, resident_recurrence
from fuseblock.launch.gpu import A100, H200, KNOWN, Gpu

from ..backends import available
from ..emulator.build import ROOT
from .lstm_cases import LstmCase, check_backward, check_forward
from .resident_cases import (
    LAYOUTS,
    TierOps,
    case,
    check_any_order,
    check_declined,
    check_inactive_rows,
    check_layout,
    check_nothing_to_do,
    check_rows_apart,
    passes_of_float32,
)

DTYPES = [torch.float16, torch.bfloat16]
GRID = resident_recurrence.TIERS["grid"]
BATCHES, HIDDENS, STEPS = (1, 3, 8, 17), (24, 40, 100, 128, 200, 256, 320), (1, 2, 33)


class GridOps(TierOps):
    """On a GPU of the kernels' limits."""

    def __init__(self) -> None:
        super().__init__("grid")

    @property
    def gpu(self) -> Gpu:
        limits = self.kernels.multiprocessors, self.kernels.shared_bytes
        return replace(H200, name="emulated", multiprocessors=limits[0], shared_bytes=limits[1])


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[GridOps]:
    ops = GridOps()
    # The workspace is as small as the emulated GPU allows.
    monkeypatch.setattr(resident_recurrence, "gpu_of", lambda x: ops.gpu)
    yield ops
    ops.kernels.shared_bytes = H200.shared_bytes
    ops.kernels.set_device()
    ops.reset()


#: Every pair of values of two different columns occurs: steps, batch, hidden, directions, lengths, multiprocessors, dtype.
PAIRWISE = [
    (1, 1, 24, 1, True, 8, torch.float16),
    (33, 3, 24, 2, False, 8, torch.bfloat16),
    (2, 8, 24, 2, True, 132, torch.bfloat16),
    (1, 17, 24, 1, False, 132, torch.bfloat16),
    (2, 1, 40, 2, False, 132, torch.bfloat16),
    (1, 3, 40, 1, True, 8, torch.bfloat16),
    (1, 8, 40, 1, True, 8, torch.bfloat16),
    (33, 17, 40, 1, False, 132, torch.float16),
    (33, 1, 100, 1, True, 8, torch.float16),
    (1, 3, 100, 1, False, 132, torch.bfloat16),
    (1, 8, 100, 1, False, 8, torch.float16),
    (2, 17, 100, 2, True, 8, torch.float16),
    (1, 1, 128, 2, True, 8, torch.bfloat16),
    (2, 3, 128, 1, False, 132, torch.float16),
    (33, 8, 128, 1, True, 8, torch.float16),
    (1, 17, 128, 1, True, 8, torch.bfloat16),
    (1, 1, 200, 1, True, 8, torch.bfloat16),
    (1, 3, 200, 2, True, 132, torch.float16),
    (2, 8, 200, 1, False, 8, torch.bfloat16),
    (33, 8, 200, 1, False, 8, torch.float16),
    (1, 17, 200, 1, False, 8, torch.bfloat16),
    (1, 1, 256, 1, False, 132, torch.bfloat16),
    (1, 3, 256, 1, True, 8, torch.float16),
    (33, 3, 256, 1, True, 8, torch.float16),
    (2, 8, 256, 2, True, 8, torch.float16),
    (1, 17, 256, 1, True, 8, torch.float16),
    (1, 1, 320, 2, True, 8, torch.bfloat16),
    (2, 3, 320, 1, True, 8, torch.float16),
    (1, 8, 320, 1, False, 132, torch.float16),
    (33, 8, 320, 1, True, 8, torch.float16),
    (1, 17, 320, 2, True, 8, torch.bfloat16),
]


@pytest.mark.parametrize("sizes", PAIRWISE, ids=str)
def test_parity(grid: GridOps, sizes: tuple[Any, ...]) -> None:
    *problem, grid.kernels.multiprocessors, dtype = sizes
    check_forward(grid, case(*problem), dtype)
    check_backward(grid, case(*problem), dtype)


#: In float32: multiprocessors at the end. Rows of 100 and of 36 fill pieces of 16 bytes, those of 50 do not.
FLOAT32 = [
    (33, 3, 36, 2, True, 8),
    (2, 17, 50, 1, False, 8),
    (1, 8, 100, 2, True, 132),
    (2, 1, 128, 1, True, 8),
    (2, 3, 200, 2, False, 132),
    (1, 17, 256, 1, True, 40),
    (2, 8, 320, 1, True, 132),
]


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("sizes", FLOAT32, ids=str)
def test_parity_of_float32(grid: GridOps, sizes: tuple[Any, ...], passes: int) -> None:
    *problem, grid.kernels.multiprocessors = sizes
    with passes_of_float32(passes):
        check_forward(grid, case(*problem), torch.float32, tf32=passes == 1)
        check_backward(grid, case(*problem), torch.float32, tf32=passes == 1)


#: Class -> multiprocessors, hidden. From 16 on, weights are in shared memory, too.
CLASSES_FLOAT32 = {4: (5, 40), 8: (4, 128), 16: (1, 40), 32: (4, 136)}


@pytest.mark.parametrize("steps", lstm_grid.CLASSES[4])
def test_every_class_of_float32(grid: GridOps, steps: int) -> None:
    grid.kernels.multiprocessors, hidden = CLASSES_FLOAT32[steps]
    for backward, check in ((False, check_forward), (True, check_backward)):
        check(grid, case(2, 3, hidden, 1, False), torch.float32)
        teams = {team.blocks: team for team in lstm_grid.teams(torch.float32, hidden, backward, grid.gpu)}
        assert teams[grid.kernels.last_launch()[0]].steps == steps


#: Multiprocessors, batch, hidden, directions: three tiles of rows in a job; two; two, with sums of more row groups than are
#: loaded at once.
SEVERAL_TILES = [(2, 17, 24, 2), (3, 25, 72, 1), (18, 12, 136, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("multiprocessors", "batch", "hidden", "directions"), SEVERAL_TILES)
def test_parity_of_several_tiles(
    grid: GridOps, multiprocessors: int, batch: int, hidden: int, directions: int, dtype: torch.dtype
) -> None:
    grid.kernels.multiprocessors = multiprocessors
    problem = case(4, batch, hidden, directions, True)
    assert problem.lengths is not None
    assert any(a != b for a, b in zip(problem.lengths, problem.lengths[8:], strict=False))
    check_forward(grid, problem, dtype)
    check_backward(grid, problem, dtype)


def test_every_pair_of_sizes_is_tested() -> None:
    columns = [STEPS, BATCHES, HIDDENS, (1, 2), (False, True), (8, 132), DTYPES]
    for (m, one), (n, other) in itertools.combinations(enumerate(columns), 2):
        assert {(sizes[m], sizes[n]) for sizes in PAIRWISE} == set(itertools.product(one, other))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("batch", BATCHES)
def test_parity_of_every_size(grid: GridOps, batch: int, hidden: int, dtype: torch.dtype) -> None:
    every = itertools.product(STEPS, (1, 2), (False, True))
    for seed, (steps, directions, with_lengths) in enumerate(every):
        grid.kernels.multiprocessors = (6, 24, 132)[seed % 3]
        grid.kernels.set_seed(seed)
        check_forward(grid, case(steps, batch, hidden, directions, with_lengths), dtype)
        check_backward(grid, case(steps, batch, hidden, directions, with_lengths), dtype)


#: For every class a GPU that just holds a layer of it: class -> multiprocessors, hidden. From 24 on, weights are in shared
#: memory, too.
CLASSES = {
    2: (5, 40),
    4: (14, 200),
    6: (18, 264),
    8: (1, 40),
    12: (9, 264),
    16: (4, 136),
    24: (6, 264),
    28: (28, 776),
    32: (8, 392),
}


@pytest.mark.parametrize("steps", lstm_grid.CLASSES[2])
def test_every_class(grid: GridOps, steps: int) -> None:
    grid.kernels.multiprocessors, hidden = CLASSES[steps]
    for backward, check in ((False, check_forward), (True, check_backward)):
        check(grid, case(2, 3, hidden, 1, False), torch.bfloat16)
        teams = {team.blocks: team for team in lstm_grid.teams(torch.bfloat16, hidden, backward, grid.gpu)}
        assert teams[grid.kernels.last_launch()[0]].steps == steps


#: Several jobs for each of several teams; one team with both directions; tiles beside each other.
ORDERS = [
    (8, 20, 40, 2, torch.bfloat16),
    (4, 9, 72, 2, torch.bfloat16),
    (2, 17, 40, 1, torch.bfloat16),
    (2, 17, 40, 1, torch.float32),
    (18, 3, 136, 1, torch.bfloat16),
]


@pytest.mark.parametrize(("multiprocessors", "batch", "hidden", "directions", "dtype"), ORDERS)
def test_events_in_any_order(
    grid: GridOps, multiprocessors: int, batch: int, hidden: int, directions: int, dtype: torch.dtype
) -> None:
    """Bit for bit: blocks wait where they must, and nothing depends on who comes first or what arrives late."""
    grid.kernels.multiprocessors = multiprocessors
    check_any_order(grid, case(4, batch, hidden, directions, True), dtype, range(12))


def test_absent_gradients_mean_zeros(grid: GridOps) -> None:
    grid.kernels.multiprocessors = 4
    for given in [(), (0,), (1,), (2,), (3,), (4,), (0, 1, 2)]:
        check_backward(grid, case(4, 3, 40, 2, True), torch.bfloat16, given=given)


#: Multiprocessors, hidden, batch, directions -> blocks forward, backward.
PLANS = [
    (66, 512, 8, 1, 64, 64),  # 8 units a block
    (66, 512, 16, 1, 64, 64),  # two teams of blocks of 16 units, 8 rows each
    (66, 512, 64, 1, 64, 64),  # four teams of 32 units, two tiles of 8 rows
    (66, 512, 8, 2, 64, 64),  # a team for each direction
    (66, 500, 8, 1, 63, 64),  # row groups are whole
    (48, 768, 8, 1, 48, 48),
    (4, 128, 8, 1, 4, 4),
    (9, 128, 8, 1, 8, 8),
]


@pytest.mark.parametrize(("multiprocessors", "hidden", "batch", "directions", "forward", "backward"), PLANS)
def test_blocks(
    grid: GridOps, multiprocessors: int, hidden: int, batch: int, directions: int, forward: int, backward: int
) -> None:
    grid.kernels.multiprocessors = multiprocessors
    gx, h0, c0, w_hh, _, _ = case(1, batch, hidden, directions, False).inputs(torch.float16)
    y, _, _, gates, c = grid.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)
    assert grid.kernels.last_launch() == (forward, 1, 256)
    grid.lstm_recurrence_bwd(y, None, None, None, None, gates, c, c0, w_hh, None, None, None)
    assert grid.kernels.last_launch() == (backward, 1, 256)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(grid: GridOps, layout: str) -> None:
    grid.kernels.multiprocessors = 4
    check_layout(grid, case(4, 3, 40, 2, False), torch.bfloat16, layout)


def test_what_inactive_rows_must_ignore_may_be_nan(grid: GridOps) -> None:
    grid.kernels.multiprocessors = 4
    check_inactive_rows(grid, case(4, 3, 40, 2, True), torch.float16)


def test_rows_do_not_touch_each_other(grid: GridOps) -> None:
    grid.kernels.multiprocessors = 4
    check_rows_apart(grid, case(3, 12, 40, 1, False), torch.float16)


def test_nothing_to_do(grid: GridOps) -> None:
    check_nothing_to_do(grid, torch.float16)


def test_classes_are_those_of_the_header() -> None:
    header = (ROOT / "csrc" / "cuda" / "lstm_recurrence_grid.h").read_text()
    listed = [
        tuple(map(int, re.findall(r"X\((\d+)\)", line)))
        for line in header.splitlines()
        if "_CLASSES(X)" in line
    ]
    assert listed == [lstm_grid.CLASSES[2], lstm_grid.CLASSES[4]]


#: Multiprocessors, shared memory -> the largest H.
LIMITS = {(2, 232_448): 128, (4, 232_448): 256, (8, 232_448): 512, (8, 65_536): 256}


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_are_those_of_the_launchers(grid: GridOps, limits: tuple[int, int]) -> None:
    grid.kernels.multiprocessors, grid.kernels.shared_bytes = limits
    largest = LIMITS[limits]
    assert GRID.largest_hidden(torch.float16, grid.gpu) == largest
    check_forward(grid, case(1, 1, largest, 1, False), torch.float16)
    check_backward(grid, case(1, 1, largest, 1, False), torch.float16)
    # 720: cudaErrorCooperativeLaunchTooLarge
    with pytest.raises(ValueError, match="cudaError 720"):
        check_backward(grid, case(1, 1, largest + 8, 1, False), torch.float16)


def test_limits_of_known_gpus() -> None:
    limits = {gpu.name: GRID.largest_hidden(torch.bfloat16, gpu) for gpu in KNOWN}
    assert limits == {"H200": 2048, "H100 SXM": 2048, "H100 PCIe": 1792, "A100": 1568, "RTX A4000": 768}
    assert GRID.largest_hidden(torch.bfloat16, replace(A100, capability=(7, 5))) == 0


@pytest.mark.parametrize("short", [0, 1000])
def test_too_small_a_workspace_is_an_error(grid: GridOps, short: int) -> None:
    tier = replace(GRID, workspace_bytes=lambda *args: short)
    args = (*case(1, 3, 40, 1, False).inputs(torch.float16), None, True)
    with pytest.raises(ValueError, match="cudaError 1$"):
        resident_recurrence.lstm_recurrence(tier, grid.kernels, *args)


DECLINED = {
    "float64": (LstmCase(2, 3, 136, 1, None, None), torch.float64, H200, "float16 and bfloat16 and float32"),
    "large": (LstmCase(1, 1, 2056, 1, None, None), torch.float16, H200, "H = 2056"),
    "projection": (LstmCase(2, 3, 136, 1, 8, None), torch.bfloat16, H200, "projection"),
    "small": (
        LstmCase(2, 3, 1024, 1, None, None),
        torch.float16,
        replace(A100, name="a MIG slice", multiprocessors=14),
        "does not fit into the grid tier on a MIG slice (limit 512)",
    ),
    "old": (
        LstmCase(2, 3, 136, 1, None, None),
        torch.float16,
        replace(A100, name="T4", capability=(7, 5)),
        "does not run on T4",
    ),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_declined_calls_run_per_step_and_say_why(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, dtype, gpu, reason = DECLINED[kind]
    monkeypatch.setattr(resident_recurrence, "gpu_of", lambda x: gpu)
    assert check_declined("grid", problem, dtype, reason) == "per step"


@pytest.mark.parametrize("backward", [False, True])
def test_blocks_that_cannot_run_at_the_same_time_are_declined(grid: GridOps, backward: bool) -> None:
    """Although their GPU has as many multiprocessors: the driver is asked. A launch would be an error."""
    op = "lstm_recurrence_bwd" if backward else "lstm_recurrence"
    (candidate,) = cuda_lstm_recurrence.resident_candidates(op, {"grid": grid.kernels})
    # Registers are not counted here, so a multiprocessor takes eight blocks of these threads.
    for limits, largest in (({"cooperative": False}, 0), ({"multiprocessors": 1}, 256)):
        grid.kernels.set_device(**limits)
        for hidden in (8, 256, 1024):
            gx, h0, c0, w_hh, _, _ = case(1, 1, hidden, 1, False).inputs(torch.float16)
            args: tuple[Any, ...] = (gx, h0, c0, w_hh, None, None, None, False)
            if backward:
                args = (*5 * [None], gx, c0, c0, w_hh, None, None, None)
            reason = candidate.why_not(*args)
            assert (reason is None) == (hidden <= largest), (limits, hidden, reason)
            if reason is not None:
                assert reason.endswith(f"H = {hidden} cannot run at the same time on emulated")
                assert candidate.run is not None
                with pytest.raises(ValueError, match="cudaError"):
                    candidate.run(*args)


def test_chosen_where_a_block_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_recurrence, "gpu_of", lambda x: A100)
    args = (*LstmCase(1, 3, 136, 1, None, None).inputs(torch.bfloat16), None, True)
    with available("cuda"), fuseblock.backend("cuda"):
        assert dispatch.choose("lstm_recurrence", args).variant == "grid"
