"""fuseblock.nn.LSTM gives what torch.nn.LSTM gives: PyTorch's own module inputs, and random calls."""

from __future__ import annotations

import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import module_db

import fuseblock

from .parity import (
    assert_equal_float64,
    check_against_stock,
    evaluate,
    packed,
    tensors_of,
    twins,
    with_leaves,
)

MODULE_INFO = next(info for info in module_db if info.module_cls is torch.nn.LSTM)


def module_inputs(dtype: torch.dtype, training: bool) -> list:
    torch.manual_seed(0)
    return list(
        MODULE_INFO.module_inputs_func(MODULE_INFO, "cpu", dtype, requires_grad=True, training=training)
    )


MODULE_INPUTS = range(len(module_inputs(torch.float64, True)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("index", MODULE_INPUTS)
def test_pytorch_module_inputs(engine: str, index: int, training: bool) -> None:
    sample = module_inputs(torch.float64, training)[index]
    stock, ours = twins(torch.nn.LSTM, **sample.constructor_input.kwargs, dtype=torch.float64)
    stock.train(training), ours.train(training)
    args = sample.forward_input.args
    assert_equal_float64(evaluate(ours, args), evaluate(stock, args), longest_sum=4 * 3 * 3 * 2)
    expected = sample.reference_fn(ours, *args)
    for got, want in zip(tensors_of(ours(*args)), tensors_of(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    sample = module_inputs(torch.float32, training)[index]
    stock, ours = twins(torch.nn.LSTM, **sample.constructor_input.kwargs)
    check_against_stock(stock.train(training), ours.train(training), sample.forward_input.args, draws=4)


@pytest.mark.parametrize("index", MODULE_INPUTS)
def test_pytorch_module_inputs_gradcheck(index: int) -> None:
    sample = module_inputs(torch.float64, True)[index]
    _, ours = twins(torch.nn.LSTM, **sample.constructor_input.kwargs, dtype=torch.float64)
    args = with_leaves(sample.forward_input.args)
    names = [name for name, _ in ours.named_parameters()]

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parameters = dict(zip(names, tensors[: len(names)], strict=True))
        x, *hx = tensors[len(names) :]
        result = torch.func.functional_call(ours, parameters, (x, tuple(hx)) if hx else (x,))
        return tuple(tensors_of(result))

    inputs = (*(parameter.detach().requires_grad_() for parameter in ours.parameters()), *tensors_of(args))
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


def random_call(seed: int) -> tuple[dict, tuple, list[int] | None]:
    """Constructor arguments and call arguments, drawn from everything that the stock module takes."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden = rng.choice([1, 2, 3, 8, 17, 33])
    layers = rng.choice([1, 1, 2, 3])
    options = {
        "input_size": rng.choice([1, 3, 16]),
        "hidden_size": hidden,
        "num_layers": layers,
        "bias": rng.random() < 0.7,
        "batch_first": rng.random() < 0.5,
        "bidirectional": rng.random() < 0.5,
        "proj_size": rng.choice([0, 0, hidden // 2]),
    }
    time, batch = rng.choice([1, 2, 7, 20]), rng.choice([1, 2, 5])
    form = rng.choice(["batched", "batched", "unbatched", "packed sorted", "packed unsorted"])
    rows, projected = layers * (1 + options["bidirectional"]), options["proj_size"] or hidden
    state = torch.randn(rows, batch, projected), torch.randn(rows, batch, hidden)
    x = torch.randn(time, batch, options["input_size"])
    lengths = [time] + [rng.randint(1, time) for _ in range(batch - 1)]
    if form == "packed sorted":
        x = packed(x, sorted(lengths, reverse=True), enforce_sorted=True)
    elif form == "packed unsorted":
        x = packed(x, rng.sample(lengths, batch))
    elif form == "unbatched":
        x, state = x[:, 0], (state[0][:, 0], state[1][:, 0])
    elif options["batch_first"]:
        x = x.transpose(0, 1) if rng.random() < 0.5 else x.transpose(0, 1).contiguous()
    return options, ((x, state) if rng.random() < 0.5 else (x,))


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(engine: str, seed: int) -> None:
    options, args = random_call(seed)
    stock, ours = twins(torch.nn.LSTM, **options)
    check_against_stock(stock, ours, args)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_return_what_stock_returns(engine: str, seed: int) -> None:
    """Types, shapes, dtypes and the packed sequence's indices."""
    options, args = random_call(seed)
    stock, ours = twins(torch.nn.LSTM, **options)
    got, want = ours(*args), stock(*args)
    assert type(got) is type(want) is tuple and type(got[1]) is type(want[1]) is tuple
    assert type(got[0]) is type(want[0])
    for a, b in zip(tensors_of(got), tensors_of(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    if isinstance(want[0], PackedSequence):
        for a, b in zip(got[0][1:], want[0][1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_list_as_state() -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    x, hx = torch.randn(5, 2, 4), [torch.randn(1, 2, 3), torch.randn(1, 2, 3)]
    assert torch.allclose(ours(x, hx)[0], stock(x, hx)[0], atol=1e-6)


def test_no_rows() -> None:
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}):
        stock, ours = twins(torch.nn.LSTM, 4, 3, **options)
        x = torch.empty(5, 0, 4)
        shapes = [tuple(t.shape) for t in tensors_of(stock(x))]
        assert [tuple(t.shape) for t in tensors_of(ours(x))] == shapes
        lengths = torch.empty(0, dtype=torch.int64)
        assert [tuple(t.shape) for t in tensors_of(ours(x, lengths=lengths))] == shapes


def test_outputs_are_not_aliases() -> None:
    """Writing into h_n must not change the output, nor the other way round."""
    ours = fuseblock.nn.LSTM(4, 3)
    with torch.no_grad():
        output, (h_n, c_n) = ours(torch.randn(5, 2, 4))
        before = output.clone()
        h_n.zero_(), c_n.zero_()
    assert torch.equal(output, before)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}])
def test_more_than_65535_steps(engine: str, options: dict) -> None:
    stock, ours = twins(torch.nn.LSTM, 1, 2, **options)
    x = torch.randn(70_000, 1, 1)
    x = x.transpose(0, 1) if ours.batch_first else x
    steps = 70_000 if engine != "reference" else 300
    x = x[:, :steps] if ours.batch_first else x[:steps]
    with torch.no_grad():
        got, want = tensors_of(ours(x)), tensors_of(stock(x))
        exact = tensors_of(stock.double()(x.double()))
    for a, b, e in zip(got, want, exact, strict=True):
        error, stock_error = (a - e).abs().max(), (b - e).abs().max()
        assert error <= 2 * stock_error + torch.finfo(torch.float32).eps


def test_more_than_65535_steps_backward() -> None:
    stock, ours = twins(torch.nn.LSTM, 1, 2)
    check_against_stock(stock, ours, (torch.randn(70_000, 1, 1),), draws=1)
