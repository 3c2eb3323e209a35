"""``python -m benchmarks tune`` on convolution blocks: what is measured, and that blocks understand the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fuseblock
from fuseblock import _conv_engine, _convolution, _tables, dispatch

from .backends import _ON_GPU, DEVICE, available
from .benchmarks_package import load
from .tables import entry, table

tune, blocks = load("tune"), load("tune_blocks")

pytestmark = pytest.mark.usefixtures("short_samples")

SMALL = blocks.BlockCase("small", 3, 4, 4, 2, 1, 6, 2)
UP = blocks.BlockCase(
    "up", 4, 3, 4, 2, 1, 3, 2, transposed=True, norm=False, activation="tanh", channels_last=False
)


def ask(precisions: Any, patterns: Any) -> Any:
    found = [
        blocks.BlockQuestion(op, case, mode, precision)
        for op, case in (("conv_norm_act", SMALL), ("conv_act", UP))
        for mode in ("train", "forward")
        for precision in precisions
    ]
    return [(question, question.key()) for question in found]


def test_a_run_writes_entries_for_blocks(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    argv = [
        "--device",
        "cpu",
        "--out",
        str(out),
        "--seconds",
        "0.001",
        "--dtype",
        "float32",
        "--dtype",
        "bfloat16",
    ]
    assert tune.main(argv, ask) == tune.COMPLETE
    ops = json.loads(out.read_text())["ops"]
    assert {op: len(entries) for op, entries in ops.items()} == {"conv_norm_act": 4, "conv_act": 4}
    assert all(set(e["times"]) == {"aten"} for entries in ops.values() for e in entries)
    keys = [e["key"] for e in ops["conv_act"]]
    assert {(k["mode"], k["dtype"], k["kind"], k["layout"]) for k in keys} == {
        (mode, dtype, "transposed", "contiguous")
        for mode in ("train", "forward")
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, marks=_ON_GPU)
        for op, case in (("conv_norm_act", SMALL), ("conv_act", UP), ("norm_act_conv", SMALL))
    ],
)
def test_both_engines_take_part_where_they_can(op: str, case: Any) -> None:
    """And a wrong result is noticed."""
    question = blocks.BlockQuestion(op, case, "train", "float32")
    with available("triton"), fuseblock.backend("triton"):
        contest = question.contest(DEVICE, seed=0)
        assert list(contest.rivals) == ["aten", "triton"]
        ran: dict[str, list[str]] = {}
        run = dispatch.run
        for name, rival in contest.rivals.items():
            seen = ran.setdefault(name, [])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    dispatch, "run", lambda op, args, seen=seen: (seen.append(op), run(op, args))[1]
                )
                results = rival.results()
            assert contest.check(results).green
            assert not contest.check(results | {"y": results["y"] * 1.01}).green
    assert not any("conv" in op for op in ran["aten"])
    assert any("conv" in op for op in ran["triton"])


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=_ON_GPU) for op in ("conv2d_stats", "conv_transpose2d_subpixel")]
)
def test_our_kernels_among_each_other(op: str) -> None:
    """Where there are several: in 16 bit, channels-last, from 64 channels on."""
    case = replace(blocks.CASES[1 if op == "conv2d_stats" else 3], image=2, batch=1)
    question = blocks._kernels(case, "bfloat16")
    assert question.op == op
    with available("triton"), fuseblock.backend("triton"):
        contest = question.contest(DEVICE, seed=0)
        assert list(contest.rivals) == question.labels(DEVICE) == ["triton", "triton (tall tiles)"]
        assert all(contest.check(rival.results()).green for rival in contest.rivals.values())
        for other in (replace(case, channels_last=False), replace(case, channels=32)):
            assert list(blocks._kernels(other, "bfloat16").contest(DEVICE, 0).rivals) == ["triton"]
        assert list(blocks._kernels(case, "float32").contest(DEVICE, 0).rivals) == ["triton"]


def test_our_kernels_are_asked_about_first() -> None:
    asked = {question.op for question, _ in blocks.questions(["bfloat16"])}
    engines = {"conv_norm_act", "conv_act", "norm_act_conv"}
    assert asked == {*engines, "conv2d_act", "conv2d_stats", "conv_transpose2d_subpixel"}
    assert {question.op for question, _ in blocks.questions(["float32"])} == engines


def test_questions() -> None:
    """All cases, no key twice; matrix products' TF32 is no matter."""
    found = blocks.questions(["bfloat16", "tf32"])
    names = {question.case.name for question, _ in found}
    assert {case.name for case in blocks.CASES} < names
    keys = [(question.op, *key.items()) for question, key in found]
    assert len(set(keys)) == len(keys)
    assert {question.precision for question, _ in found} == {"bfloat16"}
    only = blocks.questions(["float32"], ["sngan*"])
    assert {question.case.name for question, _ in only} == {"sngan32"}
    assert len(only) == 6  # two layouts, two modes; in training, the norm before the convolution, too
    assert len(blocks.questions(["float16"], ["sngan*"])) == 7


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that are said to run on a GPU that is not there."""
    with available("triton"):
        for op in ("conv2d_stats", "conv_transpose2d_subpixel", "conv2d_act", "norm_act_conv_bwd"):
            kernel = dispatch.Candidate("triton", None, lambda *args: None)
            monkeypatch.setitem(dispatch._CANDIDATES, op, (kernel, dispatch.candidates(op)[-1]))
        yield


@pytest.mark.usefixtures("able")
def test_blocks_ask_the_table() -> None:
    key = blocks.BlockQuestion("conv_norm_act", blocks.CASES[1], "forward", "bfloat16").key()
    geometry = _convolution.Geometry((2, 2), (1, 1), (1, 1), False, (0, 0), 1)

    def choose(
        batch: int = 100,
        dtype: torch.dtype = torch.bfloat16,
        layout: torch.memory_format = torch.channels_last,
    ) -> tuple[str, str]:
        x, w = (
            torch.empty(shape, device="cuda", dtype=dtype, memory_format=layout)
            for shape in ((batch, 64, 30, 34), (128, 64, 4, 4))
        )
        return _conv_engine.choose(_conv_engine.Call("conv_norm_act", x, w, None, geometry))

    with FakeTensorMode():
        with _tables.using(table(conv_norm_act=[entry(key, "triton", aten=20.0, triton=15.0)])):
            engine, why = choose()
            assert engine == "triton"
            assert "table test.json: measured 15.0 us against 20.0 us (aten)" in why
            assert choose(layout=torch.contiguous_format)[0] == "aten"
            assert choose(batch=20)[0] == "aten"  # less than a quarter of the batch that was measured
            assert choose(dtype=torch.float16)[0] == "aten"
            with _conv_engine.measuring("aten"):
                assert choose() == ("aten", "it is being measured")
        with _tables.using(table(conv_norm_act=[entry(key, "aten", aten=10.0, triton=15.0)])):
            assert choose()[0] == "aten"
        with _tables.using(_tables.Table("", {}, "no table")):
            assert choose() == ("aten", "plain rule: no table")


@pytest.mark.usefixtures("able")
def test_norms_before_convolutions_ask_the_table() -> None:
    key = blocks.BlockQuestion("norm_act_conv", blocks.CASES[1], "train", "bfloat16").key()
    assert key["mode"] == "train"
    geometry = _convolution.Geometry((2, 2), (1, 1), (1, 1), False, (0, 0), 1)
    with FakeTensorMode():
        x, w = (
            torch.empty(
                shape,
                device="cuda",
                dtype=torch.bfloat16,
                memory_format=torch.channels_last,
                requires_grad=True,
            )
            for shape in ((100, 64, 30, 34), (128, 64, 4, 4))
        )
        call = _conv_engine.Call("norm_act_conv", x, w, None, geometry, "leaky_relu", 0.2)
        with _tables.using(table(norm_act_conv=[entry(key, "triton", aten=20.0, triton=15.0)])):
            assert _conv_engine.choose(call)[0] == "triton"
            assert _conv_engine.choose(call._replace(activation="prelu"))[0] == "aten"
        with _tables.using(table(conv_norm_act=[entry(key, "triton", aten=20.0, triton=15.0)])):
            assert _conv_engine.choose(call)[0] == "aten"
