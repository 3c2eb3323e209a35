"""``python -m benchmarks tune`` on spectral norm: what is measured, and that dispatch understands the answer."""

from __future__ import annotations

import pytest
import torch

import fuseblock
from fuseblock import _tables, dispatch

from .backends import DEVICE, available
from .benchmarks_package import load
from .tables import entry, table

spectral = load("tune_spectral")

CASE = spectral.SpectralCase("small", ((6, 3, 3, 3), (4, 6), (5, 4, 2, 2)))


@pytest.mark.parametrize(
    ("op", "mode"), [(spectral.OPS[0], "train"), (spectral.OPS[0], "forward"), (spectral.OPS[1], "train")]
)
def test_candidates_are_checked(op: str, mode: str) -> None:
    """Also when they have run before, which moves us and vs; and a wrong result is noticed."""
    with available("triton"), fuseblock.backend("triton"):
        for precision in ("bfloat16", "float32"):
            question = spectral.SpectralQuestion(op, CASE, mode, precision)
            contest = question.contest(DEVICE, seed=0)
            assert list(contest.rivals) == question.labels(DEVICE)
            assert {"triton", "aten"} <= set(contest.rivals)
            for rival in contest.rivals.values():
                for _ in range(2):
                    results = rival.results()
                    assert contest.check(results).green
            for name, value in results.items():
                assert not contest.check(results | {name: value * 1.1}).green


@pytest.mark.parametrize("op", spectral.OPS)
def test_dispatch_asks_what_is_measured(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    able = tuple(dispatch.Candidate(name, None, lambda *args: None) for name in ("triton", "aten"))
    monkeypatch.setitem(dispatch._CANDIDATES, op, able)
    question = spectral.SpectralQuestion(op, CASE, "train", "float32")
    key, args = question.key(), question.fakes("cuda")
    assert (key["weights"], key["elements"], key["layout"]) == (3, CASE.elements, "channels-last")
    assert dispatch.choose(op, args).name == "triton"
    for changed, chosen in (({}, "aten"), ({"dtype": "bfloat16"}, "triton"), ({"elements": 4000}, "triton")):
        with _tables.using(table(**{op: [entry(key | changed, "aten", triton=3.0, aten=2.0)]})):
            assert dispatch.choose(op, args).name == chosen
    with _tables.using(table(**{op: [entry(key, "aten", triton=3.0, aten=2.0)]})):
        assert "measured 2.0 us against 3.0 us (triton)" in dispatch.rule(op, args, able[1])
        with fuseblock.backend("triton"):
            assert dispatch.choose(op, args).name == "triton"


def test_explain() -> None:
    weights, us, vs = [torch.ones(3, 4, requires_grad=True)], [torch.ones(3)], [torch.ones(4)]
    told = fuseblock.explain("spectral_norm", weights, us, vs, n_power_iterations=0)
    assert told.op == "spectral_norm"
    assert dict(told.reasons).keys() == {"cpu", "triton", "aten", "reference"}
    assert [part.op for part in told.parts] == ["backward"]
    assert fuseblock.explain("spectral_norm", [weights[0].detach()], us, vs).parts == ()
    with fuseblock.backend("aten"):
        told = fuseblock.explain("spectral_norm", weights, us, vs)
        assert (told.chosen, told.rule) == ("aten", "backend 'aten' is forced; the first that can run")
    with torch.device("meta"), pytest.raises(ValueError, match="expected as many us"):
        fuseblock.explain("spectral_norm", weights, us, [])
    with pytest.raises(ValueError, match="expected one of block, lstm, spectral_norm"):
        fuseblock.explain("spectral_norm_bwd")


def test_questions() -> None:
    """No key twice; models in both layouts, forward with and without iterations, backward."""
    found = spectral.questions(["bfloat16", "tf32"])
    keys = [(question.op, *key.items()) for question, key in found]
    assert len(set(keys)) == len(keys)
    assert {question.precision for question, _ in found} == {"bfloat16"}
    sngan = [(q.op, q.mode, q.case.channels_last) for q, _ in spectral.questions(["float32"], ["sngan32"])]
    assert sorted(sngan) == sorted(
        (op, mode, last)
        for op, mode in (
            ("spectral_norm", "train"),
            ("spectral_norm", "forward"),
            ("spectral_norm_bwd", "train"),
        )
        for last in (True, False)
    )
