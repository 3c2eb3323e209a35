"""The choice of backends and engines, and its explanation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fuseblock
from fuseblock import _ext, dispatch, functional, ops

GATES, C = torch.zeros(2, 12), torch.zeros(2, 3)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="expected one of auto, aten, cpu"), fuseblock.backend("fast"):
        pass


def test_backend_is_restored() -> None:
    with pytest.raises(KeyError), fuseblock.backend("reference"):
        raise KeyError
    assert dispatch.forced() == "auto"


def test_forced_backend_that_cannot_run_raises() -> None:
    with (
        fuseblock.backend("cuda"),
        pytest.raises(fuseblock.BackendError, match="no backend can run lstm_gates.*cuda:"),
    ):
        functional.lstm_gates(GATES, C)


def test_forced_backend_holds_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for op in ("lstm_gates", "lstm_gates_bwd", "lstm_gates_bwd_bwd"):
        for c in dispatch.candidates(op):
            if c.run is not None:
                spy = lambda *args, _c=c: (ran.append(_c.name), _c.run(*args))[1]  # noqa: E731
                spied = dispatch.Candidate(c.name, spy, c.why_not, c.devices, c.variant)
                swapped = tuple(spied if x is c else x for x in dispatch.candidates(op))
                monkeypatch.setitem(dispatch._CANDIDATES, op, swapped)
    gates = GATES.clone().requires_grad_()
    with fuseblock.backend("reference"):
        # The operator, not functional, which would run plain PyTorch.
        h, _ = ops.lstm_gates(gates, C)
    (grad,) = torch.autograd.grad(h.sum(), gates, create_graph=True)
    grad.sum().backward()
    assert ran == ["reference"] * 3


def test_backend_is_of_the_thread() -> None:
    seen = []
    with fuseblock.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_environment_variable() -> None:
    code = "import fuseblock.dispatch as d; print(d.forced())"
    assert run_python(code, FUSEBLOCK_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(code, FUSEBLOCK_BACKEND="fast")
    assert wrong.returncode != 0
    assert "FUSEBLOCK_BACKEND: expected one of auto" in wrong.stderr


def test_explain_operator() -> None:
    explanation = fuseblock.explain("lstm_gates", GATES, C)
    assert explanation.chosen == ("cpu" if _ext.why_not is None else "reference")
    reasons = dict(explanation.reasons)
    assert reasons["reference"] is None
    assert reasons["cuda"] is not None
    assert "lstm_gates: " in str(explanation)
    with fuseblock.backend("reference"):
        forced = fuseblock.explain("lstm_gates", GATES, C)
    assert forced.chosen == "reference"
    with pytest.raises(ValueError, match="expected one of block, lstm, .*lstm_gates"):
        fuseblock.explain("gru")


def test_explain_layer_names_the_engine_and_the_reason() -> None:
    weight = (torch.zeros(12, 4), torch.zeros(12, 3), None, None, None)
    explanation = fuseblock.explain(
        "lstm", torch.zeros(5, 2, 4), None, None, [weight], lengths=torch.tensor([5, 3])
    )
    assert explanation.chosen == "ours"
    assert "ragged" in str(explanation)
    with fuseblock.backend("aten"):
        assert fuseblock.explain("lstm", torch.zeros(5, 2, 4), None, None, [weight]).chosen == "aten"
        with pytest.raises(fuseblock.BackendError, match="ragged"):
            functional.lstm(torch.zeros(5, 2, 4), None, None, [weight], lengths=torch.tensor([5, 3]))


def layer_weights(inputs: int, hidden: int, proj: int | None = None) -> tuple[torch.Tensor | None, ...]:
    w_hr = None if proj is None else torch.zeros(proj, hidden)
    return torch.zeros(4 * hidden, inputs), torch.zeros(4 * hidden, proj or hidden), None, None, w_hr


SMALL, LARGE, AFTER_LARGE = layer_weights(4, 3), layer_weights(1000, 64), layer_weights(64, 64)
FUSED_LAYERS = {
    "small": ({}, [SMALL, layer_weights(3, 3)], [None, None]),
    "packed": ({"lengths": torch.tensor([4, 2])}, [SMALL], [None]),
    "full": ({"lengths": torch.tensor([5, 5])}, [SMALL], ["no row ends early"]),
    "dropout": ({"dropout": 0.5, "training": True}, [SMALL, layer_weights(3, 3)], ["dropout", "dropout"]),
    "dropout in evaluation": ({"dropout": 0.5}, [SMALL, layer_weights(3, 3)], [None, None]),
    "inference, one too large": ({}, [LARGE, AFTER_LARGE], ["core's cache", "all layers or none"]),
    "training, one too large": ({"train": True}, [LARGE, AFTER_LARGE], ["core's cache", None]),
    "projection": ({}, [layer_weights(4, 3, 2)], ["projection"]),
    "few rows": ({"steps": 2}, [SMALL], ["4 rows"]),
    "another dtype": ({"autocast": True}, [SMALL], ["autocast"]),
    "another backend": ({"backend": "reference"}, [SMALL], ["'reference' is forced"]),
}


@pytest.mark.skipif(_ext.why_not is not None, reason="needs the compiled library")
@pytest.mark.parametrize("case", FUSED_LAYERS)
def test_explain_says_which_layers_are_fused(case: str) -> None:
    options, weights, expected = FUSED_LAYERS[case]
    options = dict(options)
    inputs = weights[0][0].shape[1]
    x = torch.zeros(options.pop("steps", 5), 2, inputs, requires_grad=options.pop("train", False))
    with (
        fuseblock.backend(options.pop("backend", "auto")),
        torch.autocast("cpu", torch.bfloat16, enabled=options.pop("autocast", False)),
    ):
        reasons = [r for name, r in fuseblock.explain("lstm", x, None, None, weights, **options).reasons[2:]]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            functional.lstm(x, None, None, weights, **options)
    for reason, words in zip(reasons, expected, strict=True):
        assert reason is None if words is None else words in reason
    runs = sum(event.name == "fuseblock_cpu::lstm_layer" for event in profile.events())
    assert runs == reasons.count(None)


def test_explain_refuses_arguments_that_are_not_the_calls() -> None:
    with pytest.raises(TypeError, match=r"lstm_gates expects \(Tensor gates, Tensor c\), got \(\)"):
        fuseblock.explain("lstm_gates")
    with pytest.raises(TypeError, match=r"expects .*, got \(Tensor, list\)"):
        fuseblock.explain("lstm_gates", GATES, [1.0])
    with pytest.raises(TypeError, match=r"expects .*, got \(Tensor, c=Tensor\)"):
        fuseblock.explain("lstm_gates", GATES, c=C)
    image, weight = torch.zeros(3, 6, 6), torch.zeros(4, 3, 3, 3)
    with pytest.raises(
        ValueError, match=r"conv2d_stats: expected x of shape \(N, 3, H, W\), got \(3, 6, 6\)"
    ):
        fuseblock.explain("conv2d_stats", image, weight, None, 1, 1, 0, 0, None, None, "identity", 0.0)
    with pytest.raises(TypeError, match="missing a required argument: 'input'"):
        fuseblock.explain("lstm")
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        fuseblock.explain("lstm", torch.zeros(5, 2, 4), None, None, [SMALL], length=5)
    with pytest.raises(TypeError, match="lstm: expected input as a Tensor, got int"):
        fuseblock.explain("lstm", 5, None, None, [SMALL])
    with pytest.raises(ValueError, match="expected weights for every layer"):
        fuseblock.explain("lstm", torch.zeros(5, 2, 4), None, None, [])
    with pytest.raises(TypeError, match="explain: block: missing a required argument: 'input'"):
        fuseblock.explain("block", fuseblock.nn.Sequential())
    with pytest.raises(TypeError, match="block: expected input as a Tensor, got NoneType"):
        fuseblock.explain("block", fuseblock.nn.Sequential(), None)
    with pytest.raises(TypeError, match="explain: spectral_norm: missing a required argument: 'weights'"):
        fuseblock.explain("spectral_norm")
    with pytest.raises(TypeError, match=r"expected weights\[0\] as a Tensor, got str"):
        fuseblock.explain("spectral_norm", ["a"], ["b"], ["c"])
    with pytest.raises(TypeError, match=r"lstm_gates_bwd expects .*, got \(int, NoneType, Tensor, Tensor\)"):
        fuseblock.explain("lstm_gates_bwd", 3, None, GATES, C)
    state = torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match=r"bool save_state\), got \(.*, str\)"):
        fuseblock.explain(
            "lstm_recurrence",
            torch.zeros(5, 2, 12),
            state,
            state,
            torch.zeros(1, 12, 3),
            None,
            None,
            None,
            "no",
        )
    wrong = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="lstm_recurrence: expected w_hh of shape"):
        fuseblock.explain("lstm_recurrence_bwd", *(None,) * 5, *(wrong,) * 4, None, None, None)


def test_explain_an_operator_on_packed_rows() -> None:
    state, sizes = torch.zeros(1, 2, 3), torch.tensor([2, 1])
    args = torch.zeros(3, 12), state, state, torch.zeros(1, 12, 3), None, None, sizes, True
    assert fuseblock.explain("lstm_recurrence", *args).chosen in ("cpu", "reference")


def test_env_report() -> None:
    report = subprocess.run(
        [sys.executable, "-m", "fuseblock", "env"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for expected in (
        "torch",
        "triton",
        "lstm_gates_bwd_bwd",
        "lstm_recurrence",
        "lstm_layer ",
        "FUSEBLOCK_BACKEND",
    ):
        assert expected in report


HIDE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
"""


def test_works_without_triton() -> None:
    code = HIDE + (
        "import torch, fuseblock\n"
        "print(fuseblock.nn.LSTM(3, 4)(torch.zeros(5, 2, 3))[0].shape)\n"
        "print(fuseblock.explain('lstm_gates', torch.zeros(2, 12), torch.zeros(2, 3)))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


def test_works_without_the_compiled_library(tmp_path) -> None:
    """A copy of the Python sources alone, as an installation without a compiler has them."""
    import shutil
    from pathlib import Path

    package = Path(fuseblock.__file__).parent
    shutil.copytree(
        package, tmp_path / "fuseblock", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        + HIDE
        + "import torch, fuseblock\n"
        + f"assert fuseblock.__file__.startswith({str(tmp_path)!r}), fuseblock.__file__\n"
        + "m = fuseblock.nn.LSTM(3, 4)\n"
        + "m(torch.zeros(5, 2, 3))[0].sum().backward()\n"
        + "print(fuseblock.explain('lstm_gates', torch.zeros(2, 12), torch.zeros(2, 3)))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "without its compiled library" in done.stdout
    assert done.stdout.startswith("lstm_gates: reference")


def test_kernels_is_no_top_level_package() -> None:
    done = run_python("import importlib.util; print(importlib.util.find_spec('kernels'))")
    assert "fuseblock" not in done.stdout or done.stdout.strip() == "None"


@pytest.mark.parametrize(
    ("hidden", "batch", "wants", "engine"),
    [
        (20, 4096, None, "ours"),
        (256, 8, None, "ours"),
        (640, 32, None, "aten"),
        (256, 1024, "weight", "ours"),
        (256, 1024, "h0", "ours"),
        (256, 1024, "c0", "ours"),
        (256, 1024, None, "aten"),
        (256, 4096, "weight", "aten"),
    ],
)
def test_engine_on_a_cpu_follows_the_sizes(hidden: int, batch: int, wants: str | None, engine: str) -> None:
    """PyTorch's layer where ours would store a large input projection that nothing needs afterwards."""
    if _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    x = torch.empty(1).expand(32, batch, 64)
    weight = torch.empty(4 * hidden, 64)
    h0, c0 = (torch.empty(1, batch, hidden) for _ in range(2))
    if wants is not None:
        {"weight": weight, "h0": h0, "c0": c0}[wants].requires_grad_()
    weights = [(weight, torch.empty(4 * hidden, hidden), None, None, None)]
    assert fuseblock.explain("lstm", x, h0, c0, weights).chosen == engine
