"""Tables of measurements: the file, the nearest shape, and what dispatch and `explain` make of it.

Tensors of a GPU that is not there are PyTorch's fake ones: choices look at their shapes, dtypes and device only.
"""

from __future__ import annotations

import json
import timeit
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fuseblock
from fuseblock import _engine, _tables, dispatch

H, B, T = 256, 16, 100


@pytest.fixture(autouse=True)
def _no_table_of_another_test() -> Iterator[None]:
    _tables.of.cache_clear()
    yield
    _tables.of.cache_clear()


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode():
        yield


def recurrence_key(**changes: Any) -> dict[str, Any]:
    key = {"dtype": "float16", "tf32": "", "ragged": False, "mode": "train", "hidden": H, "proj": 0}
    return {**key, "batch": B, "steps": T, "directions": 1, **changes}


def layer_key(**changes: Any) -> dict[str, Any]:
    key = {"mode": "forward", "dtype": "bfloat16", "tf32": "", "cudnn": "standard", "hidden": H, "proj": 0}
    return {**key, "input": 64, "batch": B, "steps": T, "layers": 1, "directions": 1, **changes}


def entry(key: dict[str, Any], best: str, **times: float) -> dict[str, Any]:
    return {"key": key, "times": {name.replace("_", " "): t for name, t in times.items()}, "best": best}


def table(**ops: list[dict[str, Any]]) -> _tables.Table:
    return _tables.Table("test.json", _tables.parse({"schema": 1, "ops": ops}))


def asked(key: dict[str, Any]) -> _tables.Key:
    return tuple(key.items())


# --- the nearest measurement


def test_the_nearest_in_the_logarithm_of_sizes_answers() -> None:
    sizes = ((200, 16, "a"), (400, 16, "b"), (256, 64, "c"))
    found = table(op=[entry(recurrence_key(hidden=h, batch=b), name, **{name: 1.0}) for h, b, name in sizes])

    def nearest(hidden: int, batch: int) -> tuple[str, ...]:
        return found.answer("op", asked(recurrence_key(hidden=hidden, batch=batch))).order

    # 282 is nearer to 200 than to 400 by their difference, and by their ratio as well; 285 by the difference only.
    assert nearest(282, 16) == ("a",)
    assert nearest(285, 16) == ("b",)
    assert nearest(256, 40) == ("c",)


def test_a_factor_of_4_in_the_batch_is_as_far_as_one_of_2_in_hidden() -> None:
    sizes = ((320, 16, "a"), (256, 24, "b"))
    found = table(op=[entry(recurrence_key(hidden=h, batch=b), name, **{name: 1.0}) for h, b, name in sizes])
    assert found.answer("op", asked(recurrence_key())).order == ("b",)


@pytest.mark.parametrize(
    ("name", "near", "far"),
    [
        ("hidden", (128, 512), (127, 513)),
        ("batch", (4, 64), (3, 65)),
        ("steps", (13, 800), (12, 801)),
        ("directions", (1,), (2,)),
    ],
)
def test_a_size_out_of_reach_leaves_the_plain_rule(
    name: str, near: tuple[int, ...], far: tuple[int, ...]
) -> None:
    found = table(op=[entry(recurrence_key(), "a", a=1.0)])
    for value in near:
        assert found.answer("op", asked(recurrence_key(**{name: value}))).order == ("a",)
    for value in far:
        answer = found.answer("op", asked(recurrence_key(**{name: value})))
        assert answer.order == ()
        assert answer.rule("a") == "plain rule: table test.json has no measurement of op near these sizes"


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.bfloat16}, {"ragged": True}, {"mode": "forward"}, {"tf32": "matmul"}, {"proj": 64}],
)
def test_kinds_must_be_equal(change: dict[str, Any]) -> None:
    found = table(op=[entry(recurrence_key(), "a", a=1.0)])
    assert found.answer("op", asked(recurrence_key(dtype=torch.float16))).order == ("a",)
    assert found.answer("op", asked(recurrence_key(**change))).order == ()
    assert found.answer("another", asked(recurrence_key())).order == ()
    assert found.answer("op", asked({**recurrence_key(), "further": 1})).order == ()


def test_best_comes_first_then_the_fastest() -> None:
    found = table(op=[entry(recurrence_key(), "b", a=3.0, b=1.01, c=1.0, d=2.0)])
    answer = found.answer("op", asked(recurrence_key()))
    assert answer.order == ("b", "c", "d", "a")
    assert answer.rule("d") == (
        "table test.json: measured 2.0 us against 1.0 us (b), 1.0 us (c), 3.0 us (a) "
        "at hidden = 256, proj = 0, batch = 16, steps = 100, directions = 1"
    )


def test_a_size_of_zero_is_a_size() -> None:
    found = table(op=[entry(recurrence_key(batch=1), "a", a=1.0)])
    assert found.answer("op", asked(recurrence_key(batch=0))).order == ("a",)


# --- the file


def write(folder: Path, document: Any, name: str = "nvidia-h200.json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "nvidia-a100-sxm4-40gb-mig-1g-5gb.json"),
    ],
)
def test_file_name(gpu: str, name: str) -> None:
    assert _tables.file_name(gpu) == name


def test_a_folder_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, packaged = tmp_path / "own", tmp_path / "kernels"
    monkeypatch.delenv("FUSEBLOCK_CONFIGS", raising=False)
    assert _tables.folders()[-1].parts[-2:] == ("kernels", "configs")
    monkeypatch.setenv("FUSEBLOCK_CONFIGS", str(own))
    assert _tables.folders()[0] == own
    monkeypatch.setattr(_tables, "folders", lambda: [own, packaged])
    missing = _tables.load("NVIDIA H200")
    assert missing.answer("op", ()).rule("a") == (
        "plain rule: no table for NVIDIA H200 (python -m benchmarks tune writes one)"
    )
    for folder, best in ((packaged, "a"), (own, "b")):
        write(folder, {"schema": 1, "ops": {"op": [entry(recurrence_key(), best, a=1.0, b=1.0)]}})
        answer = _tables.load("NVIDIA H200").answer("op", asked(recurrence_key()))
        assert answer.order[0] == best


GOOD = entry(recurrence_key(), "a", a=1.0)
BROKEN = {
    "no JSON": ('{"schema": 1,', "Expecting"),
    "no text": ("\udcff", "decode"),
    "a list": ([], "file: expected an object"),
    "another schema": ({"schema": 2, "ops": {}}, "schema: expected 1"),
    "no operators": ({"schema": 1}, "ops: expected an object"),
    "no list": ({"schema": 1, "ops": {"op": {}}}, "ops.op: expected a list"),
    "no entry": ({"schema": 1, "ops": {"op": [GOOD, 3]}}, r"ops.op\[1\]: expected an object"),
    "no key": ({"schema": 1, "ops": {"op": [{**GOOD, "key": None}]}}, "key: expected sizes and kinds"),
    "half a size": ({"schema": 1, "ops": {"op": [{**GOOD, "key": {"hidden": 0.5}}]}}, "key: expected sizes"),
    "no times": ({"schema": 1, "ops": {"op": [{**GOOD, "times": {}}]}}, "times: expected microseconds"),
    "a time of zero": ({"schema": 1, "ops": {"op": [{**GOOD, "times": {"a": 0}}]}}, "times: expected micro"),
    "no number": ({"schema": 1, "ops": {"op": [{**GOOD, "times": {"a": float("nan")}}]}}, "times: expected"),
    "a size without a logarithm": (
        {"schema": 1, "ops": {"op": [{**GOOD, "key": recurrence_key(hidden=10**400)}]}},
        "key: expected sizes",
    ),
    "a time that is no float": (
        {"schema": 1, "ops": {"op": [{**GOOD, "times": {"a": 10**400}}]}},
        "times: expected",
    ),
    "too deep": ("[" * 100_000, "recursion"),
    "a best that is no name": (
        {"schema": 1, "ops": {"op": [{**GOOD, "times": {"None": 1.0}, "best": None}]}},
        "best: expected one of times",
    ),
    "an unknown best": ({"schema": 1, "ops": {"op": [{**GOOD, "best": "b"}]}}, "best: expected one of times"),
    "a list as best": (
        {"schema": 1, "ops": {"op": [{**GOOD, "best": ["a"]}]}},
        "best: expected one of times",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_reported_and_ignored(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, words = BROKEN[case]
    path = write(tmp_path, document if case != "no text" else "")
    if case == "no text":
        path.write_bytes(b"\xff")
    monkeypatch.setattr(_tables, "folders", lambda: [tmp_path])
    with pytest.warns(UserWarning, match=f"the table .*nvidia-h200.json is ignored: .*{words}"):
        found = _tables.load("NVIDIA H200")
    answer = found.answer("op", asked(recurrence_key()))
    assert answer.order == ()
    assert answer.rule("a").startswith(f"plain rule: the table {path} is ignored: ")


def test_a_table_is_read_once_by_the_name_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H{device + 200}")
    monkeypatch.setattr(_tables, "folders", lambda: [tmp_path])
    write(tmp_path, "broken")
    with pytest.warns(UserWarning, match="is ignored"):
        first = _tables.in_force(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tables.in_force(0) is first
        assert _tables.in_force(1).name == "nvidia-h201.json"


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
    assert dispatch.question("bias_act") is None


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
