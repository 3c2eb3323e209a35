"""``python -m benchmarks tune`` on norms, activations and filters: what is measured, and that dispatch understands it."""

from __future__ import annotations

import math

import pytest
import torch

from fuseblock import _tables, dispatch, ops
from fuseblock.dispatch import Candidate

from .benchmarks_package import load
from .tables import entry, table

passes = load("tune_passes")

KINDS = [(op, kind) for op, kinds in passes._KINDS.items() for kind in kinds]


@pytest.fixture(autouse=True)
def _no_interpreted_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in passes.OPS:
        compiled = [c for c in dispatch.candidates(op) if c.name in ("cpu", "reference")]
        monkeypatch.setitem(dispatch._CANDIDATES, op, tuple(compiled))


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize(("op", "kind"), KINDS)
def test_candidates_are_checked(op: str, kind: str, last: bool) -> None:
    """What is right is found right, and a wrong first result is not."""
    for precision in ("bfloat16", "float32"):
        question = passes.PassQuestion(op, passes.PassCase(op, "", 2, 6, 4, kind, last), "train", precision)
        contest = question.contest("cpu", seed=0)
        assert question.labels("cpu") == list(contest.rivals)  # by which the next run knows what is measured
        (rival,) = contest.rivals.values()
        results = rival.results()
        assert contest.check(results).green
        name, first = next(iter(results.items()))
        assert not contest.check(results | {name: first * 1.1}).green


@pytest.mark.parametrize(("op", "kind"), KINDS)
def test_dispatch_asks_what_is_measured(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a question is that of the operator's call; the entry decides who runs."""
    able = tuple(Candidate(name, None, lambda *args: None) for name in ("cuda", "triton"))
    monkeypatch.setitem(dispatch._CANDIDATES, op, able)
    question = passes.PassQuestion(op, passes.PassCase(op, "", 16, 64, 16, kind), "train", "float16")
    key, args = question.key(), question.fakes("cuda")
    with _tables.using(table(**{op: [entry(key, "triton", cuda=3.0, triton=2.0)]})):
        chosen = dispatch.choose(op, args)
        assert chosen.name == "triton"
        assert "measured 2.0 us against 3.0 us (cuda)" in dispatch.rule(op, args, chosen)
    with _tables.using(table(**{op: [entry(key | {"dtype": "float32"}, "triton", cuda=3.0, triton=2.0)]})):
        assert dispatch.choose(op, args).name == "cuda"


def test_questions() -> None:
    """No key twice, once a dtype; every operator's kinds in both layouts."""
    found = passes.questions(["bfloat16", "tf32", "ieee"])
    keys = [(question.op, *key.items()) for question, key in found]
    assert len(set(keys)) == len(keys)
    assert {question.precision for question, _ in found} == {"bfloat16"}
    seen = {(q.op, q.case.kind, q.case.channels_last) for q, _ in found}
    assert seen == {(op, kind, last) for op, kind in KINDS for last in (True, False)}
    assert {q.op for q, _ in passes.questions(["float32"], ["*filter*", "*upfirdn2d"])} == {"upfirdn2d"}


def test_every_operator_has_its_arguments_where_the_keys_look() -> None:
    """By the schemas: positions of what keys read."""
    x, wide = torch.empty(2, 3, 4, 4), torch.empty(3)
    forward = x, wide, wide, None, None, None, None, 1e-5, "relu", 0.1, True, "", True, False
    outputs = ops.batch_norm_act(*forward)
    saved = wide, wide, None, None, outputs[1], outputs[3], outputs[4], None
    options = "relu", 0.1, True, "", 1e-5
    second = x, wide, wide, None, None, x, x, *saved, *options, False
    keys = {
        "batch_norm_act": forward,
        "batch_norm_act_bwd": (x, x, *saved, *options, True, False, False, False),
        "batch_norm_act_bwd_bwd": second,
        "bias_act": (x, wide, None, 2, 0.1, 1.0, math.inf, False),
    }
    for op, args in keys.items():
        question = dispatch.question(op)
        assert question is not None
        key = dict(question.key(args))
        assert {"batch": 2, "channels": 3, "positions": 16}.items() <= key.items()
        if op.startswith("batch_norm_act"):
            assert (key["training"], key["per_sample"], key["residual"]) == (True, False, False)
        if op == "batch_norm_act_bwd":
            assert (key["dx"], key["sums"]) == (True, False)
    assert len(second) == len(torch.ops.fuseblock.batch_norm_act_bwd_bwd.default._schema.arguments)
