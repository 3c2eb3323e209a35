"""``python -m fuseblock tiers``: what each tier of the recurrence takes of a GPU."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuseblock import __main__ as command_line
from fuseblock import _tiers, dispatch
from fuseblock.launch import gpu as gpus
from fuseblock.launch import resident_recurrence

KERNELS = [
    ("ns::lstm_block::lstm_block_fwd_kernel<__half, 32, 1>", "80", 112, 4608),
    ("ns::lstm_block::lstm_block_fwd_kernel<__half, 128, 1>", "80", 255, 33792),
    ("ns::lstm_block::lstm_block_fwd_kernel<__half, ns::lstm_block::Class<128>, 1>", "90a", 254, 33792),
    ("ns::lstm_step_bwd_bwd_kernel<float, 4>", "80", 40, 0),
    ("ns::lstm_step_bwd_kernel<float, 4>", "80", 30, 0),
    ("ns::bias_act_kernel<float>", "80", 20, 0),
]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("kernel", "architecture", "registers", "shared")
    rows = [{**dict(zip(names, row, strict=True)), "stack": 0, "spills": 0} for row in KERNELS]
    (tmp_path / "_build.json").write_text(json.dumps({"kernels": rows}))
    monkeypatch.setattr(_tiers, "__file__", str(tmp_path / "_tiers.py"))


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    command_line.main(["tiers", "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_limits_are_those_by_which_tiers_decline(capsys: pytest.CaptureFixture[str]) -> None:
    largest = as_json(capsys)["largest_hidden"]
    for tier in resident_recurrence.TIERS.values():
        for card in gpus.KNOWN:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                limit = largest[f"cuda ({tier.name})"][card.name][str(dtype).removeprefix("torch.")]
                for hidden, runs in ((limit, limit > 0), (limit + 1, False)):
                    w_hh = torch.empty(1, 4 * hidden, hidden, dtype=dtype, device="meta")
                    assert (tier.why_not(w_hh, None, None, card) is None) is runs, (tier.name, card, dtype)
    assert largest["cuda (per step)"]["A100"] == {"float16": None, "bfloat16": None, "float32": None}


def test_tritons_limit_depends_on_shared_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    largest = as_json(capsys)["largest_hidden"]["triton (persistent)"]
    assert largest["H200"] == {"float16": 128, "bfloat16": 128, "float32": 64}
    assert largest["RTX A4000"]["float16"] == 64


def test_shared_memory_at_launch_fits(capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys)
    cards = {card["name"]: card for card in report["gpus"]}
    for tier, by_card in report["shared_at_launch"].items():
        for name, by_dtype in by_card.items():
            runs = {d for d, hidden in report["largest_hidden"][tier][name].items() if hidden}
            assert set(by_dtype) == runs
            assert all(0 < b <= cards[name]["shared_bytes"] for both in by_dtype.values() for b in both)
    # 24 tiles of weights for each of the 8 warps of a block, 512 bytes each, and what they work on.
    assert report["shared_at_launch"]["cuda (grid)"]["H200"]["float16"][0] > 24 * 8 * 512


@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [(d, h) for d in (torch.float16, torch.float32) for h in _tiers._CLUSTER_SHARED[d.itemsize]],
    ids=str,
)
def test_shared_memory_of_clusters_is_what_their_launchers_need(dtype: torch.dtype, hidden: int) -> None:
    """With one byte less not one cluster fits on the emulated device."""
    from .emulator import load_recurrence

    kernels = load_recurrence("cluster", "plain")
    w_hh = torch.empty(1, 4 * hidden, hidden, dtype=dtype)
    try:
        for backward in (False, True):
            needed = _tiers.launches()["cuda (cluster)"](dtype, hidden, backward, gpus.H200)
            for available, fits in ((needed, True), (needed - 1, False)):
                kernels.set_device(shared_bytes=available)
                assert (kernels.resident(w_hh, backward) > 0) is fits
    finally:
        kernels.set_device()


def test_every_candidate_on_a_gpu_is_a_tier() -> None:
    labels = {c.label for c in dispatch.candidates("lstm_recurrence") if c.devices == ("cuda",)}
    assert labels <= set(_tiers.limits())


def test_cards_of_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = [card.name for card in gpus.KNOWN]
    monkeypatch.setattr(gpus, "present", lambda: None)
    assert [card["name"] for card in as_json(capsys)["gpus"]] == names
    monkeypatch.setattr(gpus, "present", lambda: replace(gpus.A100, name="Half an A100", multiprocessors=54))
    report = as_json(capsys)
    assert report["gpus"][-1] == {
        "name": "this GPU: Half an A100",
        "capability": [8, 0],
        "multiprocessors": 54,
        "shared_bytes": 166_912,
    }
    assert report["largest_hidden"]["cuda (block)"]["this GPU: Half an A100"]["float16"] == 128


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("rich", [True, False])
def test_tables(rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(gpus, "present", lambda: None)
    command_line.main(["tiers"])
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "cuda (block) fwd sm_80 2 112 to 255 4,608 to 33,792 0" in lines
    assert "cuda (block) fwd sm_90a 1 254 33,792 0" in lines
    assert "cuda (per step) bwd sm_80 1 30 0 0" in lines
    assert "cuda (per step) bwd_bwd sm_80 1 40 0 0" in lines
    assert not any("bias_act" in line for line in lines)
    assert "RTX A4000 8.6 48 101,376" in lines
    assert "cuda (per step) float16, bfloat16, float32 any any any any any" in lines


def test_where_nothing_runs_it_says_so() -> None:
    found = {
        "gpus": [{"name": "small", "capability": (7, 5), "multiprocessors": 1, "shared_bytes": 1}],
        "largest_hidden": {"tier": {"small": {"float16": 0, "bfloat16": 0, "float32": None}}},
        "shared_at_launch": {"tier": {"small": {"bfloat16": [1, 2000]}}},
        "kernels": [],
    }
    (_, _, limits), (_, _, rows), (_, _, asked), (_, _, resources) = _tiers.tables(found)
    assert limits == [("small", "7.5", "1", "1")]
    assert asked == [("tier", "bfloat16", "1 / 2,000")]
    assert rows == [("tier", "float16, bfloat16", "none"), ("tier", "float32", "any")]
    assert resources == []


def test_without_a_cuda_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiers, "__file__", str(tmp_path / "_tiers.py"))
    for content in (None, {"kernels": None}):
        if content is not None:
            (tmp_path / "_build.json").write_text(json.dumps(content))
        assert as_json(capsys)["kernels"] == []
        command_line.main(["tiers"])
        assert capsys.readouterr().out.startswith("note: no CUDA build here")


def test_kernels_of_this_build() -> None:
    recorded = Path(_tiers.__file__).with_name("_build.json")
    if not recorded.exists() or not json.loads(recorded.read_text())["kernels"]:
        pytest.skip("no CUDA build")
    tiers = {kernel["tier"] for kernel in _tiers.kernels()}
    assert all(kernel["kernel"].startswith("lstm_") for kernel in _tiers.kernels())
    assert {"cuda (block)", "cuda (per step)"} <= tiers <= set(_tiers.limits())
