"""LSTMs that do not keep their gates for backward: the same gradients, of both orders, from half of the memory or less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseblock

LAYERS = {
    "small": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "no bias": {"bias": False},
}
RAGGED = {"padded": None, "lengths": [7, 3, 0, 5], "packed": [7, 3, 1, 5]}


def pair(
    kind: str, dtype: torch.dtype = torch.float64, inputs: int = 4, hidden: int = 5
) -> list[fuseblock.nn.LSTM]:
    torch.manual_seed(0)
    keeps = fuseblock.nn.LSTM(inputs, hidden, dtype=dtype, **LAYERS[kind])
    again = copy.deepcopy(keeps)
    again.save_gates = False
    return [keeps, again]


def run(
    lstm: fuseblock.nn.LSTM, x: Tensor, layout: str, **options: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(loss, leaves, states) of a run with initial states."""
    rows, directions = lstm.num_layers * (2 if lstm.bidirectional else 1), x.shape[1]
    torch.manual_seed(1)
    h0 = torch.randn(rows, directions, lstm.proj_size or lstm.hidden_size, dtype=x.dtype, device=x.device)
    c0 = torch.randn(rows, directions, lstm.hidden_size, dtype=x.dtype, device=x.device)
    leaves = [t.detach().requires_grad_() for t in (x, h0, c0)]
    if layout == "packed":
        given = torch.nn.utils.rnn.pack_padded_sequence(
            leaves[0], torch.tensor(RAGGED[layout]), enforce_sorted=False
        )
        output, states = lstm(given, tuple(leaves[1:]))
        output = output.data
    else:
        lengths = RAGGED[layout]
        output, states = lstm(
            leaves[0], tuple(leaves[1:]), lengths=None if lengths is None else torch.tensor(lengths)
        )
    return output.sin().sum() + states[0].cos().sum() + states[1].sin().sum(), leaves, list(states)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layout", RAGGED)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind: str, layout: str, order: int) -> None:
    x = torch.randn(7, 4, 4, dtype=torch.float64)
    found = []
    for lstm in pair(kind):
        loss, leaves, _ = run(lstm, x, layout)
        wanted = [*leaves, *lstm.parameters()]
        grads = torch.autograd.grad(loss, wanted, create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(sum(g.sin().sum() for g in grads), wanted)
        found.append(grads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_saved_gates(dtype: torch.dtype) -> None:
    """At most twice the error of the run that saves them, and a rounding."""
    exact = pair("small", torch.float64, 8, 24)[0]
    x = torch.randn(7, 4, 8).to(dtype)
    errors = []
    loss, leaves, _ = run(exact, x.double(), "lengths")
    want = torch.autograd.grad(loss, [*leaves, *exact.parameters()])
    for lstm in pair("small", dtype, 8, 24):
        lstm.load_state_dict(exact.state_dict())
        loss, leaves, _ = run(lstm, x, "lengths")
        got = torch.autograd.grad(loss, [*leaves, *lstm.parameters()])
        errors.append(
            max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))
        )
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps


def saved_bytes(lstm: fuseblock.nn.LSTM, x: Tensor, layout: str) -> int:
    """Of what a forward pass keeps, without the input, the parameters and its results."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, leaves, _ = run(lstm, x, layout)
    for t in (*leaves, *lstm.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.4), (torch.bfloat16, 0.5)], ids=str)
def test_half_of_the_memory(dtype: torch.dtype, share: float) -> None:
    keeps, again = pair("small", dtype, 32, 64)
    x = torch.randn(40, 4, 32, dtype=dtype)
    assert saved_bytes(again, x, "padded") <= share * saved_bytes(keeps, x, "padded")


def test_twice_through_the_same_graph() -> None:
    lstm = pair("small")[1]
    loss, leaves, _ = run(lstm, torch.randn(7, 4, 4, dtype=torch.float64), "padded")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


def test_explained_and_kept_by_copies() -> None:
    lstm = pair("no bias")[1]
    assert copy.deepcopy(lstm).save_gates is False
    weights = [(lstm.weight_ih_l0, lstm.weight_hh_l0, None, None, None)]
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    engine = fuseblock.explain("lstm", x, None, None, weights, save_gates=False)
    assert engine.chosen == "ours"
    assert "saves the gates" in str(engine)
