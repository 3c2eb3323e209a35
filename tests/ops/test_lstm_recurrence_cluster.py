"""The recurrence's cluster tier, emulated: values over odd sizes, ragged rows, any order of events, layouts, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fuseblock
from fuseblock import dispatch
from fuseblock.launch import cuda_lstm_recurrence
from fuseblock.launch.gpu import A100, H200, RTX_A4000

from ..backends import available
from . import resident_cases
from .lstm_cases import LstmCase, check_backward, check_forward
from .resident_cases import TierOps, case, cluster_classes, passes_of_float32

#: Dtypes with the passes of mma over operands.
KINDS = [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 3)]
BATCHES, HIDDENS, STEPS = (1, 3, 8, 17), (24, 40, 100, 128, 200, 256, 320), (1, 2, 33)


@pytest.fixture
def cluster() -> Iterator[TierOps]:
    ops = TierOps("cluster")
    yield ops
    ops.reset()
    ops.kernels.set_device()


def check(cluster: TierOps, problem: LstmCase, dtype: torch.dtype, passes: int = 1) -> None:
    tf32 = dtype == torch.float32 and passes == 1
    # With gradients that only second derivatives bring, backward never takes two tiles.
    two_tiles = dtype != torch.float32 and cluster.kernels.multiprocessors == 1
    with passes_of_float32(passes):
        check_forward(cluster, problem, dtype, tf32=tf32)
        check_backward(cluster, problem, dtype, (0, 1, 2) if two_tiles else None, tf32=tf32)


#: Every pair of values of two different columns occurs: steps, batch, hidden, directions, lengths, multiprocessors. With one
#: multiprocessor a cluster takes 16 rows, where pieces of 16 bytes are aligned. In float32, where it never does, the last
#: says whether it is one pass (1) or three, batches above 3 have one unit less, so that pieces are not aligned, and 33 steps
#: are 9: the sweep has them all.
PAIRWISE = [
    (33, 3, 24, 2, True, 1),
    (2, 1, 24, 1, False, 132),
    (1, 8, 24, 2, False, 132),
    (2, 17, 24, 1, True, 1),
    (2, 3, 40, 1, True, 132),
    (1, 17, 40, 2, True, 1),
    (33, 8, 40, 1, False, 132),
    (2, 1, 40, 2, False, 1),
    (1, 1, 100, 1, True, 1),
    (2, 8, 100, 2, True, 132),
    (33, 1, 100, 1, False, 132),
    (2, 17, 100, 2, False, 1),
    (2, 8, 128, 2, True, 132),
    (33, 1, 128, 1, True, 1),
    (2, 3, 128, 2, False, 132),
    (1, 17, 128, 1, False, 1),
    (2, 3, 200, 2, True, 132),
    (1, 17, 200, 1, False, 1),
    (2, 8, 256, 1, True, 132),
    (2, 17, 256, 2, False, 1),
    (1, 1, 320, 2, False, 132),
    (2, 8, 320, 1, True, 132),
    (2, 17, 320, 1, True, 1),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", PAIRWISE, ids=str)
def test_parity(cluster: TierOps, sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
    steps, batch, hidden, directions, with_lengths, cluster.kernels.multiprocessors = sizes
    passes = 1
    if dtype == torch.float32:
        steps, hidden, passes = min(steps, 9), hidden - (batch > 3), 3 if sizes[-1] > 1 else 1
    check(cluster, case(steps, batch, hidden, directions, with_lengths), dtype, passes)


@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize("hidden", [500, 512, 640])
def test_clusters_of_16(cluster: TierOps, hidden: int, multiprocessors: int) -> None:
    cluster.kernels.multiprocessors = multiprocessors
    check(cluster, case(2, 9, hidden, 1, True), torch.bfloat16)


@pytest.mark.parametrize(("hidden", "passes"), [(383, 1), (384, 3), (508, 3)])
def test_clusters_of_16_in_float32(cluster: TierOps, hidden: int, passes: int) -> None:
    check(cluster, case(2, 3, hidden, 1, True), torch.float32, passes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "passes"), KINDS, ids=str)
@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("batch", BATCHES)
def test_parity_of_every_size(
    cluster: TierOps, batch: int, hidden: int, multiprocessors: int, dtype: torch.dtype, passes: int
) -> None:
    cluster.kernels.multiprocessors = multiprocessors
    if dtype == torch.float32:  # which has no other use for fewer multiprocessors
        hidden -= multiprocessors == 1
    for steps, directions, with_lengths in itertools.product(STEPS, (1, 2), (False, True)):
        cluster.kernels.set_seed(steps + directions)
        check(cluster, case(steps, batch, hidden, directions, with_lengths), dtype, passes)


#: Threads and blocks in any order, one block behind the others, what is sent arriving soon or late.
@pytest.mark.parametrize(
    ("dtype", "hidden", "multiprocessors", "seeds"),
    [
        (torch.bfloat16, 24, 132, 1),
        (torch.bfloat16, 40, 132, 12),
        (torch.bfloat16, 40, 1, 12),
        (torch.bfloat16, 260, 132, 2),
        (torch.bfloat16, 264, 1, 2),
        (torch.float32, 24, 132, 1),
        (torch.float32, 40, 132, 2),
    ],
)
def test_any_order(
    cluster: TierOps, dtype: torch.dtype, hidden: int, multiprocessors: int, seeds: int
) -> None:
    cluster.kernels.multiprocessors = multiprocessors
    resident_cases.check_any_order(cluster, case(4, 9, hidden, 1, True), dtype, range(1, 1 + seeds))


@pytest.mark.parametrize("multiprocessors", [132, 1])
def test_absent_gradients_mean_zeros(cluster: TierOps, multiprocessors: int) -> None:
    cluster.kernels.multiprocessors = multiprocessors
    for given in [(), (0,), (1,), (2,), (3,), (4,), (0, 1, 2)]:
        check_backward(cluster, case(4, 3, 40, 2, True), torch.bfloat16, given=given)


def test_clusters_and_their_rows(cluster: TierOps) -> None:
    """One tile of 8 rows a cluster; two where tiles outnumber clusters side by side, unless registers are short."""
    for multiprocessors, hidden, batch, directions, forward, backward in [
        (12, 40, 17, 1, (12, 1, 256), (12, 1, 256)),
        (11, 40, 17, 1, (8, 1, 256), (8, 1, 256)),
        (12, 40, 17, 2, (8, 2, 256), (8, 2, 256)),
        (11, 41, 17, 1, (12, 1, 256), (12, 1, 256)),
        (16, 264, 16, 1, (16, 1, 384), (16, 1, 384)),
        (15, 264, 16, 1, (8, 1, 384), (8, 1, 384)),
    ]:
        cluster.kernels.multiprocessors = multiprocessors
        found = resident_cases.launches(cluster, case(1, batch, hidden, directions, False))
        assert found[:2] == [forward, backward]
        assert [blocks for blocks, *_ in found[2:]] == 2 * [-(-batch // 8) * (4 if hidden <= 256 else 8)]
    cluster.kernels.multiprocessors = 1
    assert set(resident_cases.launches(cluster, case(1, 17, 40, 1, False), torch.float32)) == {(24, 1, 256)}


@pytest.mark.parametrize("layout", resident_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(cluster: TierOps, dtype: torch.dtype, layout: str) -> None:
    resident_cases.check_layout(cluster, case(4, 3, 40, 2, False), dtype, layout)


def test_what_inactive_rows_must_ignore_may_be_nan(cluster: TierOps) -> None:
    resident_cases.check_inactive_rows(cluster, case(4, 3, 24, 2, True), torch.float16)


def test_rows_do_not_touch_each_other(cluster: TierOps) -> None:
    resident_cases.check_rows_apart(cluster, case(3, 4, 24, 1, False), torch.float16)


def test_nothing_to_do(cluster: TierOps) -> None:
    resident_cases.check_nothing_to_do(cluster, torch.float16)


def test_sizes_are_those_of_the_header(cluster: TierOps) -> None:
    too_large = []
    for dtype in cluster.tier.dtypes:
        hidden = list(cluster_classes(dtype))
        assert hidden == sorted(hidden)
        assert hidden[-1] == cluster.tier.largest_hidden(dtype, H200)
        too_large.append((dtype, hidden[-1] + 1))
    for dtype, size in [*too_large, (torch.float64, 8)]:
        gx, h0, c0, w_hh, _, _ = case(1, 1, size, 1, False).inputs(dtype)
        with pytest.raises(ValueError, match="cudaError 1"):
            cluster.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_clusters_that_do_not_fit_are_declined(cluster: TierOps, backward: bool, dtype: torch.dtype) -> None:
    """A launch is an error there, so nobody tries."""
    op = "lstm_recurrence_bwd" if backward else "lstm_recurrence"
    (candidate,) = cuda_lstm_recurrence.resident_candidates(op, {"cluster": cluster.kernels})
    for limits in (
        {"largest_cluster": 8},
        {"largest_cluster": 4},
        {"clusters": False},
        {"shared_bytes": 20_000},
    ):
        cluster.kernels.set_device(**limits)
        most = 0 if "clusters" in limits else limits.get("largest_cluster", 16)
        for hidden, (blocks, *_) in cluster_classes(dtype).items():
            gx, h0, c0, w_hh, _, _ = case(1, 1, hidden, 1, False).inputs(dtype)
            args: tuple[Any, ...] = (gx, h0, c0, w_hh, None, None, None, False)
            if backward:
                args = (*5 * [None], gx, c0, c0, w_hh, None, None, None)
            reason = candidate.why_not(*args)
            fits = blocks <= most and "shared_bytes" not in limits
            assert (reason is None) == fits, (limits, hidden, reason)
            if fits:
                continue
            assert f"H = {hidden} cannot run at the same time on H200" in str(reason)
            assert candidate.run is not None
            if "shared_bytes" not in limits:
                with pytest.raises(ValueError, match="cudaError"):
                    candidate.run(*args)


def test_not_on_gpus_without_clusters(cluster: TierOps) -> None:
    w_hh = torch.zeros(1, 4 * 256, 256, dtype=torch.float16)
    for gpu in (A100, RTX_A4000):
        assert cluster.tier.why_not(w_hh, None, None, gpu) == f"the cluster tier does not run on {gpu.name}"
    assert cluster.tier.why_not(w_hh, None, None, replace(H200, capability=(10, 0))) is None


DECLINED = {
    "float64": (LstmCase(2, 3, 24, 1, None, None), torch.float64, "float16 and bfloat16 and float32"),
    "large": (LstmCase(2, 3, 641, 1, None, None), torch.float16, "H = 641"),
    "large float32": (LstmCase(2, 3, 513, 1, None, None), torch.float32, "H = 513"),
    "projection": (LstmCase(2, 3, 24, 1, 8, None), torch.bfloat16, "projection"),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_declined_calls_run_elsewhere_and_say_why(kind: str) -> None:
    resident_cases.check_declined("cluster", *DECLINED[kind])


def test_chosen_above_the_block_tier() -> None:
    with available("cuda"), fuseblock.backend("cuda"):
        for dtype, hidden, variant in (
            (torch.bfloat16, 128, "block"),
            (torch.bfloat16, 129, "cluster"),
            (torch.bfloat16, 640, "cluster"),
            (torch.float32, 129, "cluster"),
            (torch.float32, 512, "cluster"),
        ):
            args = (*LstmCase(2, 1, hidden, 1, None, None).inputs(dtype), None, True)
            assert dispatch.choose("lstm_recurrence", args).variant == variant
            gx, _, c0, w_hh, *_ = args
            backward = (*5 * [None], gx, c0, c0, w_hh, None, None, None)
            assert dispatch.choose("lstm_recurrence_bwd", backward).variant == variant
