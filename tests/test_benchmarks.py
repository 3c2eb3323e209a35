"""The benchmark suite itself: its gate, figures, command line and report."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .benchmarks_package import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench():
    """The suite's modules."""
    names = (
        "cases",
        "cli",
        "gan_cases",
        "gan_steps",
        "memory",
        "model_measured",
        "onnx_lstm",
        "parity",
        "providers",
        "runner",
        "suites",
        "summary",
        "timing",
        "workloads",
    )
    return SimpleNamespace(**{name: load(name) for name in names})


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _ceilings_take_seconds(bench, monkeypatch):
    """They are measured in the test of the command."""
    monkeypatch.setattr(
        bench.cli.machine, "ceilings", lambda *_, **__: {"gemm_gflops": 1.0, "copy_gbytes": 1.0}
    )


# --- the gate


def pretender(bench, break_results=lambda results: results):
    """Stock's layer under fuseblock's name, with its results passed through ``break_results``."""

    class Pretender(bench.providers.Stock):
        peer = False

        def step(self, problem, mode):
            step, context = super().step(problem, mode)
            return lambda: break_results(step()), context

    return Pretender(name="fuseblock")


def run_cli(bench, tmp_path, provider, *arguments):
    path = tmp_path / "out.json"
    argv = ["--budget", "0.01", "--threads", "1", "--json", str(path), *arguments]
    suite = replace(bench.suites.LSTM, providers=(bench.providers.Stock(), provider))
    code = bench.cli.main(argv, suites=(suite,))
    return code, json.loads(path.read_text())


BREAKS = {
    "an output is off by 1e-5": lambda r: {**r, "y": r["y"] * (1 + 1e-5)},
    "one gradient is wrong": lambda r: {n: v * 1.001 if n == "d_weight_hh_l1" else v for n, v in r.items()},
    "an output is missing": lambda r: {n: v for n, v in r.items() if n != "c_n"},
    "not a number": lambda r: {**r, "h_n": torch.where(r["h_n"] == r["h_n"].max(), torch.nan, r["h_n"])},
    "wrong shape": lambda r: {**r, "y": r["y"][:-1]},
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_wrong_provider_is_red_and_has_no_speed_up(bench, tmp_path, broken):
    code, report = run_cli(
        bench, tmp_path, pretender(bench, BREAKS[broken]), "--case", "forecast-t24", "--mode", "train"
    )
    assert code == 1
    (row,) = [row for row in report["rows"] if row["provider"] == "fuseblock"]
    assert row["status"] == "red"
    assert float(row["error_over_bound"]) > 1
    assert row["speedup_stock"] is None
    assert row["speedup_peer"] is None
    assert row["seconds"]["median"] > 0
    (bar,) = [bar for bar in report["bars"] if bar["bar"].startswith("train, anywhere")]
    assert bar["verdict"] == "missed"
    assert bar["without"] == ["forecast-t24"]


def test_a_wrong_second_derivative_is_red(bench, tmp_path):
    def wrong(results):
        return {n: v * 1.01 if n == "dd_weight_ih_l0" else v for n, v in results.items()}

    code, report = run_cli(
        bench, tmp_path, pretender(bench, wrong), "--case", "forecast-t24", "--mode", "double"
    )
    assert code == 1
    assert report["rows"][-1]["status"] == "red"
    assert report["rows"][-1]["tensor"] == "dd_weight_ih_l0"


def test_a_right_provider_is_green(bench, tmp_path):
    code, report = run_cli(bench, tmp_path, pretender(bench), "--case", "forecast-t24", "--case", "cell-32")
    assert code == 0
    assert {row["status"] for row in report["rows"]} == {"green"}
    assert all(row["speedup_stock"]["median"] > 0 for row in report["rows"])


def test_a_run_that_reaches_its_limit_writes_what_it_has(bench, tmp_path, capsys):
    arguments = ["--case", "cell-32", "--case", "step-32", "--mode", "forward"]
    code, report = run_cli(bench, tmp_path, pretender(bench), *arguments, "--limit", "0")
    assert (code, report["rows"]) == (bench.cli.UNFINISHED, [])
    assert "2 of 2 cases and modes were left out" in capsys.readouterr().err
    code, report = run_cli(bench, tmp_path, pretender(bench), *arguments, "--limit", "1000")
    assert (code, len(report["rows"])) == (0, 4)


def test_a_provider_that_raises_is_reported(bench, tmp_path):
    def fail(results):
        raise RuntimeError("cannot do this")

    code, report = run_cli(bench, tmp_path, pretender(bench, fail), "--case", "step-32")
    assert code == 1
    assert report["rows"][-1]["status"] == "failed"
    assert "cannot do this" in report["rows"][-1]["reason"]


@pytest.mark.parametrize("value", [1.0, 0.75, 3.0, 1e-3, 12345.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ulp(bench, value, dtype):
    value = float(torch.tensor(value, dtype=dtype))
    above = float(torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(math.inf, dtype=dtype)))
    assert bench.parity.ulp(value, dtype) == above - value


def test_bound_is_twice_stocks_error_plus_one_ulp(bench):
    reference = {"y": torch.tensor([1.0, 3.0], dtype=torch.float64)}
    stock = {"y": torch.tensor([1.0, 3.0 + 2**-20])}
    ulp = 2.0**-22
    for error, green in ((2 * 2**-20 + ulp, True), (2 * 2**-20 + 2 * ulp, False)):
        got = {"y": torch.tensor([1.0, 3.0 - error])}
        verdict = bench.parity.check(got, reference, stock, dtype=torch.float32, terms=1)
        assert verdict.bound == 2 * 2**-20 + ulp
        assert verdict.green is green


def test_bound_without_stock(bench):
    reference = {"y": torch.tensor([2.0], dtype=torch.float64)}
    verdict = bench.parity.check(reference, reference, None, dtype=torch.bfloat16, terms=10)
    assert verdict.bound == 10 * 2**-7 * 2
    assert verdict.green


# --- providers


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("time_steps", [1, 7])
def test_onnx_runtime_computes_the_same_layer(bench, bidirectional, time_steps):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    case = bench.cases.Case(
        "x", "", 5, 3, 4, time_steps, 2, bidirectional, fill=1 if time_steps == 1 else 0.5
    )
    problem = bench.workloads.make_problem(case, dtype=torch.float32, device="cpu", seed=0)
    results = []
    for provider in (bench.providers.Stock(), bench.providers.OnnxRuntime()):
        step, context = provider.step(problem, "forward")
        with context():
            results.append(step())
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)


def test_no_speed_up_over_a_red_peer_is_hidden(bench):
    """A peer with larger errors stays a peer; rows say that it was red."""
    spread = bench.timing.Spread(1.0, 1.0, 1.0)
    rows = {
        name: bench.runner.Row("c", "forward", name, status, seconds=replace(spread, median=median))
        for name, status, median in (
            ("stock", "green", 3.0),
            ("peer", "red", 1.0),
            ("fuseblock", "green", 2.0),
        )
    }
    runs = {
        name: bench.timing.Runnable(lambda: None, wall=[row.seconds.median]) for name, row in rows.items()
    }
    bench.runner._note_speedups(rows, runs, {"stock", "peer"})
    ours = rows["fuseblock"]
    assert (ours.best_peer, ours.best_peer_red) == ("peer", True)
    assert ours.speedup_peer.median == 0.5
    assert ours.speedup_stock.median == 1.5
    assert rows["peer"].speedup_stock is None


# --- figures


def test_flop_of_a_case(bench):
    case = bench.cases.Case("x", "", 8, 3, 5, 7)
    rows = 5 * 7
    assert case.flop("forward") == 2 * rows * 4 * 8 * (3 + 8)
    assert case.flop("train") == 3 * case.flop("forward")
    fed = replace(case, input_grad=False)
    assert case.flop("train") - fed.flop("train") == 2 * rows * 4 * 8 * 3


def test_tensor_peak_is_exact(bench):
    size = 1 << 20

    def step():
        a = torch.empty(size, dtype=torch.uint8)
        b = torch.empty(2 * size, dtype=torch.uint8)
        del a
        return torch.empty(size, dtype=torch.uint8), b

    assert bench.memory.peak_of_tensors(step, cuda=False) == 3 * size


def test_saved_for_backward_is_what_the_step_made_itself(bench):
    x = torch.randn(100, requires_grad=True)

    def step():
        hidden = x.sin()  # saves x, which was there before
        both = hidden * hidden, hidden.exp()  # save hidden, once, and the result of exp
        return torch.autograd.grad(sum(both).sum(), x)

    assert bench.memory.saved_for_backward(step) == 2 * x.nbytes


def test_the_cases_of_conv_norm_and_leaky_relu(bench):
    cases = bench.suites.GAN.cases
    names = {case.name for case in cases if case.is_stack()}
    assert names >= {"dcgan64-d2", "dcgan64-d", "wgan-gp-bn-96", "pix2pix-d", "srgan-d"}
    assert not names & {"dcgan64-d1", "dcgan64-g3", "bn-lrelu", "srgan", "wgan-gp", "r3gan"}
    inplace = next(p for p in bench.suites.GAN.providers if p.name == "stock:inplace")
    for case in cases:
        assert (inplace.why_not(case, "train", "cpu", torch.float32) is None) == (case.name in names)
        assert inplace.why_not(case, "penalty", "cpu", torch.float32) is not None


@pytest.mark.parametrize("name", ["dcgan64-step", "dcgan64-ema", "blur-up", "blur-down", "bias-lrelu"])
def test_steps_filters_and_biases_are_the_same_for_stock_and_fuseblock(bench, name):
    case = next(c for c in bench.suites.GAN.cases if c.name == name)
    build = case.build if case.step is None else lambda: bench.gan_steps.Pair(4)
    case = replace(case, build=build, shape=case.shape if case.step else (64, 16, 16), batch=3)
    problem = bench.suites.GAN.make_problem(case, dtype=torch.float64, device="cpu", seed=0)
    providers = {p.name: p for p in bench.suites.GAN.providers}
    for mode in case.modes:
        results = []
        for provider in (providers["stock"], providers["fuseblock"]):
            step, context = provider.step(problem, mode)
            with context():
                step()
                results.append({name: t.detach().clone() for name, t in step().items()})
        torch.testing.assert_close(results[1], results[0])
        assert len(results[0]) > (mode != "forward")


def test_share_of_a_plain_copy(bench):
    """Forward of a norm moves its input and its result; a training step eight times the input, in one sweep five."""
    moved = bench.model_measured.moved
    case = next(c for c in bench.suites.GAN.cases if c.name == "bn-lrelu")
    elements = case.elements
    assert moved(case, "forward", 4) == pytest.approx(2 * 4 * elements, rel=1e-3)
    assert moved(case, "train", 2) == pytest.approx(8 * 2 * elements, rel=1e-3)
    assert moved(case, "train", 2, True) == pytest.approx(5 * 2 * elements, rel=1e-3)
    assert moved(bench.gan_cases.CASES[-1], "train", 2) is None
    copy = next(p for p in bench.suites.GAN.providers if p.name == "copy")
    assert copy.why_not(case, "train", "cpu", torch.float32) is None
    problem = bench.suites.GAN.make_problem(replace(case, batch=1), dtype=torch.float32, device="cpu", seed=0)
    step, _ = copy.step(problem, "train")
    assert 2 * step()["y"].nbytes == pytest.approx(moved(replace(case, batch=1), "forward", 4), rel=1e-3)

    rows = {
        name: bench.runner.Row("c", "train", name, "green", moved=bytes_of)
        for name, bytes_of in (("copy", 10.0), ("fuseblock", 40.0), ("stock", None))
    }
    times = {"copy": 1.0, "fuseblock": 5.0, "stock": 9.0}
    runs = {name: bench.timing.Runnable(lambda: None, wall=[time]) for name, time in times.items()}
    bench.runner._note_copy(rows, runs)
    assert rows["fuseblock"].of_copy.median == pytest.approx(0.8)
    assert rows["stock"].of_copy is None
    assert rows["copy"].of_copy is None


def test_bars_of_a_gpu(bench):
    """Of the rows of large norms the copy's share counts, of graphed steps the graphed stock."""

    def spread(value):
        return bench.timing.Spread(value, value, value)

    norm = {"kind": "norm", "elements": 2**26, "channels": 0}
    step = {"kind": "step", "elements": 0, "channels": 512}
    rows = [
        bench.runner.Row("large", "forward", "fuseblock", "green", sizes=norm, of_copy=spread(0.95)),
        bench.runner.Row(
            "small", "forward", "fuseblock", "green", sizes=norm | {"elements": 9}, of_copy=spread(0.1)
        ),
        bench.runner.Row("s", "step", "stock:graphed", "green", sizes=step, seconds=spread(3.0)),
        bench.runner.Row("s", "step", "fuseblock:graphed", "green", sizes=step, seconds=spread(2.5)),
    ]
    verdicts = {bar["bar"]: bar for bar in bench.summary.bars(rows, bench.suites.GAN.gpu_bars)}
    found = {name: (bar["value"], bar["verdict"]) for name, bar in verdicts.items() if bar["cases"]}
    assert sorted(found.values()) == [(0.95, "met"), (1.2, "missed")]
    assert {bar["verdict"] for name, bar in verdicts.items() if name not in found} == {"not measured"}


def test_process_peak_sees_what_is_touched(bench):
    if bench.memory.process_peak_available() is not None:
        pytest.skip(bench.memory.process_peak_available())
    size = 64 << 20
    peak = bench.memory.peak_of_process(lambda: torch.ones(size, dtype=torch.uint8))
    # The kernel keeps these counters per CPU and adds them up in batches of pages.
    assert abs(peak - size) < 1 << 20


def test_paired_timing(bench):
    slow = bench.timing.Runnable(lambda: time.sleep(0.02))
    fast = bench.timing.Runnable(lambda: time.sleep(0.01))
    bench.timing.interleave([slow, fast], budget_s=0.05)
    assert len(slow.wall) == len(fast.wall) >= 3
    assert 1.2 < bench.timing.paired_ratio(slow, fast).median < 3


def test_registry(bench):
    cases = bench.cases.CASES
    assert len({case.name for case in cases}) == len(cases)
    quick = bench.cases.select(quick=True)
    assert {mode for case in quick for mode in case.modes} == set(bench.cases.MODES)
    assert not any(case.long_on_cpu for case in bench.cases.select())
    assert len(bench.cases.select(full=True)) == len(bench.cases.select(device="cuda")) == len(cases)
    assert [case.name for case in bench.cases.select(["language-model"])] == ["language-model"]
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        bench.cases.check_patterns(["nothing"])


# --- the command line, with the library itself


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--budget", "0.01", "--rss"]
    command += [
        "--case",
        "step-32",
        "--json",
        str(tmp_path / "out.json"),
        "--html",
        str(tmp_path / "out.html"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["schema"] == 1
    assert report.keys() >= {
        "timestamp",
        "machine",
        "versions",
        "git",
        "command",
        "parameters",
        "ceilings",
        "rows",
    }
    assert report["versions"]["torch"] == torch.__version__
    assert report["git"].keys() == {"commit", "dirty"}
    assert min(report["ceilings"].values()) > 0
    rows = {row["provider"]: row for row in report["rows"]}
    for name in ("stock", "fuseblock"):
        row = rows[name]
        assert row["status"] == "green"
        assert row["seconds"]["q25"] <= row["seconds"]["median"] <= row["seconds"]["q75"]
        assert row["gflops"] > 0
        assert row["tensor_peak"] > 0
        assert row["process_peak"] >= 0
        assert 0 <= row["error_over_bound"] <= 1
    page = (tmp_path / "out.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "step-32" in page
    # Self-contained: nothing is loaded from elsewhere.
    assert "<script" not in page
    assert 'src="' not in page
    if importlib.util.find_spec("matplotlib") is not None:
        assert page.count("<svg") == 3


def test_usage_errors(bench, capsys):
    assert bench.cli.main(["--case", "nothing"]) == 2
    assert bench.cli.main(["--providers", "nothing"]) == 2
    if not torch.cuda.is_available():
        assert bench.cli.main(["--device", "cuda"]) == 2
    assert "no case matches" in capsys.readouterr().err
    assert bench.cli.main(["--case", "blur-up", "--mode", "double"]) == 2
    assert "no case has mode double; blur-up has forward, train" in capsys.readouterr().err


def test_the_readme_table_explains_itself(bench, capsys, monkeypatch):
    from benchmarks import readme_table

    monkeypatch.setattr(sys, "argv", ["readme_table", "--help"])
    with pytest.raises(SystemExit, match="0"):
        readme_table.main()
    assert "usage: python -m benchmarks.readme_table" in capsys.readouterr().out


def test_list(bench, capsys):
    assert bench.cli.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(case.name in out for case in bench.cases.CASES)
