"""The same mistake raises the same error, with the same message, as in torch.nn."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import zeros
from torch.nn.utils.rnn import pack_sequence

import fuseblock
from fuseblock import _ext

from .parity import packed, twins

X = torch.randn(5, 2, 4)
PACKED = packed(X, [5, 3])
F64 = torch.float64

CONSTRUCTOR = {
    "dropout above 1": {"dropout": 1.5},
    "dropout below 0": {"dropout": -0.1},
    "dropout of a wrong type": {"dropout": True},
    "bias of a wrong type": {"bias": 1},
    "batch_first of a wrong type": {"batch_first": 1},
    "input_size of a wrong type": {"input_size": 4.0},
    "input_size zero": {"input_size": 0},
    "hidden_size of a wrong type": {"hidden_size": "3"},
    "hidden_size zero": {"hidden_size": 0},
    "no layers": {"num_layers": 0},
    "negative projection": {"proj_size": -1},
    "projection too large": {"proj_size": 3},
    "unknown argument": {"layers": 2},
}

LSTM_CALLS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "no input": lambda m: m(),
    "unknown keyword": lambda m: m(X, length=3),
    "None": lambda m: m(None),
    "a list": lambda m: m([1.0, 2.0]),
    "1-D": lambda m: m(X[0, 0]),
    "4-D": lambda m: m(X[None]),
    "no steps": lambda m: m(X[:0]),
    "no steps, no rows": lambda m: m(X[:0, :0]),
    "no steps, unbatched": lambda m: m(X[:0, 0]),
    "features": lambda m: m(X[..., :3]),
    "features, unbatched": lambda m: m(X[:, 0, :3]),
    "dtype": lambda m: m(X.double()),
    "dtype of 16 bit": lambda m: m(X.bfloat16()),
    "integers": lambda m: m(X.long()),
    "complex": lambda m: m(X.to(torch.complex64)),
    "device": lambda m: m(X.to("meta")),
    "state as a tensor": lambda m: m(X, zeros(1, 2, 3)),
    "state as one tensor of two": lambda m: m(X, zeros(2, 1, 2, 3)),
    "state as a string": lambda m: m(X, "hc"),
    "one state": lambda m: m(X, (zeros(1, 2, 3),)),
    "three states": lambda m: m(X, (zeros(1, 2, 3),) * 3),
    "states of None": lambda m: m(X, (None, None)),
    "states of 2-D": lambda m: m(X, (zeros(2, 3), zeros(2, 3))),
    "states of 3-D, unbatched": lambda m: m(X[:, 0], (zeros(1, 1, 3), zeros(1, 1, 3))),
    "state layers": lambda m: m(X, (zeros(2, 2, 3), zeros(2, 2, 3))),
    "state rows": lambda m: m(X, (zeros(1, 3, 3), zeros(1, 3, 3))),
    "state features of h": lambda m: m(X, (zeros(1, 2, 4), zeros(1, 2, 3))),
    "state features of c": lambda m: m(X, (zeros(1, 2, 3), zeros(1, 2, 4))),
    "state rows of c": lambda m: m(X, (zeros(1, 2, 3), zeros(1, 1, 3))),
    "state features, unbatched": lambda m: m(X[:, 0], (zeros(1, 4), zeros(1, 4))),
    "state dtype": lambda m: m(X, (zeros(1, 2, 3, dtype=F64), zeros(1, 2, 3, dtype=F64))),
    "state dtype of h": lambda m: m(X, (zeros(1, 2, 3, dtype=F64), zeros(1, 2, 3))),
    "state dtype of c": lambda m: m(X, (zeros(1, 2, 3), zeros(1, 2, 3, dtype=F64))),
    "state dtype of 16 bit": lambda m: m(X, (zeros(1, 2, 3).bfloat16(), zeros(1, 2, 3).bfloat16())),
    "state device": lambda m: m(X, (zeros(1, 2, 3, device="meta"), zeros(1, 2, 3))),
    "packed features": lambda m: m(PACKED._replace(data=PACKED.data[:, :3])),
    "packed dtype": lambda m: m(PACKED.to(F64)),
    "packed 3-D": lambda m: m(pack_sequence([torch.zeros(5, 4, 2), torch.zeros(3, 4, 2)])),
    "packed state rows": lambda m: m(packed(X, [5, 3], True), (zeros(1, 3, 3), zeros(1, 3, 3))),
    "packed state too few rows": lambda m: m(PACKED, (zeros(1, 1, 3), zeros(1, 1, 3))),
    "packed state features": lambda m: m(PACKED, (zeros(1, 2, 4), zeros(1, 2, 3))),
    "packed state 2-D": lambda m: m(PACKED, (zeros(2, 3), zeros(2, 3))),
    "packed state dtype": lambda m: m(PACKED, (zeros(1, 2, 3, dtype=F64), zeros(1, 2, 3))),
    "packed state as a tensor": lambda m: m(PACKED, zeros(1, 2, 3)),
    "packed, one state": lambda m: m(PACKED, (zeros(1, 2, 3),)),
}

CELL_X = torch.randn(2, 4)
CELL_CALLS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "no input": lambda m: m(),
    "unknown keyword": lambda m: m(CELL_X, lengths=[1, 2]),
    "None": lambda m: m(None),
    "0-D": lambda m: m(torch.tensor(1.0)),
    "3-D": lambda m: m(CELL_X[None]),
    "features": lambda m: m(CELL_X[:, :3]),
    "features, unbatched": lambda m: m(CELL_X[0, :3]),
    "dtype": lambda m: m(CELL_X.double()),
    "integers": lambda m: m(CELL_X.long()),
    "device": lambda m: m(CELL_X.to("meta")),
    "state as a tensor": lambda m: m(CELL_X, zeros(2, 3)),
    "state as one tensor of two": lambda m: m(CELL_X, zeros(2, 2, 3)),
    "one state": lambda m: m(CELL_X, (zeros(2, 3),)),
    "three states": lambda m: m(CELL_X, (zeros(2, 3),) * 3),
    "states of None": lambda m: m(CELL_X, (None, None)),
    "state of 3-D": lambda m: m(CELL_X, (zeros(1, 2, 3), zeros(1, 2, 3))),
    "state of 1-D": lambda m: m(CELL_X, (zeros(3), zeros(3))),
    "state of 2-D, unbatched": lambda m: m(CELL_X[0], (zeros(1, 3), zeros(1, 3))),
    "state rows": lambda m: m(CELL_X, (zeros(3, 3), zeros(3, 3))),
    "state rows of c": lambda m: m(CELL_X, (zeros(2, 3), zeros(1, 3))),
    "state features of h": lambda m: m(CELL_X, (zeros(2, 4), zeros(2, 3))),
    "state features of c": lambda m: m(CELL_X, (zeros(2, 3), zeros(2, 4))),
    "state dtype of h": lambda m: m(CELL_X, (zeros(2, 3, dtype=F64), zeros(2, 3))),
    "state dtype of 16 bit": lambda m: m(CELL_X, (zeros(2, 3).bfloat16(), zeros(2, 3))),
    "state device": lambda m: m(CELL_X, (zeros(2, 3, device="meta"), zeros(2, 3))),
}


def error_of(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("mistake", CONSTRUCTOR)
def test_constructor(mistake: str) -> None:
    options = {"input_size": 4, "hidden_size": 3} | CONSTRUCTOR[mistake]
    assert error_of(lambda: fuseblock.nn.LSTM(**options)) == error_of(lambda: torch.nn.LSTM(**options))


def test_dropout_warning() -> None:
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        fuseblock.nn.LSTM(4, 3, dropout=0.5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mistake", LSTM_CALLS)
def test_lstm(mistake: str, training: bool) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    call = LSTM_CALLS[mistake]
    stock.train(training), ours.train(training)
    assert error_of(lambda: call(ours)) == error_of(lambda: call(stock))


@pytest.mark.parametrize("mistake", LSTM_CALLS)
def test_lstm_without_gradients_on_a_forced_backend(mistake: str) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    call = LSTM_CALLS[mistake]
    with torch.no_grad(), fuseblock.backend("reference"):
        assert error_of(lambda: call(ours)) == error_of(lambda: call(stock))


def test_lstm_projection_sizes() -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3, proj_size=2)
    for h, c in ((3, 3), (2, 2)):
        states = zeros(1, 2, h), zeros(1, 2, c)
        assert error_of(lambda s=states: ours(X, s)) == error_of(lambda s=states: stock(X, s))


def test_lstm_batch_first() -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3, batch_first=True)
    calls = [
        lambda m: m(X[:, :0]),
        lambda m: m(X, (zeros(1, 2, 3), zeros(1, 2, 3))),
        lambda m: m(X, (zeros(5, 1, 3), zeros(5, 1, 3))),
    ]
    for call in calls:
        assert error_of(lambda c=call: c(ours)) == error_of(lambda c=call: c(stock))


REPLACED = {
    "weight_ih_l0": (12, 5),
    "weight_hh_l0": (12, 3),
    "bias_ih_l0": (3,),
    "bias_hh_l0_reverse": (12, 1),
    "weight_hr_l0": (3, 3),
    "weight_ih_l1": (12, 2),
    "weight_hh_l1_reverse": (16, 2),
}


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_weight_of_another_shape(name: str, backend: str) -> None:
    """PyTorch's oneDNN layer takes some of these and reads beyond the weight's end."""
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    ours = fuseblock.nn.LSTM(4, 3, **options)
    expected = tuple(getattr(ours, name).shape)
    setattr(ours, name, torch.nn.Parameter(torch.zeros(REPLACED[name])))
    message = f"expected {name} of shape {expected}, got {REPLACED[name]}"
    for x in (X, PACKED):
        with fuseblock.backend(backend), pytest.raises(ValueError, match=re.escape(message)):
            ours(x)


@pytest.mark.skipif(_ext.why_not is not None, reason="needs the compiled library")
def test_empty_steps_at_the_end_of_a_packed_sequence() -> None:
    """torch.nn.LSTM takes them on a CPU; PyTorch's packing functions make none."""
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    x = PACKED._replace(batch_sizes=torch.cat((PACKED.batch_sizes, torch.tensor([0]))))
    stock(x)
    with fuseblock.backend("cpu"), pytest.raises(RuntimeError, match="batch_sizes must be positive"):
        ours(x)


@pytest.mark.parametrize("mistake", CELL_CALLS)
def test_lstm_cell(mistake: str) -> None:
    stock, ours = twins(torch.nn.LSTMCell, 4, 3)
    call = CELL_CALLS[mistake]
    assert error_of(lambda: call(ours)) == error_of(lambda: call(stock))
