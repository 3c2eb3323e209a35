"""What every tier of the recurrence with resident weights is tested for, emulated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fuseblock
from fuseblock import dispatch
from fuseblock.launch import resident_recurrence

from ..backends import available
from ..emulator import load_recurrence
from ..emulator.build import ROOT
from .lstm_cases import LstmCase


class TierOps:
    """The first-order operators of the recurrence, run by one emulated tier alone."""

    def __init__(self, tier: str) -> None:
        self.tier = resident_recurrence.TIERS[tier]
        self.kernels = load_recurrence(tier)

    def lstm_recurrence(self, *args: Any) -> tuple[Tensor, ...]:
        return resident_recurrence.lstm_recurrence(self.tier, self.kernels, *args)

    def lstm_recurrence_bwd(self, *args: Any) -> tuple[Tensor, ...]:
        return resident_recurrence.lstm_recurrence_bwd(self.tier, self.kernels, *args)

    def both(self, inputs: tuple[Any, ...], given: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
        """All outputs of a forward pass, and of a backward pass of the outputs whose places are in `given`."""
        gx, h0, c0, w_hh, w_hr, lengths = inputs
        outputs = self.lstm_recurrence(gx, h0, c0, w_hh, w_hr, lengths, None, True)
        cotangents = [x if n in given else None for n, x in enumerate(outputs)]
        saved = (outputs[3], outputs[4], c0, w_hh, w_hr, lengths, None)
        return [*outputs, *self.lstm_recurrence_bwd(*cotangents, *saved)]

    def reset(self) -> None:
        self.kernels.multiprocessors = 132
        self.kernels.set_seed(0)


def case(steps: int, batch: int, hidden: int, directions: int, with_lengths: bool) -> LstmCase:
    """With lengths from 0 to steps, every row another one, or without."""
    lengths = tuple((7 * b + steps) % (steps + 1) for b in range(batch)) if with_lengths else None
    return LstmCase(steps, batch, hidden, directions, None, lengths)


def assert_equal(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_any_order(ops: TierOps, problem: LstmCase, dtype: torch.dtype, seeds: Iterable[int]) -> None:
    """Bit for bit: the kernels wait where they must, and nothing depends on who comes first."""
    inputs = problem.inputs(dtype)
    want = ops.both(inputs)
    for seed in seeds:
        ops.kernels.set_seed(seed)
        assert_equal(ops.both(inputs), want)


def cluster_classes(dtype: torch.dtype) -> dict[int, tuple[int, ...]]:
    """What the cluster tier's header lists for a dtype.

    H -> (blocks, parts of k, tiles of weights in registers: of any tensors; aligned, one tile of rows; two).
    """
    header = (ROOT / "csrc" / "cuda" / "lstm_recurrence_cluster.h").read_text().replace("\\\n", "")
    name = "FLOAT32_CLASSES" if dtype == torch.float32 else "CLUSTER_CLASSES"
    found = re.findall(r"X\((\d[^)]*)\)", re.search(rf"{name}\(X\)(.*)", header)[1])
    return {hidden: tuple(rest) for hidden, *rest in (map(int, text.split(", ")) for text in found)}


@contextmanager
def passes_of_float32(count: int) -> Iterator[None]:
    """PyTorch may, with 1, or may not, with 3, round the operands of float32 products to TF32 meanwhile."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if count == 1 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def launches(ops: TierOps, problem: LstmCase, dtype: torch.dtype = torch.float16) -> list[tuple[int, ...]]:
    """`last_launch` of a forward pass, of backward, and of backward with each gradient that second derivatives bring."""
    gx, h0, c0, w_hh, *_ = problem.inputs(dtype)
    y, _, _, gates, c = ops.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)
    found = [ops.kernels.last_launch()]
    for d_gates, d_c in ((None, None), (gates, None), (None, c)):
        ops.lstm_recurrence_bwd(y, None, None, d_gates, d_c, gates, c, c0, w_hh, None, None, None)
        found.append(ops.kernels.last_launch())
    return found


def check_declined(variant: str, problem: LstmCase, dtype: torch.dtype, reason: str) -> str:
    """A tier says why it does not run a call. Returns who does."""
    args = (*problem.inputs(dtype), None, True)
    with available("cuda"), fuseblock.backend("cuda"):
        explanation = dict(fuseblock.explain("lstm_recurrence", *args).reasons)
        assert reason in str(explanation[f"cuda ({variant})"])
        chosen = dispatch.choose("lstm_recurrence", args).variant
    assert chosen != variant
    return chosen


LAYOUTS = ("batch first", "sliced", "shifted", "expanded")


def check_layout(ops: TierOps, problem: LstmCase, dtype: torch.dtype, layout: str) -> None:
    """The same values, wherever tensors lie."""
    gx, h0, c0, w_hh, *_ = problem.inputs(dtype)
    y, h_n, c_n, gates, c = ops.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)
    dy = torch.ones_like(y)
    want = ops.lstm_recurrence_bwd(dy, None, None, None, None, gates, c, c0, w_hh, None, None, None)

    def other(x: Tensor) -> Tensor:
        if layout == "batch first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            return torch.cat([x, x.new_full(x.shape, float("nan"))], -1)[..., : x.shape[-1]]
        flat = torch.nn.functional.pad(x.flatten(), (1, 0), value=float("nan"))
        return flat[1:].view(x.shape)

    if layout == "expanded":
        dy = torch.ones((), dtype=dy.dtype).expand(dy.shape)
    else:
        gx, h0, c0, w_hh, dy, gates, c = map(other, (gx, h0, c0, w_hh, dy, gates, c))
    assert_equal(ops.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)[:3], (y, h_n, c_n))
    got = ops.lstm_recurrence_bwd(dy, None, None, None, None, gates, c, c0, w_hh, None, None, None)
    assert_equal(got, want)


def check_inactive_rows(ops: TierOps, problem: LstmCase, dtype: torch.dtype) -> None:
    """What is beyond a row's length may be NaN."""
    gx, h0, c0, w_hh, _, lengths = problem.inputs(dtype)
    assert lengths is not None
    beyond = torch.arange(problem.n_steps)[:, None] >= lengths[None]
    y, h_n, c_n, gates, c = ops.lstm_recurrence(gx, h0, c0, w_hh, None, lengths, None, True)
    saved = (c, c0, w_hh, None, lengths, None)
    want = ops.lstm_recurrence_bwd(y, h_n, c_n, gates, c, gates, *saved)
    gx, dy, d_gates, dirty = (x.masked_fill(beyond[..., None], float("nan")) for x in (gx, y, gates, gates))
    assert_equal(ops.lstm_recurrence(gx, h0, c0, w_hh, None, lengths, None, True), (y, h_n, c_n, gates, c))
    assert_equal(ops.lstm_recurrence_bwd(dy, h_n, c_n, d_gates, c, dirty, *saved), want)


def check_rows_apart(ops: TierOps, problem: LstmCase, dtype: torch.dtype) -> None:
    """A row that is not a number stays alone in its tile."""
    gx, h0, c0, w_hh, *_ = problem.inputs(dtype)
    want, *_ = ops.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, False)
    gx[0, 2] = float("nan")
    got, *_ = ops.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, False)
    assert got[:, 2].isnan().all()
    others = [n for n in range(problem.batch) if n != 2]
    assert torch.equal(got[:, others], want[:, others])


def check_nothing_to_do(ops: TierOps, dtype: torch.dtype) -> None:
    """No rows; no units."""
    for batch, hidden in ((0, 24), (3, 0)):
        gx, h0, c0, w_hh, *_ = case(2, max(batch, 1), max(hidden, 1), 1, False).inputs(dtype)
        gx, h0, c0 = gx[:, :batch, : 4 * hidden], h0[:, :batch, :hidden], c0[:, :batch, :hidden]
        w_hh = w_hh[:, : 4 * hidden, :hidden]
        y, *_, dgx, dh0, dc0, _ = ops.both((gx, h0, c0, w_hh, None, None))
        assert y.shape == (*gx.shape[:2], hidden)
        assert (dgx.shape, dh0.shape, dc0.shape) == (gx.shape, h0.shape, c0.shape)
