"""The recurrence's block tier, emulated: values over odd sizes, ragged rows, absent gradients, layouts, declined calls."""

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
from fuseblock.launch import resident_recurrence
from fuseblock.launch.gpu import A100, H200, RTX_A4000

from ..backends import available
from ..emulator.build import ROOT
from . import plain_lstm, resident_cases
from .lstm_cases import LstmCase, check_backward, check_forward
from .resident_cases import TierOps, case, passes_of_float32

#: Dtypes with the passes of mma over operands.
KINDS = [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 3)]
BLOCK = resident_recurrence.TIERS["block"]
BATCHES, HIDDENS, STEPS = (1, 3, 8, 17), (24, 40, 100, 128), (1, 2, 33)
#: Instead of these H in float32: for aligned rows, of which some fill words of 16 bytes but not 8 columns, and for others.
HIDDENS_FLOAT32 = {24: (28, 30), 40: (64, 45), 100: (92, 93), 128: (128, 126)}


def check(block: TierOps, problem: LstmCase, dtype: torch.dtype, passes: int) -> None:
    tf32 = dtype == torch.float32 and passes == 1
    # With gradients that only second derivatives bring, backward never takes two tiles.
    two_tiles = dtype != torch.float32 and block.kernels.multiprocessors == 1
    with passes_of_float32(passes):
        check_forward(block, problem, dtype, tf32=tf32)
        check_backward(block, problem, dtype, (0, 1, 2) if two_tiles else None, tf32=tf32)


@pytest.fixture
def block() -> Iterator[TierOps]:
    ops = TierOps("block")
    yield ops
    ops.reset()


#: Every pair of values of two different columns occurs: steps, batch, hidden, directions, lengths, multiprocessors. The
#: last says in float32, where a block never takes 16 rows, whether it is one pass (1) or three.
PAIRWISE = [
    (2, 1, 24, 1, False, 132),
    (33, 3, 24, 2, True, 1),
    (1, 8, 24, 2, False, 1),
    (2, 17, 24, 1, True, 132),
    (33, 1, 40, 2, False, 132),
    (2, 3, 40, 1, True, 1),
    (1, 17, 40, 2, True, 1),
    (33, 8, 40, 1, False, 132),
    (1, 1, 100, 1, True, 1),
    (2, 8, 100, 2, True, 132),
    (1, 3, 100, 1, False, 132),
    (33, 17, 100, 2, False, 1),
    (1, 1, 128, 2, True, 132),
    (33, 8, 128, 1, True, 1),
    (2, 3, 128, 2, False, 132),
    (2, 17, 128, 1, False, 1),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", PAIRWISE, ids=str)
def test_parity(block: TierOps, sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
    steps, batch, hidden, directions, with_lengths, block.kernels.multiprocessors = sizes
    if dtype == torch.float32:
        hidden = HIDDENS_FLOAT32[hidden][batch > 3]
    passes = 3 if sizes[-1] > 1 else 1
    check(block, case(steps, batch, hidden, directions, with_lengths), dtype, passes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "passes"), KINDS, ids=str)
@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("batch", BATCHES)
def test_parity_of_every_size(
    block: TierOps, batch: int, hidden: int, multiprocessors: int, dtype: torch.dtype, passes: int
) -> None:
    block.kernels.multiprocessors = multiprocessors
    if dtype == torch.float32:  # which has no other use for fewer multiprocessors
        hidden = HIDDENS_FLOAT32[hidden][multiprocessors == 1]
    for steps, directions, with_lengths in itertools.product(STEPS, (1, 2), (False, True)):
        block.kernels.set_seed(steps + directions)
        check(block, case(steps, batch, hidden, directions, with_lengths), dtype, passes)


def test_three_passes_round_sums_as_seldom_as_one(block: TierOps) -> None:
    """Small products are summed apart: otherwise this case is beyond the bound."""
    check(block, case(1, 8, 64, 1, False), torch.float32, 3)


def test_passes_are_for_pytorchs_matmul_precision_to_say() -> None:
    with passes_of_float32(3):  # restores what is set by other means, too
        for precision, passes in {"high": 1, "medium": 1, "highest": 3}.items():
            torch.set_float32_matmul_precision(precision)
            assert resident_recurrence.passes(torch.float32) == passes
            assert resident_recurrence.passes(torch.float16) == 1
    with passes_of_float32(1):
        assert resident_recurrence.passes(torch.float32) == 1


@pytest.mark.parametrize("passes", [1, 3])
def test_operands_of_float32(block: TierOps, passes: int) -> None:
    """One product, of two numbers of 24 bits: rounded to TF32 (and not truncated) in one pass, whole in three."""
    operand = plain_lstm.tf32 if passes == 1 else torch.clone
    gx, h0, c0, w_hh = torch.ones(1, 1, 16), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 16, 4)
    w_hh[0, 0, 0] = w = torch.tensor(1 + 0.75 * 2**-10 + 2**-23)
    h0[0, 0, 0] = h = torch.tensor(1 + 0.75 * 2**-10 - 2**-23)
    with passes_of_float32(passes):
        y, _, _, gates, c = block.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)
        dgx, dh0, _, _ = block.lstm_recurrence_bwd(
            torch.full_like(y, 0.7), None, None, None, None, gates, c, c0, w_hh, None, None, None
        )
    eps = torch.finfo(torch.float32).eps
    want = (1 + operand(w).double() * operand(h).double()).sigmoid()
    assert abs(gates[0, 0, 0] - want) < eps
    want = operand(w).double() * operand(dgx[0, 0, 0]).double()
    assert abs(dh0[0, 0, 0] - want) < 2 * eps * abs(want)


@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_threads_in_any_order(block: TierOps, dtype: torch.dtype, multiprocessors: int) -> None:
    block.kernels.multiprocessors = multiprocessors
    resident_cases.check_any_order(block, case(5, 9, 40, 2, True), dtype, range(3))


def test_rows_of_both_tiles_have_lengths_of_their_own(block: TierOps) -> None:
    block.kernels.multiprocessors = 1
    problem = case(5, 17, 40, 1, True)
    assert problem.lengths is not None
    assert all(a != b for a, b in zip(problem.lengths, problem.lengths[8:], strict=False))
    check(block, problem, torch.bfloat16, 1)


@pytest.mark.parametrize("multiprocessors", [132, 1])
def test_absent_gradients_mean_zeros(block: TierOps, multiprocessors: int) -> None:
    block.kernels.multiprocessors = multiprocessors
    dtype = torch.bfloat16 if multiprocessors == 1 else torch.float32
    for given in [(), (0,), (1,), (2,), (3,), (4,), (0, 1, 2)]:
        check_backward(block, case(4, 3, 40, 2, True), dtype, given=given)


def test_blocks(block: TierOps) -> None:
    """One tile of 8 rows a block; two where tiles outnumber multiprocessors; one again where registers are short."""
    for multiprocessors, hidden, batch, directions, forward, backward in [
        (4, 40, 17, 1, (3, 1, 128), (3, 1, 128)),
        (2, 40, 17, 1, (2, 1, 128), (2, 1, 128)),
        (4, 40, 17, 2, (2, 2, 128), (2, 2, 128)),
        (3, 8, 24, 1, (3, 1, 64), (3, 1, 64)),
        (2, 65, 24, 1, (3, 1, 192), (3, 1, 192)),
        (1, 96, 16, 1, (1, 1, 192), (1, 1, 192)),
        (1, 104, 16, 1, (1, 1, 256), (2, 1, 256)),
    ]:
        block.kernels.multiprocessors = multiprocessors
        found = resident_cases.launches(block, case(1, batch, hidden, directions, False))
        assert found[:2] == [forward, backward]
        assert [blocks for blocks, *_ in found[2:]] == 2 * [-(-batch // 8)]


@pytest.mark.parametrize("layout", resident_cases.LAYOUTS)
@pytest.mark.parametrize(("dtype", "hidden"), [(torch.bfloat16, 40), (torch.float32, 28)], ids=str)
def test_layouts(block: TierOps, dtype: torch.dtype, hidden: int, layout: str) -> None:
    resident_cases.check_layout(block, case(4, 3, hidden, 2, False), dtype, layout)


def test_what_inactive_rows_must_ignore_may_be_nan(block: TierOps) -> None:
    resident_cases.check_inactive_rows(block, case(4, 3, 24, 2, True), torch.float16)


@pytest.mark.parametrize(("dtype", "passes"), KINDS, ids=str)
def test_rows_do_not_touch_each_other(block: TierOps, dtype: torch.dtype, passes: int) -> None:
    with passes_of_float32(passes):
        resident_cases.check_rows_apart(block, case(3, 4, 24, 1, False), dtype)


def test_nothing_to_do(block: TierOps) -> None:
    resident_cases.check_nothing_to_do(block, torch.float16)


def test_sizes_are_those_of_the_header(block: TierOps) -> None:
    header = (ROOT / "csrc" / "cuda" / "lstm_recurrence_block.h").read_text()
    classes = [int(x) for x in re.findall(r"X\((\d+)\)", header)]
    assert classes == sorted(classes)
    shared = int(re.search(r"kLstmBlockSharedBytesAbove96 = (\d+);", header)[1])
    for dtype in BLOCK.dtypes:
        for gpu in (H200, A100, replace(A100, shared_bytes=shared)):
            assert BLOCK.largest_hidden(dtype, gpu) == classes[-1]
        for gpu in (RTX_A4000, replace(A100, shared_bytes=shared - 1)):
            assert BLOCK.largest_hidden(dtype, gpu) == (96 if dtype == torch.float32 else classes[-1])
    for dtype, hidden in [*((dtype, classes[-1] + 1) for dtype in BLOCK.dtypes), (torch.float64, 8)]:
        gx, h0, c0, w_hh, _, _ = case(1, 1, hidden, 1, False).inputs(dtype)
        with pytest.raises(ValueError, match="cudaError 1"):
            block.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, False)


DECLINED = {
    "float64": (LstmCase(2, 3, 24, 1, None, None), torch.float64, "float16 and bfloat16 and float32"),
    "large": (LstmCase(2, 3, 129, 1, None, None), torch.float16, "H = 129"),
    "large float32": (LstmCase(2, 3, 129, 1, None, None), torch.float32, "H = 129"),
    "projection": (LstmCase(2, 3, 24, 1, 8, None), torch.bfloat16, "projection"),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_declined_calls_run_elsewhere_and_say_why(kind: str) -> None:
    resident_cases.check_declined("block", *DECLINED[kind])


def test_chosen_before_per_step_but_not_for_second_derivatives() -> None:
    args = (*LstmCase(2, 3, 24, 1, None, None).inputs(torch.bfloat16), None, True)
    with available("cuda"), fuseblock.backend("cuda"):
        assert dispatch.choose("lstm_recurrence", args).variant == "block"
        second = dispatch.candidates("lstm_recurrence_bwd_bwd")
        by_label = {c.label: c for c in second}
        assert by_label["cuda (block)"].run is None
        assert "first derivatives only" in str(by_label["cuda (block)"].why_not())
        assert by_label["cuda (per step)"].run is not None


def test_packed_rows_are_declined() -> None:
    reason = BLOCK.why_not(torch.zeros(32, 8, dtype=torch.float16), None, torch.tensor([2, 1]))
    assert reason is not None
    assert "packed" in reason
