"""What dispatch and `explain` make of tables of measurements.

Tensors of a GPU that is not there are PyTorch's fake ones: choices look at their shapes, dtypes and device only.
"""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fuseblock
from fuseblock import _engine, _tables, dispatch

from .tables import B, H, T, entry, recurrence_key, table


@pytest.fixture(autouse=True)
def _no_table_of_another_test() -> Iterator[None]:
    _tables.of.cache_clear()
    yield
    _tables.of.cache_clear()


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode():
        yield


def layer_key(**changes: Any) -> dict[str, Any]:
    key = {"mode": "forward", "dtype": "bfloat16", "tf32": "", "cudnn": "standard", "hidden": H, "proj": 0}
    return {**key, "input": 64, "batch": B, "steps": T, "layers": 1, "directions": 1, **changes}


# --- an operator's candidates


def recurrence_args(
    device: str = "cuda", *, hidden: int = H, batch: int = B, steps: int = T
) -> tuple[Any, ...]:
    gx = torch.empty(steps, batch, 4 * hidden, dtype=torch.float16, device=device)
    h0 = gx.new_empty(1, batch, hidden)
    return gx, h0, h0.float(), gx.new_empty(1, 4 * hidden, hidden), None, None, None, True


def backward_args(device: str = "cuda") -> tuple[Any, ...]:
    gates, h0, c0, w_hh, *_ = recurrence_args(device)
    c = c0.new_empty(T, B, H)
    return h0.new_empty(T, B, H), None, None, None, None, gates, c, c0, w_hh, None, None, None


def candidate(name: str, variant: str, largest: int = 1 << 30) -> dispatch.Candidate:
    def why_not(*args: Any) -> str | None:
        *_, w_hh = (a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3)
        if w_hh.device.type != "cuda":
            return "tensors are on cpu"
        return None if w_hh.shape[-1] <= largest else f"H above {largest}"

    return dispatch.Candidate(name, lambda *args: (name, variant), why_not, ("cuda",), variant)


@pytest.fixture(params=["lstm_recurrence", "lstm_recurrence_bwd"])
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator of the recurrence with made-up candidates, of which the block tier takes H up to 128 only."""
    listed = (
        candidate("cuda", "block", 128),
        candidate("triton", "persistent"),
        candidate("cuda", "per step"),
    )
    reference = dispatch.Candidate("reference", lambda *args: None, lambda *args: None)
    monkeypatch.setitem(dispatch._CANDIDATES, request.param, (*listed, reference))
    return str(request.param)


def args_of(op: str, device: str = "cuda") -> tuple[Any, ...]:
    return recurrence_args(device) if op == "lstm_recurrence" else backward_args(device)


def times(best: str, **micros: float) -> dict[str, Any]:
    names = {"block": "cuda (block)", "persistent": "triton (persistent)", "per_step": "cuda (per step)"}
    return {
        "key": recurrence_key(),
        "times": {names.get(name, name): t for name, t in micros.items()},
        "best": names.get(best, best),
    }


@pytest.mark.usefixtures("fake_cuda")
def test_the_table_decides_among_candidates(op: str) -> None:
    args = args_of(op)
    with _tables.using(table(**{op: [times("per_step", persistent=20.3, per_step=12.1)]})):
        assert dispatch.choose(op, args).label == "cuda (per step)"
        explanation = fuseblock.explain(op, *args)
    assert explanation.chosen == "cuda (per step)"
    assert explanation.reasons[0] == ("cuda (per step)", None)
    assert "table test.json: measured 12.1 us against 20.3 us (triton (persistent)) at hidden = 256" in str(
        explanation
    )
    with _tables.using(table(other=[times("per_step", per_step=12.1)])):
        assert dispatch.choose(op, args).label == "triton (persistent)"
        assert "plain rule: table test.json has no measurement" in str(fuseblock.explain(op, *args))


@pytest.mark.usefixtures("fake_cuda")
def test_only_those_that_can_run_and_were_measured_are_taken(op: str) -> None:
    args = args_of(op)
    with _tables.using(table(**{op: [times("block", block=1.0, per_step=12.1)]})):
        assert dispatch.choose(op, args).label == "cuda (per step)"
        assert "measured 12.1 us against 1.0 us (cuda (block))" in fuseblock.explain(op, *args).rule
    with _tables.using(table(**{op: [times("block", block=1.0, gone=0.5)]})):
        assert dispatch.choose(op, args).label == "triton (persistent)"
        assert "plain rule: nobody whom table test.json lists at" in fuseblock.explain(op, *args).rule


@pytest.mark.usefixtures("fake_cuda")
def test_a_forced_backend_leaves_the_table_the_choice_of_its_variants(op: str) -> None:
    args = args_of(op)
    with _tables.using(table(**{op: [times("persistent", persistent=1.0, per_step=5.0)]})):
        for name, label in (("cuda", "cuda (per step)"), ("triton", "triton (persistent)")):
            with fuseblock.backend(name):
                assert dispatch.choose(op, args).label == label
                explanation = fuseblock.explain(op, *args)
            assert explanation.chosen == label
            assert f"backend '{name}' is forced; table test.json: measured" in explanation.rule
        with fuseblock.backend("reference"):
            rule = fuseblock.explain(op, *args).rule
        assert rule == "backend 'reference' is forced; the first that can run", "others of the table could"
        with fuseblock.backend("cpu"):
            with pytest.raises(fuseblock.BackendError, match="not implemented"):
                dispatch.choose(op, args)
            assert fuseblock.explain(op, *args).chosen == "nobody"


@pytest.mark.usefixtures("fake_cuda")
def test_candidates_registered_later_are_ordered_anew(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_of(op)
    with _tables.using(table(**{op: [times("per_step", persistent=2.0, per_step=1.0)]})):
        assert dispatch.choose(op, args).label == "cuda (per step)"
        monkeypatch.setitem(dispatch._CANDIDATES, op, (candidate("triton", "persistent"),))
        assert dispatch.choose(op, args).label == "triton (persistent)"


def test_tables_say_nothing_about_cpu_tensors(op: str) -> None:
    args = args_of(op, "cpu")
    with _tables.using(table(**{op: [times("per_step", per_step=1.0)]})):
        assert dispatch.choose(op, args).label == "reference"
        assert fuseblock.explain(op, *args).rule == "the first that can run"


def test_on_a_cpu_tables_cost_nothing() -> None:
    """The question costs one look at a tensor: well under a microsecond."""
    args = recurrence_args("cpu", hidden=8, batch=1, steps=1)
    preference = min(
        timeit.repeat(lambda: dispatch.preference("lstm_recurrence", args), number=2000, repeat=5)
    )
    assert preference / 2000 < 2e-6


@pytest.mark.usefixtures("fake_cuda")
def test_the_recurrences_question_in_every_order_of_derivative() -> None:
    forward, backward = recurrence_args(), backward_args()
    second = (None,) * 4 + backward + (backward[5],)
    for op, args in (
        ("lstm_recurrence", forward),
        ("lstm_recurrence_bwd", backward),
        ("lstm_recurrence_bwd_bwd", second),
    ):
        question = dispatch.question(op)
        assert question is not None
        assert _tables.plain_key(question.key(args)) == recurrence_key()
    question = dispatch.question("lstm_recurrence")
    assert question is not None
    inference = (*recurrence_args(steps=70_000, batch=1)[:7], False)
    assert dict(question.key(inference))["mode"] == "forward"
    assert dict(question.key(inference))["steps"] == 1024
    assert dispatch.question("lstm_gates") is None


def test_the_question_of_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    gx, h0, c0, w_hh, *rest = recurrence_args("cpu")
    question = dispatch.question("lstm_recurrence")
    assert question is not None
    try:
        for precision, word in (("tf32", "matmul"), ("ieee", "")):
            matmul.fp32_precision = precision
            assert dict(question.key((gx, h0, c0, w_hh, *rest)))["tf32"] == ""
            assert dict(question.key((gx.float(), h0, c0, w_hh, *rest)))["tf32"] == word
    finally:
        matmul.fp32_precision = before


@pytest.mark.usefixtures("fake_cuda")
def test_explain_of_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an H200; also Triton's candidates, where they are compiled rather than interpreted."""
    pytest.importorskip("triton")
    from fuseblock.launch import _triton

    monkeypatch.setattr(_triton, "INTERPRETED", False)
    reasons = dict(fuseblock.explain("lstm_recurrence", *recurrence_args(hidden=128)).reasons)
    assert reasons["triton (persistent)"] is reasons["triton (per step)"] is None
    reasons = dict(fuseblock.explain("lstm_recurrence_bwd", *backward_args()).reasons)
    assert "does not fit on chip" in str(reasons["triton (persistent)"])
    assert reasons["triton (fused step)"] is reasons["triton (per step)"] is None


# --- a layer's engine


def layer(dtype: torch.dtype = torch.bfloat16, hidden: int = H, width: int = 64, **kwargs: Any) -> Any:
    x = torch.empty(T, B, width, dtype=dtype, device="cuda")
    weights = [(x.new_empty(4 * hidden, width), x.new_empty(4 * hidden, hidden), None, None, None)]
    return fuseblock.explain("lstm", x, None, None, weights, **kwargs)


@pytest.mark.usefixtures("fake_cuda")
def test_the_table_chooses_the_engine() -> None:
    measured = table(lstm=[entry(layer_key(), "ours", ours=12.1, aten=20.3)])
    with _tables.using(measured):
        explanation = layer()
        assert explanation.chosen == "ours"
        assert explanation.rule.startswith(
            "table test.json: measured 12.1 us against 20.3 us (aten) at hidden = 256"
        )
        # Not measured: another dtype.
        assert layer(torch.float32).chosen == "aten"
        with fuseblock.backend("aten"):
            assert layer().chosen == "aten"
    with _tables.using(table(lstm=[entry(layer_key(), "aten", ours=20.3, aten=12.1)])):
        assert layer().chosen == "aten"
        with _engine.always_ours():
            assert layer().chosen == "ours"
        assert layer(lengths=torch.empty(B, dtype=torch.int64, device="cuda")).chosen == "ours"


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("ragged", [None, "lengths", "batch_sizes"])
def test_explain_names_the_tier_of_each_layer(ragged: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (candidate("cuda", "block", 128), candidate("cuda", "per step"))
    for op in ("lstm_recurrence", "lstm_recurrence_bwd"):
        monkeypatch.setitem(dispatch._CANDIDATES, op, listed)
    x = torch.empty(T, B, 64, dtype=torch.bfloat16, device="cuda")
    w_ih, w_hr = x.new_empty(4 * H, 64), x.new_empty(32, H)
    weights = [(w_ih, x.new_empty(4 * H, 32), None, None, w_hr)] * 2
    weights += [(x.new_empty(4 * 160, 64), x.new_empty(4 * 160, 160), None, None, None)] * 2
    arguments: dict[str, Any] = {}
    if ragged == "lengths":
        arguments = {"lengths": torch.empty(B, dtype=torch.int64, device="cuda")}
    elif ragged == "batch_sizes":
        x = x.flatten(0, 1)
        arguments = {"batch_sizes": [B, *[1] * (T - 1)]}  # fake tensors have no values
    key = recurrence_key(dtype="bfloat16", ragged=ragged is not None, directions=2, proj=32, mode="forward")
    measured = {**times("per_step", per_step=1.0, block=2.0), "key": key}
    with _tables.using(table(lstm_recurrence=[measured])), _engine.always_ours():
        explanation = fuseblock.explain("lstm", x, None, None, weights, bidirectional=True, **arguments)
        assert [part.op for part in explanation.parts] == ["layer 0, forward", "layer 1, forward"]
        assert [part.chosen for part in explanation.parts] == ["cuda (per step)"] * 2
        first, second = explanation.parts
        assert (
            "measured 1.0 us against 2.0 us (cuda (block)) at hidden = 256, proj = 32, batch = 16"
            in first.rule
        )
        assert second.rule.startswith("plain rule: table test.json has no measurement")
        assert dict(second.reasons)["cuda (block)"] == "H above 128"
        assert "  layer 0, forward: cuda (per step)\n    rule: table test.json: measured" in str(explanation)
        w_hr.requires_grad_()
        explanation = fuseblock.explain("lstm", x, None, None, weights, bidirectional=True, **arguments)
        assert [part.op for part in explanation.parts][:2] == ["layer 0, forward", "layer 0, backward"]
        assert len(explanation.parts) == 4


@pytest.mark.usefixtures("fake_cuda")
def test_without_its_gpu_a_layer_is_pytorchs_own() -> None:
    if torch.cuda.is_available():
        pytest.skip("the GPU is here")
    found = layer()
    assert (found.chosen, found.rule) == ("aten", "plain rule: GPU 0 is not here")


@pytest.mark.usefixtures("fake_cuda")
def test_without_a_table_a_layer_on_a_gpu_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEBLOCK_CONFIGS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "No Such GPU")
    explanation = layer()
    assert explanation.chosen == "aten"
    assert explanation.rule == "plain rule: no table for No Such GPU (python -m benchmarks tune writes one)"


@pytest.mark.usefixtures("fake_cuda")
def test_training_and_autocast_are_other_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        entry(layer_key(), "aten", aten=1.0),
        entry(layer_key(mode="train"), "ours", ours=1.0),
        entry(layer_key(dtype="float16"), "ours", ours=1.0),
    ]
    x = torch.empty(T, B, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [(x.new_empty(4 * H, 64), x.new_empty(4 * H, H), None, None, None)]
    with _tables.using(table(lstm=entries)):
        assert layer().chosen == "aten"
        assert fuseblock.explain("lstm", x, None, None, weights).chosen == "ours"
        with torch.no_grad():
            assert fuseblock.explain("lstm", x, None, None, weights).chosen == "aten"
        # torch.autocast("cuda") switches itself off without a GPU.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
        assert layer().chosen == "ours"
        assert layer(torch.float64).chosen == "aten"


def test_the_layers_question() -> None:
    matmul, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = matmul.fp32_precision, rnn.fp32_precision
    x = torch.empty(2000, B, 64)
    weights = [
        (torch.empty(4 * H, n), torch.empty(4 * H, 32), None, None, torch.empty(32, H)) for n in (64, 32)
    ]
    try:
        for precisions, word in ((("tf32", "ieee"), "matmul"), (("ieee", "tf32"), "rnn")):
            matmul.fp32_precision, rnn.fp32_precision = precisions
            key = _tables.plain_key(_engine.layer_key(x, weights, 1, training=True))
            changes = {"mode": "train", "dtype": "float32", "tf32": word, "proj": 32, "steps": 1024}
            assert key == layer_key(**changes, layers=2)
            key = _tables.plain_key(_engine.layer_key(x.bfloat16(), weights, 2, training=False))
            assert key == layer_key(proj=32, steps=1024, directions=2)
    finally:
        matmul.fp32_precision, rnn.fp32_precision = before


@pytest.mark.parametrize(
    ("dtype", "hidden", "width", "batch", "mode", "algorithm"),
    [
        ("float16", 192, 8, 1, "forward", "small H"),
        ("float16", 192, 8, 1, "train", "standard"),
        ("float16", 128, 8, 1, "train", "small H"),
        ("float64", 128, 8, 1, "train", "standard"),
        ("float16", 256, 128, 8, "train", "persistent"),
        ("bfloat16", 256, 128, 8, "train", "standard"),
        ("float16", 256, 64, 8, "train", "standard"),
        ("float16", 200, 128, 8, "train", "standard"),
        ("float16", 1152, 128, 8, "train", "standard"),
        ("float16", 256, 128, 12, "train", "standard"),
        ("float16", 256, 128, 136, "train", "standard"),
    ],
)
def test_the_algorithm_that_cudnn_is_asked_for(
    dtype: str, hidden: int, width: int, batch: int, mode: str, algorithm: str
) -> None:
    args = (getattr(torch, dtype), mode, hidden, width, batch)
    assert _engine._cudnn_algorithm(*args, 1, 1, False) == algorithm
    if algorithm == "persistent":
        assert _engine._cudnn_algorithm(*args, 2, 1, False) == "standard"
        assert _engine._cudnn_algorithm(*args, 1, 2, False) == "standard"
    assert _engine._cudnn_algorithm(*args, 1, 1, True) == "standard"
