"""`torch.compile` of the modules: one graph after `enable_compile`, a correct break without it, few compilations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations

import fuseblock

from .parity import packed, tensors_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=False):
        yield
    torch.compiler.reset()


class Model(torch.nn.Module):
    """An LSTM between two linear layers."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.encode = torch.nn.Linear(3, 4)
        self.lstm = fuseblock.nn.LSTM(4, 6, **options)
        features = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.decode = torch.nn.Linear(features, 2)

    def forward(self, x: Tensor, hx: tuple | None = None, lengths: Tensor | None = None) -> tuple:
        y, state = self.lstm(self.encode(x), hx, lengths=lengths)
        return self.decode(y), state


def check(model: torch.nn.Module, compiled: object, *args: object, **kwargs: object) -> None:
    """Equal outputs and gradients, compiled and not."""
    results = []
    for run in (model, compiled):
        model.zero_grad()
        outputs = tensors_of(run(*args, **kwargs))
        sum(out.square().sum() for out in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 2, "bias": False}],
)
def test_one_graph_with_changing_sizes(options: dict) -> None:
    """fullgraph, at most 3 compilations over a mix of T and B."""
    fuseblock.enable_compile()
    model = Model(**options)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for steps, batch in ((5, 3), (7, 3), (7, 4), (2, 9), (31, 2), (9, 9)):
        check(model, compiled, torch.randn(steps, batch, 3))
    assert 1 <= backend.frame_count <= 3


def test_the_operator_is_in_the_graph() -> None:
    """One opaque node per layer: nothing is unrolled over time."""
    fuseblock.enable_compile()
    model, backend = Model(num_layers=2), CompileCounterWithBackend("aot_eager")
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(50, 2, 3))
    targets = [str(node.target) for graph in backend.graphs for node in graph.graph.nodes]
    assert sum("fuseblock" in target and "lstm_recurrence" in target for target in targets) == 2
    assert len(targets) < 120


def test_states_and_lengths() -> None:
    fuseblock.enable_compile()
    model, backend = Model(bidirectional=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for steps, batch in ((5, 3), (7, 4), (9, 2)):
        hx = torch.randn(2, batch, 6), torch.randn(2, batch, 6)
        lengths = torch.randint(0, steps + 1, (batch,))
        check(model, compiled, torch.randn(steps, batch, 3), hx, lengths=lengths)
    assert 1 <= backend.frame_count <= 3


def test_without_gradients_and_in_eval_mode() -> None:
    fuseblock.enable_compile()
    model = Model(num_layers=2, dropout=0.5).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], model(x)[0])
    model.train()
    assert not torch.allclose(compiled(x)[0], compiled(x)[0])


def test_unbatched_and_step_by_step() -> None:
    fuseblock.enable_compile()
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(model, compiled, torch.randn(5, 3))
    hx = torch.randn(1, 1, 6), torch.randn(1, 1, 6)
    check(model, compiled, torch.randn(1, 1, 3), hx)


def test_graph_break_without_the_call() -> None:
    """Right results; the layers around the LSTM may still be compiled."""
    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    counters.clear()
    check(model, compiled, torch.randn(5, 2, 3))
    reasons = [*counters["graph_break"], *counters["unimplemented"]]
    assert any("RNN, GRU, or LSTM" in reason for reason in reasons)


def test_fullgraph_without_the_call_raises() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(Model(), backend="aot_eager", fullgraph=True)(torch.randn(5, 2, 3))


def test_packed_sequences() -> None:
    """Their number of rows depends on data: a graph break, and right results."""
    fuseblock.enable_compile()
    lstm = fuseblock.nn.LSTM(4, 6, bidirectional=True)
    compiled = torch.compile(lstm, backend="aot_eager")
    x = torch.randn(5, 3, 4)
    for lengths in ([5, 2, 4], [3, 5, 1]):
        sequence = packed(x, lengths)
        for a, b in zip(tensors_of(compiled(sequence)), tensors_of(lstm(sequence)), strict=True):
            torch.testing.assert_close(a, b)


def test_normalised_weights() -> None:
    fuseblock.enable_compile()
    model = Model()
    parametrizations.weight_norm(model.lstm, "weight_hh_l0")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(model, compiled, torch.randn(5, 2, 3))


def test_replaced_weight_is_seen() -> None:
    """Weights are inputs of the compiled graph, not constants."""
    fuseblock.enable_compile()
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, 3)
    check(model, compiled, x)
    with torch.no_grad():
        model.lstm.weight_hh_l0.mul_(2)
    check(model, compiled, x)
    model.lstm.weight_hh_l0 = torch.nn.Parameter(torch.randn(24, 6))
    check(model, compiled, x)


def test_lstm_cell_needs_no_call() -> None:
    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = fuseblock.nn.LSTMCell(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h, c = self.cell(x[0])
            for step in x[1:]:
                h, c = self.cell(step, (h, c))
            return h, c

    model, backend = Loop(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (2, 3, 7, 11):
        check(model, compiled, torch.randn(4, batch, 3))
    assert 1 <= backend.frame_count <= 2


def test_second_order_through_a_compiled_region_is_refused() -> None:
    """AOTAutograd's own limit; the eager module differentiates twice."""
    fuseblock.enable_compile()
    lstm = fuseblock.nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    y, _ = torch.compile(lstm, backend="aot_eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.square().sum().backward()


@pytest.mark.slow
def test_inductor() -> None:
    fuseblock.enable_compile()
    model = Model(num_layers=2, bidirectional=True)
    compiled = torch.compile(model, fullgraph=True)
    for steps, batch in ((5, 3), (7, 4)):
        check(model, compiled, torch.randn(steps, batch, 3))
