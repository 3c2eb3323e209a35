"""What a launch of the recurrence's grid tier takes: host side of csrc/cuda/lstm_recurrence_grid_plan.h.

A team of blocks holds w_hh of one direction. The launcher chooses among teams of different sizes; here are all that fit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .gpu import Gpu

#: By the bytes of an element: half of a warp's tiles of weights, 512 bytes each, and how many of these are in registers;
#: the others are in shared memory.
CLASSES = {2: (2, 4, 6, 8, 12, 16, 24, 28, 32), 4: (4, 8, 16, 32)}
_TILES_IN_REGISTERS = {2: 32, 4: 28}
GROUPS = (1, 2, 4, 8)
_WARPS, _COUNTER = 8, 128


@dataclass(frozen=True)
class Team:
    """Blocks that hold one direction between them.

    Attributes:
        groups: of 8 units whose cells a block owns.
        steps: the class, one of `CLASSES` of its dtype.
        rows, columns: the blocks, as many row groups as column groups; forward has one row.
    """

    groups: int
    steps: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Of the team."""
        return self.rows * self.columns

    def shared_bytes(self, tiles: int, itemsize: int, backward: bool) -> int:
        """Shared memory of a block that takes so many tiles of 8 rows at a time."""
        weights = max(0, 2 * self.steps - _TILES_IN_REGISTERS[itemsize]) * _WARPS * 512
        operand = 512 * self.steps if backward else 2048 * self.steps // self.groups + 1024 * _WARPS
        return weights + tiles * operand + _WARPS * 5 * 64 * itemsize

    def workspace_bytes(self, tiles: int, backward: bool) -> int:
        """What the blocks exchange in two steps, and their counters."""
        if not backward:
            return _COUNTER + 2 * tiles * 2048 * self.steps // self.groups
        partial_sums = self.blocks * self.groups * self.rows * 256
        return (self.rows + 2 * self.columns) * _COUNTER + 2 * tiles * (
            self.rows * 512 * self.steps + partial_sums
        )


def teams(dtype: torch.dtype, hidden: int, backward: bool, gpu: Gpu) -> Iterator[Team]:
    """Teams that fit on that GPU, one block on each multiprocessor."""
    k = 32 // dtype.itemsize
    for groups in GROUPS:
        wanted = -(-hidden // 128) * groups * 16 // k
        classes = CLASSES[dtype.itemsize]
        steps = next((s for s in classes if s >= wanted and s * k % (16 * groups) == 0), None)
        if steps is None:
            continue
        columns = steps * k // (16 * groups)
        team = Team(groups, steps, -(-hidden // (columns * groups * 8)), columns)
        if not backward:
            team = Team(groups, steps, 1, -(-hidden // (groups * 8)))
        fits = team.shared_bytes(1, dtype.itemsize, backward) <= gpu.shared_bytes
        if fits and 0 < team.blocks <= gpu.multiprocessors:
            yield team


@functools.cache
def largest_hidden(dtype: torch.dtype, gpu: Gpu) -> int:
    """The H up to which there is a team for both passes on that GPU; 0 where its tensor cores lack the instructions."""
    if gpu.capability < (8, 0):
        return 0
    hidden = 0
    while all(any(teams(dtype, hidden + 8, backward, gpu)) for backward in (False, True)):
        hidden += 8
    return hidden


def least_blocks(dtype: torch.dtype, hidden: int, backward: bool, gpu: Gpu) -> int:
    """Of the smallest team. A GPU shared with others may not run as many at the same time as it has multiprocessors."""
    return min((team.blocks for team in teams(dtype, hidden, backward, gpu)), default=0)


def workspace_bytes(
    dtype: torch.dtype, directions: int, batch: int, hidden: int, backward: bool, gpu: Gpu
) -> int:
    """Enough bytes for whatever plan the launcher makes."""
    most = 0
    for team in teams(dtype, hidden, backward, gpu):
        for tiles in range(1, min(8 // team.groups, -(-batch // 8)) + 1):
            jobs = directions * -(-batch // (8 * tiles))
            count = min(gpu.multiprocessors // team.blocks, jobs)
            most = max(most, count * team.workspace_bytes(tiles, backward))
    return most
