"""Ways out of Python: `torch.export`, and TorchScript and ONNX after `unfuse`."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fuseblock


class Model(torch.nn.Module):
    """A recurrent regressor."""

    def __init__(self, ragged: bool = False) -> None:
        super().__init__()
        self.lstm = fuseblock.nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(10, 1)
        self.ragged = ragged

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.ragged:
            return self.head(self.lstm(x, lengths=lengths)[0])
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_with_symbolic_time_and_batch(strict: bool) -> None:
    model = Model().eval()
    time, batch = torch.export.Dim("time", min=2, max=4096), torch.export.Dim("batch", min=2, max=512)
    shapes = ({0: batch, 1: time}, None)
    program = torch.export.export(model, (torch.randn(3, 7, 3),), dynamic_shapes=shapes[:1], strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("lstm_recurrence" in target for target in targets) == 2
    for shape in ((3, 7), (2, 50), (9, 2)):
        x = torch.randn(*shape, 3)
        torch.testing.assert_close(program.module()(x), model(x))


def test_export_with_lengths() -> None:
    model = Model(ragged=True).eval()
    time, batch = torch.export.Dim("time", min=2, max=4096), torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(
        model,
        (torch.randn(3, 7, 3), torch.tensor([7, 1, 3])),
        dynamic_shapes=({0: batch, 1: time}, {0: batch}),
    )
    x, lengths = torch.randn(4, 9, 3), torch.tensor([2, 9, 0, 5])
    torch.testing.assert_close(program.module()(x, lengths), model(x, lengths))


def test_export_saves_and_loads() -> None:
    model = Model().eval()
    x = torch.randn(3, 7, 3)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x))


def test_export_of_the_cell() -> None:
    cell = fuseblock.nn.LSTMCell(3, 4)
    batch = torch.export.Dim("batch", min=2, max=512)
    args = torch.randn(3, 3), (torch.randn(3, 4), torch.randn(3, 4))
    program = torch.export.export(cell, args, dynamic_shapes=({0: batch}, ({0: batch}, {0: batch})))
    x, hx = torch.randn(6, 3), (torch.randn(6, 4), torch.randn(6, 4))
    torch.testing.assert_close(program.module()(x, hx), cell(x, hx))


class Scriptable(torch.nn.Module):
    """What TorchScript can read: no keyword arguments of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fuseblock.nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True)
        self.cell = fuseblock.nn.LSTMCell(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.lstm(x)[0][:, -1])[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_after_unfuse() -> None:
    model = Scriptable()
    x = torch.randn(3, 7, 3)
    want = model(x)
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(model)
    fuseblock.unfuse(model, verbose=False)
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    fuseblock.fuse(model, verbose=False)
    torch.testing.assert_close(model(x), want)


def test_onnx_after_unfuse() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Model().eval()
    x = torch.randn(3, 7, 3)
    want = model(x)
    fuseblock.unfuse(model, verbose=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), buffer, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "b", 1: "t"}}
        )
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("recorded", [True, False])
def test_trace(recorded: bool) -> None:
    """`torch.jit.trace` records the operators; other sizes than the traced ones run."""
    model = Model().requires_grad_(recorded)
    traced = torch.jit.trace(model, (torch.randn(2, 4, 3),), check_trace=False)
    x = torch.randn(3, 7, 3)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["jit", "fx"])
def test_traced_lengths_are_no_constants(how: str) -> None:
    model, x = Model(ragged=True).requires_grad_(False), torch.randn(3, 7, 3)
    example = (x, torch.tensor([7, 2, 3]))
    traced = torch.jit.trace(model, example, check_trace=False) if how == "jit" else make_fx(model)(*example)
    lengths = torch.tensor([1, 5, 4])
    torch.testing.assert_close(traced(x, lengths), model(x, lengths))
