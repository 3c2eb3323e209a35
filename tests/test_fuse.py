"""fuse and unfuse: what is swapped, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fuseblock


class Encoder(nn.Module):
    """A model with every kind of recurrent module."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True, dropout=0.25)
        self.cells = nn.ModuleList([nn.LSTMCell(12, 5), nn.LSTMCell(5, 5)])
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(x)[0][:, -1]
        for cell in self.cells:
            h, _ = cell(h)
        return self.head(h)


def test_swaps_in_place() -> None:
    model = Encoder().eval()
    before = {name: id(module) for name, module in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    x = torch.randn(3, 7, 4)
    want = model(x)
    report = fuseblock.fuse(model, verbose=False)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [id(p) for p in model.parameters()] == parameters
    assert type(model.rnn) is fuseblock.nn.LSTM and type(model.cells[1]) is fuseblock.nn.LSTMCell
    assert [entry.name for entry in report.swapped] == ["rnn", "cells.0", "cells.1"] and not report.skipped
    torch.testing.assert_close(model(x), want)
    assert not any(module.training for module in model.modules())


def test_unfuse_is_the_inverse() -> None:
    model = Encoder()
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    text = repr(model)
    fuseblock.fuse(model, verbose=False)
    assert repr(model) == text
    report = fuseblock.unfuse(model, verbose=False)
    assert [entry.outcome for entry in report.swapped] == [
        "torch.nn.LSTM",
        "torch.nn.LSTMCell",
        "torch.nn.LSTMCell",
    ]
    for name, module in model.named_modules():
        assert module.__dict__.keys() == state[name].keys()
        assert all(module.__dict__[key] is state[name][key] for key in state[name])
    assert type(model.rnn) is nn.LSTM and type(model.cells[0]) is nn.LSTMCell


def test_the_model_itself() -> None:
    lstm = nn.LSTM(4, 3)
    alias = lstm
    assert fuseblock.fuse(lstm, verbose=False).swapped[0].name == ""
    assert type(alias) is fuseblock.nn.LSTM
    fuseblock.unfuse(lstm, verbose=False)
    assert type(alias) is nn.LSTM


def test_modules_made_by_us_become_stock() -> None:
    model = nn.Sequential(fuseblock.nn.LSTM(4, 3), fuseblock.nn.LSTMCell(3, 2))
    fuseblock.unfuse(model, verbose=False)
    assert [type(module) for module in model] == [nn.LSTM, nn.LSTMCell]


def test_twice_is_once() -> None:
    model = Encoder()
    fuseblock.fuse(model, verbose=False)
    report = fuseblock.fuse(model, verbose=False)
    assert not report.swapped
    assert {entry.outcome for entry in report.skipped} == {"it is one already"}


def test_shared_module_and_optimizer() -> None:
    """A module that appears twice is one module still, and a running optimizer keeps its state."""
    model = nn.ModuleDict({"a": nn.LSTM(4, 4)})
    model["b"] = model["a"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(5, 2, 4)
    for step in range(2):
        model["b"](model["a"](x)[0])[0].square().sum().backward()
        optimizer.step(), optimizer.zero_grad()
        if step == 0:
            report = fuseblock.fuse(model, verbose=False)
    assert len(report.swapped) == 1 and model["a"] is model["b"]
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_hooks_buffers_and_requires_grad_stay() -> None:
    lstm = nn.LSTM(4, 3)
    seen = []
    lstm.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    lstm.register_buffer("extra", torch.ones(1))
    lstm.bias_hh_l0.requires_grad_(False)
    fuseblock.fuse(lstm, verbose=False)
    lstm(torch.randn(5, 2, 4))[0].sum().backward()
    assert seen == [fuseblock.nn.LSTM]
    assert "extra" in lstm.state_dict() and lstm.bias_hh_l0.grad is None and lstm.bias_ih_l0.grad is not None


class MyLSTM(nn.LSTM):
    """A subclass, whose forward might be anything."""


class MyFusedLSTM(fuseblock.nn.LSTM):
    """A user's subclass of ours."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_and_why() -> None:
    patched = nn.LSTM(4, 3)
    patched.forward = types.MethodType(lambda self, x: x, patched)
    model = nn.ModuleDict(
        {
            "gru": nn.GRU(4, 3),
            "cell": nn.GRUCell(4, 3),
            "own": MyLSTM(4, 3),
            "own_fused": MyFusedLSTM(4, 3),
            "patched": patched,
            "scripted": torch.jit.script(nn.LSTM(4, 3)),
            "quantized": torch.ao.nn.quantized.dynamic.LSTM(4, 3),
            "fine": nn.LSTM(4, 3),
            "linear": nn.Linear(4, 3),
        }
    )
    classes = {name: type(module) for name, module in model.items() if name != "fine"}
    report = fuseblock.fuse(model, verbose=False)
    assert [entry.name for entry in report.swapped] == ["fine"]
    assert {name: type(module) for name, module in model.items() if name != "fine"} == classes
    reasons = {entry.name: entry.outcome for entry in report.skipped}
    assert reasons == {
        "gru": "fuseblock has no fused version of it",
        "cell": "fuseblock has no fused version of it",
        "own": "a subclass of torch.nn.LSTM; its forward may differ",
        "own_fused": "a subclass of fuseblock.nn.LSTM; its forward may differ",
        "patched": "its forward was replaced on the instance, so a change of class would have no effect",
        "scripted": "a TorchScript module; its code is compiled already",
        "quantized": "a quantized module",
    }
    undone = fuseblock.unfuse(model, verbose=False)
    assert [entry.name for entry in undone.swapped] == ["fine"]
    assert [entry.name for entry in undone.skipped] == ["own_fused"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrized_modules() -> None:
    """The class that parametrize made is rebuilt on ours, for this module only, and back."""
    lstm = parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    cell = parametrizations.spectral_norm(nn.LSTMCell(3, 2), "weight_hh").eval()
    model = nn.ModuleList([lstm, cell])
    sibling = copy.deepcopy(lstm)
    x = torch.randn(5, 2, 4)
    want, want_cell = lstm(x)[0], cell(torch.ones(2, 3))[0]
    report = fuseblock.fuse(model, verbose=False)
    assert [entry.before for entry in report.swapped] == [
        "torch.nn.LSTM (parametrized)",
        "torch.nn.LSTMCell (parametrized)",
    ]
    assert isinstance(lstm, fuseblock.nn.LSTM) and type(lstm).__name__ == "ParametrizedLSTM"
    assert not isinstance(sibling, fuseblock.nn.LSTM)
    torch.testing.assert_close(lstm(x)[0], want)
    torch.testing.assert_close(cell(torch.ones(2, 3))[0], want_cell)
    fuseblock.unfuse(model, verbose=False)
    assert not isinstance(lstm, fuseblock.nn.LSTM) and type(lstm).__bases__ == (nn.LSTM,)
    torch.testing.assert_close(lstm(x)[0], want)
    fuseblock.fuse(model, verbose=False)
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert type(lstm) is fuseblock.nn.LSTM
    torch.testing.assert_close(lstm(x)[0], want)
    torch.testing.assert_close(sibling(x)[0], want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_style_weight_norm() -> None:
    lstm = torch.nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    x = torch.randn(5, 2, 4)
    want = lstm(x)[0]
    fuseblock.fuse(lstm, verbose=False)
    torch.testing.assert_close(lstm(x)[0], want)
    lstm(x)[0].sum().backward()
    assert lstm.weight_hh_l0_v.grad is not None


def test_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 3), "gru": nn.GRU(4, 3)})
    report = fuseblock.fuse(model)
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == str(report)
    assert printed.splitlines() == [
        "fuse: 1 module swapped, 1 left",
        "  swapped  rnn: torch.nn.LSTM -> fuseblock.nn.LSTM",
        "  left     gru: torch.nn.GRU: fuseblock has no fused version of it",
    ]
    assert str(fuseblock.unfuse(nn.LSTM(2, 2), verbose=False)) == "unfuse: 0 modules swapped, 0 left"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("call", [fuseblock.fuse, fuseblock.unfuse])
def test_not_a_module(call: object) -> None:
    with pytest.raises(TypeError, match=r"fuse: model must be a torch\.nn\.Module, got list"):
        call([nn.LSTM(2, 2)])


def test_compiled_code_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model compiled before fuse runs the fused modules afterwards."""
    calls = []
    forward = fuseblock.nn.LSTMCell.forward

    def counted(self: nn.Module, *args: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return forward(self, *args)

    model = nn.Sequential(nn.LSTMCell(4, 3))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 4)
    want = compiled(x)[0]
    monkeypatch.setattr(fuseblock.nn.LSTMCell, "forward", torch.compiler.disable(counted))
    fuseblock.fuse(model, verbose=False)
    torch.testing.assert_close(compiled(x)[0], want)
    assert calls
