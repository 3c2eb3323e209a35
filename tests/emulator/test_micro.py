"""The microbenchmarks' kernels, emulated: they compute what they claim to do, whatever the order of events."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fuseblock.launch.gpu import A100, H200

from .. import benchmarks_package
from . import _import
from .build import ROOT, Unavailable, build

cases = benchmarks_package.load("micro.cases")
library = benchmarks_package.load("micro.library")
measure = benchmarks_package.load("micro.measure")
command = benchmarks_package.load("micro.__main__")

#: The copy is of less, and nothing here waits for 128 blocks.
CASES = [
    dataclasses.replace(case, problem=cases._copy(1 << 16)) if case.kernel == "copy" else case
    for case in cases.CASES
    if case.unit != "clusters"
]


@pytest.fixture(scope="module")
def emulated():
    """(library, module that controls the emulator)."""
    binding = ROOT / "tests" / "emulator" / "binding_micro.cpp"
    try:
        path = build("emulated_micro", library.SOURCES, binding=binding)
    except Unavailable as reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")
    module = _import("emulated_micro", path)

    def call(function, launch) -> int:
        address = ctypes.cast(function, ctypes.c_void_p).value
        return module.call(address, ctypes.addressof(launch))

    return library.Library(path, call), module


@pytest.fixture
def kernels(emulated) -> Iterator:
    yield emulated[0]
    emulated[1].set_seed(0)
    emulated[1].set_clusters(True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_kernels_do_what_is_measured(emulated, kernels, case) -> None:
    """Also launched again on the same workspace, and for an odd and an even number of rounds."""
    blocks = case.cluster if case.cluster == 16 else 2 * case.cluster if case.cluster > 1 else 3
    run = measure.Run(case, kernels, blocks, 64 << 10, "cpu")
    for seed, rounds in ((0, 5), (1, 4), (2, 1)):
        emulated[1].set_seed(seed)
        if case.kernel == "count":
            run.problem.result.zero_()
            for _ in range(rounds):
                run.launch(rounds)
            assert run.matches(rounds)
        else:
            assert run.is_right(rounds), run.problem.result
            assert case.kernel == "copy" or bool((run.clocks > 0).all())


def test_a_wrong_result_is_noticed(kernels) -> None:
    for case in CASES:
        run = measure.Run(case, kernels, case.cluster, 64 << 10, "cpu")
        run.launch(3)
        assert run.matches(1 if case.kernel == "count" else 3), case.label
        run.problem.result.view(torch.int32).flatten()[-1] += 1
        assert not run.matches(3), case.label


def test_refused_launches_say_why(emulated, kernels) -> None:
    def resident(kernel: str, **sizes: int) -> tuple[int, str]:
        return kernels.resident(kernel, **({"threads": 256, "cluster": 1, "shared_bytes": 0} | sizes))

    assert resident("cluster_barrier", cluster=16, shared_bytes=200 << 10) == (128, "")
    assert resident("grid_barrier", shared_bytes=200 << 10) == (132, "")
    emulated[1].set_clusters(False)
    assert resident("swap", cluster=2) == (0, "this GPU has no clusters of blocks")
    run = measure.Run(next(c for c in CASES if c.kernel == "swap"), kernels, 2, 0, "cpu")
    with pytest.raises(RuntimeError, match=r"^swap: cudaError 9$"):
        run.launch(1)


def test_cases_are_distinct_and_predicted() -> None:
    assert len({case.label for case in cases.CASES}) == len(cases.CASES)
    assert all(0 < low <= high for low, high in (case.predicted for case in cases.CASES))
    assert {case.unit for case in cases.CASES} == {*measure._MEASURES, "clusters"}


@pytest.mark.parametrize("unit", ["us", "clk", "us/launch", "GB/s", "clusters"])
def test_rows(emulated, kernels, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """What a GPU measures, with a clock that always says a millisecond, and graphs that run when they are captured."""

    def milliseconds(step) -> float:
        step()
        return 1.0

    monkeypatch.setattr(measure, "_milliseconds", milliseconds)
    for name, value in {"FEW": 2, "MANY": 4, "SAMPLES": 3}.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "present", lambda: H200)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    case = next(c for c in [*CASES, *cases.CASES] if c.unit == unit)
    case = dataclasses.replace(case, most_blocks=3 * case.cluster)
    row = measure.measure(case, kernels, "cpu")
    assert (row.status, row.reason) == (measure.MEASURED, "")
    wanted = {"us": 0.0, "us/launch": 250.0, "GB/s": 5 * 2 * (1 << 16) / 1e6, "clusters": 64.0}
    assert unit == "clk" or row.value.median == pytest.approx(wanted[unit])
    assert unit not in ("us", "clk") or row.clocks_of_round > 0

    def other_problem(*args):
        return dataclasses.replace(case.problem(*args), expected=lambda rounds: torch.zeros(1))

    row = measure.measure(dataclasses.replace(case, problem=other_problem), kernels, "cpu")
    assert row.status == (measure.MEASURED if unit == "clusters" else measure.WRONG)
    if case.cluster > 1:
        emulated[1].set_clusters(False)
        row = measure.measure(case, kernels, "cpu")
        assert (row.status, row.value, row.reason) == (
            measure.REFUSED,
            None,
            "this GPU has no clusters of blocks",
        )


def test_ratio_is_to_the_nearer_end_of_the_prediction() -> None:
    assert [measure.ratio(x, (2.0, 4.0)) for x in (1.0, 3.0, 8.0)] == [0.5, 1.0, 2.0]


def test_rows_of_every_state_fit_the_table() -> None:
    spread = measure.Spread(1.5, 1.4, 1.6)
    fields = {"case": "a/2", "cluster": 2, "unit": "us", "predicted": (0.12, 0.3)}
    rows = [
        measure.Row(**fields, status=measure.MEASURED, blocks=132, value=spread, ratio=5.0, us_of_round=1.5),
        measure.Row(**fields, status=measure.REFUSED, reason="this GPU has no clusters of blocks"),
        measure.Row(**fields, status=measure.FAILED, reason="swap: cudaError 9"),
    ]
    assert {len(command._cells(row)) for row in rows} == {len(command._HEAD)}


def test_older_devices_refuse_bulk_copies(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "present", lambda: A100)
    row = measure.measure(next(c for c in CASES if c.kernel == "gather_copies"), kernels, "cpu")
    assert (row.status, row.reason) == (measure.REFUSED, "this GPU has no bulk copies")


@pytest.mark.slow
def test_the_compiled_library_answers_without_a_gpu_too() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    kernels = library.Library(library.build((9, 0)))
    for case in cases.CASES:
        blocks, refusal = kernels.resident(
            case.kernel, threads=case.threads, cluster=case.cluster, shared_bytes=0
        )
        assert bool(refusal) == (blocks == 0) and (refusal or torch.cuda.is_available())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the microbenchmarks need an NVIDIA GPU, and PyTorch sees none"
    ]
    assert command.main(["--list", "--case", "*barrier*"]) == 0
    assert "cluster barrier and exchange/16" in capsys.readouterr().out
    assert command.main(["--case", "nothing"]) == 2
