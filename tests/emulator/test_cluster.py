"""Clusters in the emulator: right kernels give right values whatever the order of events, broken ones are noticed."""

from __future__ import annotations

import pytest

from .test_emulator import run

CORRECT = [
    "gather_bulk",
    "gather_bulk_16",
    "gather_bulk_1",
    "gather_store_async",
    "gather_store_and_arrive",
    "gather_store_and_barrier",
    "multicast",
]


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels(name: str) -> None:
    status, output = run(name, seeds=12)
    assert (status, set(output.splitlines())) == (0, {"right"})


@pytest.mark.parametrize("name", ["single_buffer", "single_stage"])
def test_buffers_that_are_used_again_too_early_hold_wrong_values(name: str) -> None:
    status, output = run(name, seeds=12)
    assert status == 0
    assert output.splitlines().count("wrong") >= 10


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_wait", "one arrival too many at the mbarrier"),
        ("wrong_parity", "one arrival too many at the mbarrier"),
        ("no_arrive", "in phase 0 (1 of 1 arrivals and -128 bytes missing)"),
        ("too_few_bytes", "in phase 0 (0 of 1 arrivals and -4 bytes missing)"),
        ("too_many_bytes", "in phase 0 (0 of 1 arrivals and 4 bytes missing)"),
        ("early_exit", "returns while cp.async.bulk"),
        ("no_start", "may not have started yet (no cluster barrier was passed)"),
        ("foreign_mbarrier", "cp.async.bulk: the mbarrier is not in the block that receives the data"),
        ("arrive_twice", "ends before a thread that waits for the phase before it has seen that"),
        ("init_twice", "mbarrier.init: the mbarrier at byte 0"),
        ("not_initialised", "mbarrier.arrive.expect_tx: there is no mbarrier at"),
        ("overwritten", "was overwritten"),
        ("beyond", "cp.async.bulk: 32 bytes at byte 1"),
        ("odd_size", "cp.async.bulk: 24 bytes are not a multiple of 16"),
        ("no_such_block", "mapa: the cluster has no block 4"),
        ("unpaired", "barrier.cluster.wait without barrier.cluster.arrive"),
        ("no_init_fence", "no fence.mbarrier_init after the initialisation of the mbarrier"),
        ("no_proxy_fence", "cp.async.bulk: no fence.proxy.async since the source was written"),
        ("multicast_left", "a thread returns while its cp.async.bulk is under way"),
    ],
)
def test_mistakes_are_reported(name: str, complaint: str) -> None:
    for seed in range(4):
        status, output = run(name, seed=seed)
        assert status == 1
        assert complaint in output


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("resident_h200", "1024 "),
        ("resident_shared", "128 "),
        ("resident_cooperative", "264 "),
        ("resident_small", "0 a cluster of this size does not fit on this GPU"),
        ("resident_a100", "0 this GPU has no clusters of blocks\nerror 9"),
        ("resident_alone", "0 this GPU has no cooperative launches"),
        ("resident_much", "0 a block would need more shared memory than this GPU has"),
    ],
)
def test_devices_that_are_too_small_refuse(name: str, output: str) -> None:
    """How many blocks run at the same time, or why none does; 9 is cudaErrorInvalidConfiguration."""
    assert run(name) == (0, output.strip())


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_accept_correct_kernels(variant: str, name: str) -> None:
    for seed in (0, 1, 2):
        assert run(name, variant=variant, seed=seed) == (0, "right")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single_buffer", "single_stage"])
def test_thread_sanitizer_sees_buffers_that_are_used_again_too_early(name: str) -> None:
    status, output = run(name, variant="tsan")
    assert status == 66
    assert "data race" in output
