"""Smoke tests of the example programs, and of what keeps them honest."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("statsmodels")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def forecast():
    spec = importlib.util.spec_from_file_location("example_forecast", ROOT / "examples" / "forecast.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_quick_run(forecast, tmp_path, capsys):
    path = tmp_path / "forecast.png"
    assert forecast.main(["--quick", "--plot", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("within") == 2
    assert "132 steps ago" in out
    assert "52 steps ago" in out
    if importlib.util.find_spec("matplotlib") is not None:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_wrong_lstm_breaks_parity(forecast, monkeypatch, capsys, wrong):
    """One part in 10,000 is enough, forward or backward."""

    class Wrong(torch.nn.LSTM):
        def forward(self, x, hx=None):
            y, (h, c) = super().forward(x, hx)
            if wrong == "output":
                return y, (h * (1 + 1e-4), c)
            w = self.weight_hh_l0
            return y, (h + 1e-3 * (w - w.detach()).sum(), c)

    monkeypatch.setattr(forecast.fuseblock.nn, "LSTM", Wrong)
    monkeypatch.setattr(forecast, "who_runs", lambda model, x: "")
    parity, _ = forecast.study(forecast.load_co2(), SimpleNamespace(quick=True, seed=0, controls=2))
    assert not parity
    assert "BROKEN" in capsys.readouterr().out


def test_renumbered_units_are_the_same_function(forecast):
    torch.manual_seed(0)
    model = forecast.Forecaster(torch.nn.LSTM, 3, 5).double()
    twin = forecast.renumber(model, torch.Generator().manual_seed(1))
    assert not torch.equal(model.lstm.weight_hh_l0, twin.lstm.weight_hh_l0)
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    # The longest chain of sums: 9 steps of 40 products in two layers.
    bound = 2 * 9 * 40 * torch.finfo(torch.float64).eps
    assert float((model(x) - twin(x)).detach().abs().max()) <= bound


@pytest.mark.parametrize("loader", ["load_sunspots", "load_co2"])
def test_no_leakage(forecast, loader):
    series = getattr(forecast, loader)()
    assert np.isfinite(series.values).all()
    cuts = [0, *series.cuts, len(series.values)]
    for start, end in itertools.pairwise(cuts):
        windows = forecast.make_windows(series, start, end, 1)
        assert windows.first.min() >= start
        assert windows.first.max() + series.horizon == end
    # Neither training windows nor scales, nor any input, change when everything later does.
    later = series.values.copy()
    later[series.cuts[0] :] = -1e6
    before, after = (
        forecast.make_windows(item, 0, series.cuts[0], 1) for item in (series, replace(series, values=later))
    )
    assert before.scale == after.scale
    assert torch.equal(before.inputs, after.inputs)
    assert torch.equal(before.targets, after.targets)
    first = forecast.make_windows(series, cuts[2], cuts[3], 1)
    hidden = series.values.copy()
    hidden[cuts[2] :] = -1e6
    masked = forecast.make_windows(replace(series, values=hidden), cuts[2], cuts[3], 1)
    assert torch.equal(first.inputs[0], masked.inputs[0])
