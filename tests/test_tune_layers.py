"""``python -m benchmarks tune``, small LSTM layers: what is asked, how near, and that contests are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fuseblock import _fused_layer, _tables

from .benchmarks_package import load

layers, tune, cases = (load(name) for name in ("tune_layers", "tune", "cases"))

SMALL = cases.Case("small", "tests", 5, 3, 2, 4, bidirectional=True)


def test_what_is_asked() -> None:
    asked = layers.questions(["float16", "float32"])
    assert {key["dtype"] for _, key in asked} == {"float16"}
    assert {key["mode"] for _, key in asked} == {"forward", "train"}
    assert all(key["hidden"] <= 128 and key["input"] <= 32 for _, key in asked)
    assert {True, False} == {key["ragged"] for _, key in asked}
    names = {question.case.name for question, _ in asked}
    assert {"sensor-t1000", "spread-layer-128-b64-t8"} <= names
    assert not names & {"odd-200", "cell-256"}
    assert [q.case.name for q, _ in layers.questions(["bfloat16"], ["sensor-*"])] == ["sensor-t1000"] * 2


@pytest.mark.parametrize("sizes", [(4, 1, 1), (32, 256, 60), (16, 4, 20)])
def test_spread_sizes_are_near_enough_to_everything_between(sizes: tuple[int, int, int]) -> None:
    inputs, batch, steps = sizes
    entries = [
        {"key": key, "times": {"fused": 1.0}, "best": "fused"}
        for question, key in layers.questions(["float16"], ["spread-layer-*"])
    ]
    table = _tables.Table("t.json", _tables.parse({"schema": 1, "ops": {"lstm_layer": entries}}))
    for hidden in (16, 50, 128):
        w_hh = torch.empty(4 * hidden, hidden, dtype=torch.float16)
        b = torch.empty(4 * hidden)
        weights = w_hh.new_empty(4 * hidden, inputs), w_hh, b, b, None
        for ragged in (False, True) if batch > 1 else (False,):
            x = torch.empty(steps, batch, inputs)
            key = _fused_layer.layer_key(x, weights, 1, ragged, training=True)
            assert table.answer("lstm_layer", key).order, (hidden, ragged)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("fill", [1.0, 0.5])
def test_a_contest(mode: str, fill: float) -> None:
    question = layers.LayerQuestion("lstm_layer", replace(SMALL, fill=fill), mode, "bfloat16")
    contest = question.contest("cpu", seed=0)
    assert list(contest.rivals) == question.labels("cpu") == ["apart"]
    results = contest.rivals["apart"].results()
    assert contest.check(results).green
    assert not contest.check({**results, "y": results["y"] + 1}).green
    assert (results["gates"].numel() > 0) == (mode == "train")


def test_a_table(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    question = layers.LayerQuestion("lstm_layer", SMALL, "forward", "float16")
    argv = ["--device", "cpu", "--out", str(out), "--seconds", "0.001"]
    assert tune.main(argv, lambda *_: [(question, question.key())]) == tune.COMPLETE
    (entry,) = json.loads(out.read_text())["ops"]["lstm_layer"]
    assert entry["best"] == "apart"
