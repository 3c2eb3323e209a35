"""``python -m benchmarks profile``: every operator of a step, stock beside fuseblock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .benchmarks_package import load

cases, profile_case, suites = load("gan_cases"), load("profile_case"), load("suites")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_training_step() -> None:
    case = replace(next(case for case in cases.CASES if case.name == "wgan-gp"), batch=1)
    profile = profile_case.measure(suites.GAN, case, "train", budget_s=0.01)
    assert profile["seconds"].keys() == {"stock", "stock again", "fuseblock"}
    assert profile["memory"].keys() == {"stock", "fuseblock"}
    assert profile["ratios"].keys() == {"fuseblock", "stock again"}
    by_name: dict[str, dict[str, float]] = {}
    for operator in profile["operators"]:
        for provider, calls in operator["calls"].items():
            counts = by_name.setdefault(operator["name"], {})
            counts[provider] = counts.get(provider, 0) + calls
    # Five convolutions each, whose activations are PyTorch's out of place, and in place.
    assert by_name["aten::convolution_backward"] == {"stock": 5, "fuseblock": 5}
    assert by_name["aten::leaky_relu"] == {"stock": 4} and by_name["aten::leaky_relu_"] == {"fuseblock": 4}
    convolutions, everything = profile["convolutions_ms"], profile["sum_ms"]
    assert 0 < convolutions["fuseblock"] < everything["fuseblock"] < 2e3 * profile["seconds"]["fuseblock"]
    assert profile["most"] == everything["stock"] / convolutions["fuseblock"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints and writes; a case without convolutions has no ratio to them."""
    path = tmp_path / "new" / "profile.json"
    argv = ["profile", "bn-lrelu-small", "--mode", "double", "--threads", "1", "--budget", "0.01"]
    assert load("cli").main([*argv, "--json", str(path)]) == 0
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert written["most"] is None and "convolutions alone" not in printed
    assert "fuseblock_cpu::batch_norm_act_bwd_bwd" in printed and "page faults" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "nothing: no such case"),
        (["bn-silu", "--mode", "penalty"], "modes forward, train, double"),
    ],
)
def test_usage_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_case.main(argv) == 2 and message in capsys.readouterr().err
