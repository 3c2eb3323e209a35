"""``python -m benchmarks tune``: what is measured, what becomes of it, and that dispatch understands it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fuseblock
from fuseblock import _tables, dispatch, ops

from .benchmarks_package import load

tune, questions, cases, cli = (load(name) for name in ("tune", "tune_questions", "cases", "cli"))

pytestmark = pytest.mark.usefixtures("short_samples")

SMALL = cases.Case("small", "tests", 5, 3, 2, 4, 2, bidirectional=True)
RAGGED = cases.Case("ragged", "tests", 5, 3, 4, 6, proj=3, fill=0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_interpreted_candidates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes CPU tensors in this process, and long."""
    if request.node.get_closest_marker("gpu"):
        return
    for op in questions.OPS[:2]:
        compiled = [c for c in dispatch.candidates(op) if c.name in ("cpu", "reference")]
        monkeypatch.setitem(dispatch._CANDIDATES, op, tuple(compiled))


def asked(*cases_: Any) -> Any:
    def ask(precisions: Any, patterns: Any) -> Any:
        return questions.questions(precisions, patterns, (cases_,))

    return ask


def run(out: Path, *arguments: str, ask: Any = None, device: str = "cpu") -> int:
    argv = ["--device", device, "--out", str(out), "--seconds", "0.001", *arguments]
    code: int = tune.main(argv, ask or asked(SMALL))
    return code


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


# --- a run


def test_a_run_writes_a_table_that_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "table.json"
    assert run(out, "--dtype", "float32", "--dtype", "bfloat16", ask=asked(SMALL, RAGGED)) == tune.COMPLETE
    text = capsys.readouterr().out
    assert "16 of 16 questions to measure, at most 540 s" in text
    assert "16 measured, 0 left" in text
    assert "Who is fastest" in text
    document = read(out)
    assert {op: len(entries) for op, entries in document["ops"].items()} == {
        "lstm_recurrence": 8,
        "lstm_recurrence_bwd": 4,
        "lstm": 4,
    }
    (taken,) = document["runs"]
    assert taken["command"].startswith("python -m benchmarks tune --device cpu")
    assert {"timestamp", "machine", "versions", "git"} <= set(taken)
    assert document["device"] == taken["machine"]["cpu"]
    table = _tables.Table("t.json", _tables.parse(document))
    for op, entries in document["ops"].items():
        for entry in entries:
            assert entry["run"] == 0
            assert all(t > 0 for t in entry["times"].values())
            answer = table.answer(op, tuple(entry["key"].items()))
            assert answer.order[0] == entry["best"]
            assert set(entry["times"]) == ({"aten", "ours"} if op == "lstm" else {"cpu"})


def test_what_is_measured_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    assert run(out, "--dtype", "float32", "--budget", "0") == tune.UNFINISHED
    assert "0 measured, 5 left" in capsys.readouterr().out
    assert not out.exists()
    assert run(out, "--dtype", "float32") == tune.COMPLETE
    before = read(out)
    assert run(out, "--dtype", "float32", "--dtype", "float16") == tune.COMPLETE
    assert "5 of 10 questions" in capsys.readouterr().out
    document = read(out)
    for op, entries in before["ops"].items():
        assert document["ops"][op][: len(entries)] == entries
        assert {entry["run"] for entry in document["ops"][op]} == {0, 1}
    assert len(document["runs"]) == 2
    assert run(out, "--dtype", "float32", "--again") == tune.COMPLETE
    again = read(out)
    assert {op: len(entries) for op, entries in again["ops"].items()} == {
        op: len(entries) for op, entries in document["ops"].items()
    }
    runs = {entry["run"] for entries in again["ops"].values() for entry in entries}
    assert runs == {1, 2}


def candidates(monkeypatch: pytest.MonkeyPatch, **further: Any) -> None:
    """Put functions before the candidates of lstm_recurrence, behind the one that is there."""
    listed = list(dispatch.candidates("lstm_recurrence"))
    added = [dispatch.Candidate("cuda", f, lambda *args: None, variant=name) for name, f in further.items()]
    monkeypatch.setitem(dispatch._CANDIDATES, "lstm_recurrence", (listed[0], *added, listed[-1]))


def test_who_is_wrong_or_fails_is_left_out_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = dispatch.candidates("lstm_recurrence")[-1].run
    assert right is not None

    def wrong(*args: Any) -> Any:
        y, *others = right(*args)
        return y * 1.001, *others

    def failing(*args: Any) -> Any:
        raise RuntimeError("cannot do this")

    called = set()

    def at_first_right(*args: Any) -> Any:
        y, *others = right(*args)
        again = args[-1] in called
        called.add(args[-1])
        return (y * 1.001 if again else y), *others

    candidates(monkeypatch, wrong=wrong, failing=failing, at_first_right=at_first_right, right=right)
    out = tmp_path / "table.json"
    assert run(out, "--dtype", "float32") == tune.WRONG
    printed = capsys.readouterr().err
    assert "lstm_recurrence train, float32, bi 2x5 (3) B2 T4: cuda (wrong): y is off by" in printed
    for entry in read(out)["ops"]["lstm_recurrence"]:
        assert list(entry["times"]) == [dispatch.candidates("lstm_recurrence")[0].label, "cuda (right)"]
        assert entry["excluded"]["cuda (failing)"] == "RuntimeError: cannot do this"
        assert entry["excluded"]["cuda (wrong)"].startswith("y is off by ")
        assert entry["excluded"]["cuda (at_first_right)"].startswith("y is off by ")

    # Nothing is measured, and the same is said.
    assert run(out, "--dtype", "float32") == tune.WRONG
    again = capsys.readouterr()
    assert "0 of 5 questions" in again.out
    assert again.err == printed

    # Another version may have mended it.
    candidates(monkeypatch, wrong=right)
    document = json.loads(out.read_text())
    document["runs"][0]["git"]["commit"] = "of another version"
    out.write_text(json.dumps(document))
    assert run(out, "--dtype", "float32") == tune.COMPLETE
    assert all("excluded" not in entry for entry in read(out)["ops"]["lstm_recurrence"])


def test_candidates_that_came_later_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the stacks that may run on them."""
    out = tmp_path / "table.json"
    assert run(out, "--dtype", "float32", "--dtype", "float16") == tune.COMPLETE
    before = read(out)["ops"]
    right = dispatch.candidates("lstm_recurrence")[-1].run
    listed = dispatch.candidates("lstm_recurrence")
    further = dispatch.Candidate("cuda", right, _not_in_float16, variant="further")
    monkeypatch.setitem(dispatch._CANDIDATES, "lstm_recurrence", (*listed, further))
    assert run(out, "--dtype", "float32", "--dtype", "float16") == tune.COMPLETE
    assert "4 of 10 questions" in capsys.readouterr().out
    after = read(out)["ops"]
    assert after["lstm_recurrence_bwd"] == before["lstm_recurrence_bwd"]
    for entry in after["lstm_recurrence"]:
        names = {"cpu", "cuda (further)"} if entry["key"]["dtype"] == "float32" else {"cpu"}
        assert set(entry["times"]) == names
    assert {e["key"]["dtype"] for e in after["lstm"] if e["run"] == 1} == {"float32"}
    assert run(out, "--dtype", "float32", "--dtype", "float16") == tune.COMPLETE
    assert "0 of 10 questions" in capsys.readouterr().out


def _not_in_float16(gx: torch.Tensor, *args: Any) -> str | None:
    return "not in float16" if gx.dtype is torch.float16 else None


def test_a_question_that_nobody_answers_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def memory(self: Any, device: str, seed: int) -> Any:
        raise MemoryError("the reference is too large")

    out = tmp_path / "table.json"
    with monkeypatch.context() as patch:
        patch.setattr(questions.Question, "contest", memory)
        assert run(out, "--dtype", "float32") == tune.WRONG
    document = read(out)
    assert document["ops"] == {}
    assert document["failed"]["lstm"][0]["excluded"] == {"contest": "MemoryError: the reference is too large"}
    assert run(out, "--dtype", "float32") == tune.WRONG
    printed = capsys.readouterr()
    assert "0 of 5 questions" in printed.out
    assert "contest: MemoryError: the reference is too large" in printed.err
    assert run(out, "--dtype", "float32", "--again") == tune.COMPLETE
    document = read(out)
    assert len(document["ops"]["lstm"]) == 2
    assert not any(document["failed"].values())
    _tables.parse(document)


def test_a_gpu_that_a_kernel_has_broken_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    described = {**load("machine").describe("cpu"), "machine": {"gpu": "NVIDIA Test"}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(tune.machine, "describe", lambda device: described)
    monkeypatch.setattr(tune, "_CONFIGS", tmp_path)
    argv = ["--dtype", "float32"]
    assert tune.main(argv, asked(SMALL)) == tune.WRONG
    assert "the GPU cannot be used any more" in capsys.readouterr().err
    document = read(tmp_path / "nvidia-test.json")
    assert [len(entries) for entries in document["failed"].values()] == [1]
    # The next run goes on behind the question that broke it.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tune.main(argv, asked(SMALL)) == tune.WRONG
    assert "4 of 5 questions" in capsys.readouterr().out


def test_stacks_run_on_the_backends_found_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    contest = questions.Question.contest

    def spy(self: Any, device: str, seed: int) -> Any:
        seen.append((self.op, len(_tables.in_force(0).entries.get("lstm_recurrence", ()))))
        return contest(self, device, seed)

    monkeypatch.setattr(questions.Question, "contest", spy)
    assert run(tmp_path / "table.json", "--dtype", "float32") == tune.COMPLETE
    assert seen == [
        ("lstm_recurrence", 0),
        ("lstm_recurrence", 1),
        ("lstm_recurrence_bwd", 2),
        ("lstm", 2),
        ("lstm", 2),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting"),
        ('{"schema": 1, "ops": {"lstm": 1}}', "ops.lstm: expected a list"),
        (
            '{"schema": 1, "device": "NVIDIA H200", "ops": {}}',
            "measured on NVIDIA H200, this is",
        ),
        ('{"schema": 1, "device": "HERE", "ops": {}, "runs": {}}', "runs: expected a list"),
        ('{"schema": 1, "device": "HERE", "ops": {}, "failed": {"lstm": [1]}}', "failed: expected lists"),
    ],
)
def test_a_file_that_is_no_table_of_this_device_is_left_alone(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    content = content.replace("HERE", tune.machine.describe("cpu")["machine"]["cpu"])
    out.write_text(content)
    assert run(out, "--dtype", "float32") == tune.USAGE
    assert words in capsys.readouterr().err
    assert out.read_text() == content


def test_who_cannot_write_does_not_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "table.json", "--dtype", "float32") == tune.USAGE
    assert "File exists" in capsys.readouterr().err


def test_entries_of_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary tells of them what they have."""
    out = tmp_path / "table.json"
    other = {"key": {"hidden": 3}, "times": {"a": 1.0}, "best": "a"}
    device = tune.machine.describe("cpu")["machine"]["cpu"]
    out.write_text(json.dumps({"schema": 1, "device": device, "ops": {"other": [other]}}))
    assert run(out, "--dtype", "float32") == tune.COMPLETE
    assert read(out)["ops"]["other"] == [other]
    assert "other" in capsys.readouterr().out


def test_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--device", "cpu"]) == tune.USAGE
    assert "needs --out" in capsys.readouterr().err
    assert cli.main(["tune"]) == tune.USAGE
    assert "no CUDA device" in capsys.readouterr().err
    assert run(tmp_path / "t.json", "--case", "no such case") == tune.USAGE
    assert "no case matches ['no such case']" in capsys.readouterr().err


def test_a_table_that_dispatch_does_not_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEBLOCK_CONFIGS", raising=False)
    assert tune.unread(tune._CONFIGS / "nvidia-h200.json", "NVIDIA H200") is None
    path = tmp_path / "nvidia-h200.json"
    assert "name it nvidia-h200.json, and its folder in FUSEBLOCK_CONFIGS" in tune.unread(path, "NVIDIA H200")
    monkeypatch.setenv("FUSEBLOCK_CONFIGS", str(tmp_path))
    assert tune.unread(path, "NVIDIA H200") is None
    assert tune.unread(tmp_path / "mine.json", "NVIDIA H200")


def test_times_within_two_percent_are_equal() -> None:
    assert tune.Outcome({"a": 1.0, "b": 0.985, "c": 0.99}, {}).best == "a"
    assert tune.Outcome({"a": 1.0, "b": 0.97, "c": 0.96}, {}).best == "b"


@pytest.mark.gpu
def test_a_gpu_follows_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / _tables.file_name(torch.cuda.get_device_name())
    assert run(out, "--dtype", "float16", device="cuda") == tune.COMPLETE
    monkeypatch.setenv("FUSEBLOCK_CONFIGS", str(tmp_path))
    _tables.of.cache_clear()
    try:
        question = questions.Question("lstm_recurrence", SMALL, "train", "float16")
        args = question._forward_args("cuda", seed=0)
        explanation = fuseblock.explain("lstm_recurrence", *args)
        (entry,) = (e for e in read(out)["ops"]["lstm_recurrence"] if e["key"] == question.key())
        assert explanation.chosen == entry["best"]
        assert explanation.rule.startswith(f"table {out.name}: measured ")
    finally:
        _tables.of.cache_clear()


# --- the questions


def test_what_is_asked() -> None:
    found = questions.questions(["bfloat16", "float32", "ieee"])
    assert len({(q.op, json.dumps(key)) for q, key in found}) == len(found)
    kinds = {(q.op, q.mode, q.precision) for q, _ in found}
    # Without cuDNN the last two are the same.
    assert ("lstm_recurrence", "train", "float32") in kinds
    assert ("lstm_recurrence", "train", "ieee") not in kinds
    assert ("lstm", "forward", "ieee") in kinds
    assert ("lstm_recurrence_bwd", "forward", "float32") not in kinds
    assert all(q.case.time <= 1024 for q, _ in found)
    assert not any(q.op == "lstm" and q.case.ragged for q, _ in found)
    only = questions.questions(["float32"], ["step-32", "cell-*"])
    assert [(q.op, q.mode) for q, _ in only] == [
        ("lstm_recurrence", "forward"),
        ("lstm_recurrence", "train"),
        ("lstm_recurrence_bwd", "train"),
        ("lstm", "forward"),
    ]


def test_spread_sizes_reach_everything_between_them() -> None:
    entries: dict[str, list[Any]] = {}
    for q, key in questions.questions(["float16"], ["spread-*"]):
        entries.setdefault(q.op, []).append({"key": key, "times": {"a": 1.0}, "best": "a"})
    table = _tables.Table("spread.json", _tables.parse({"schema": 1, "ops": entries}))
    generator = random.Random(0)
    for _ in range(300):
        hidden, steps = generator.randint(12, 3000), generator.randint(20, 1000)
        batch = generator.randint(1, min(1000, 2**17 // hidden))
        both, ragged = generator.choice((True, False)), generator.choice((True, False))
        case = cases.Case("x", "", hidden, hidden, batch, steps, 1, both)
        key = questions.Question("lstm_recurrence", case, "train", "float16").key()
        assert table.answer("lstm_recurrence", tuple({**key, "ragged": ragged}.items())).order, case


@pytest.mark.parametrize("case", [SMALL, RAGGED])
def test_keys_are_what_operators_ask(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrence's question at the call itself, forward and backward."""
    found: dict[str, Any] = {}
    run_ = dispatch.run

    def spy(op: str, args: tuple[Any, ...]) -> Any:
        question = dispatch.question(op)
        assert question is not None
        found[op] = _tables.plain_key(question.key(args))
        return run_(op, args)

    monkeypatch.setattr(dispatch, "run", spy)
    asks = {op: questions.Question(op, case, "train", "float64") for op in questions.OPS[:2]}
    monkeypatch.setitem(questions.PRECISIONS, "float64", (torch.float64, True, False))
    gx, *rest = asks["lstm_recurrence"]._forward_args("cpu", seed=0)
    y, *_ = ops.lstm_recurrence(gx.requires_grad_(), *rest)
    y.sum().backward()
    assert found == {op: question.key() for op, question in asks.items()}


def test_keys_are_what_layers_ask() -> None:
    question = questions.Question("lstm", SMALL, "forward", "bfloat16")
    best = {"key": question.key(), "times": {"aten": 2.0, "ours": 1.0}, "best": "ours"}
    table = _tables.Table("t.json", _tables.parse({"schema": 1, "ops": {"lstm": [best]}}))
    with FakeTensorMode(), _tables.using(table):
        x = torch.empty(4, 2, 3, dtype=torch.bfloat16, device="cuda")
        weights = [(x.new_empty(20, width), x.new_empty(20, 5), None, None, None) for width in (3, 3, 10, 10)]
        explanation = fuseblock.explain("lstm", x, None, None, weights, bidirectional=True)
    assert explanation.chosen == "ours"


@pytest.mark.parametrize("op", ["lstm_recurrence", "lstm_recurrence_bwd", "lstm"])
@pytest.mark.parametrize("precision", ["float16", "float32", "tf32"])
def test_rivals_are_judged_by_float64(op: str, precision: str) -> None:
    question = questions.Question(op, SMALL, "train", precision)
    with question.settings():
        assert torch.backends.cuda.matmul.allow_tf32 is (precision == "tf32")
        contest = question.contest("cpu", seed=0)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert all(x.dtype == torch.float64 for x in contest.reference.values())
    # TF32 has float16's 10 bits of mantissa.
    assert contest.resolution == (torch.float16 if precision == "tf32" else question.dtype)
    for rival in contest.rivals.values():
        results = rival.results()
        assert set(results) == set(contest.reference)
        assert contest.check(results).green
        name = next(name for name, x in results.items() if x.numel())
        off = {**results, name: results[name] * (1 + 2**-6)}
        assert not contest.check(off).green


def test_ours_is_ours_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the formula for CPUs takes PyTorch's layer."""
    from fuseblock.functional import _lstm

    chosen, choose = [], _lstm.choose_engine

    def spy(*args: Any) -> Any:
        chosen.append(choose(*args)[0])
        return choose(*args)

    monkeypatch.setattr(_lstm, "choose_engine", spy)
    case = cases.Case("large", "", 256, 4, 40, 70)
    contest = questions.Question("lstm", case, "forward", "float32").contest("cpu", seed=0)
    for label in ("aten", "ours"):
        contest.rivals[label].results()
    assert chosen == ["aten", "ours"]
