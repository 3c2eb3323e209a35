"""Tables of measurements: the file, and the nearest shape."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fuseblock import _tables

from .tables import asked, entry, recurrence_key, table


@pytest.fixture(autouse=True)
def _no_table_of_another_test() -> Iterator[None]:
    _tables.of.cache_clear()
    yield
    _tables.of.cache_clear()


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
