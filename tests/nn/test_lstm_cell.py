"""fuseblock.nn.LSTMCell gives what torch.nn.LSTMCell gives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

import fuseblock

from .parity import assert_equal_float64, check_against_stock, evaluate, tensors_of, twins, with_leaves

MODULE_INFO = next(info for info in module_db if info.module_cls is torch.nn.LSTMCell)


def module_inputs(dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    return list(MODULE_INFO.module_inputs_func(MODULE_INFO, "cpu", dtype, requires_grad=True, training=True))


@pytest.mark.parametrize("index", range(len(module_inputs(torch.float64))))
def test_pytorch_module_inputs(engine: str, index: int) -> None:
    sample = module_inputs(torch.float64)[index]
    options = sample.constructor_input
    stock, ours = twins(torch.nn.LSTMCell, *options.args, **options.kwargs, dtype=torch.float64)
    args = sample.forward_input.args
    assert_equal_float64(evaluate(ours, args), evaluate(stock, args), longest_sum=40)
    expected = sample.reference_fn(ours, *args)
    for got, want in zip(tensors_of(ours(*args)), tensors_of(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_gradcheck(engine: str, shape: tuple[int, ...], bias: bool) -> None:
    _, ours = twins(torch.nn.LSTMCell, 5, 4, bias=bias, dtype=torch.float64)
    states = torch.randn(2, *shape[:-1], 4, dtype=torch.float64).unbind()
    args = with_leaves((torch.randn(shape, dtype=torch.float64), *states))
    names = [name for name, _ in ours.named_parameters()]

    def call(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, dict(zip(names, tensors, strict=True)), (x, (h, c)))

    inputs = (*args, *(parameter.detach().requires_grad_() for parameter in ours.parameters()))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "inputs", "hidden"), [(1, 1, 1), (1, 32, 32), (7, 3, 33), (64, 20, 129)])
def test_parity(engine: str, batch: int, inputs: int, hidden: int, bias: bool, dtype: torch.dtype) -> None:
    stock, ours = twins(torch.nn.LSTMCell, inputs, hidden, bias=bias, dtype=dtype)
    x = torch.randn(batch, inputs, dtype=dtype)
    hx = torch.randn(batch, hidden, dtype=dtype), torch.randn(batch, hidden, dtype=dtype)
    check_against_stock(stock, ours, (x,), dtype)
    check_against_stock(stock, ours, (x, hx), dtype)
    check_against_stock(stock, ours, (x[0], (hx[0][0], hx[1][0])), dtype)


def test_layouts(engine: str) -> None:
    """Transposed, strided and expanded inputs."""
    stock, ours = twins(torch.nn.LSTMCell, 6, 5)
    base = torch.randn(6, 8)
    transposed, strided = base.t(), torch.randn(8, 12)[:, ::2]
    expanded = torch.randn(1, 6).expand(8, 6)
    hx = torch.randn(5, 8).t(), torch.randn(8, 10)[:, ::2]
    for x in (transposed, strided, expanded):
        for a, b in zip(ours(x, hx), stock(x, hx), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.also_on("cuda", "triton")
def test_loop_of_steps(engine: str) -> None:
    stock, ours = twins(torch.nn.LSTMCell, 3, 4)

    class Loop(torch.nn.Module):
        def __init__(self, cell: torch.nn.Module) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hx, outputs = None, []
            for step in x:
                hx = self.cell(step, hx)
                outputs.append(hx[0])
            return torch.stack(outputs)

    check_against_stock(Loop(stock), Loop(ours), (torch.randn(12, 2, 3),))


def test_no_rows_and_promotion() -> None:
    """Calls that only torch.nn runs keep torch.nn's results."""
    stock, ours = twins(torch.nn.LSTMCell, 4, 3)
    assert ours(torch.empty(0, 4))[0].shape == stock(torch.empty(0, 4))[0].shape
    x, hx = torch.randn(2, 4), (torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64))
    for a, b in zip(ours(x, hx), stock(x, hx), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with fuseblock.backend("reference"), pytest.raises(RuntimeError, match=r"LSTMCell: only torch\.nn"):
        ours(x, hx)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_dtypes(input_dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    stock, ours = twins(torch.nn.LSTMCell, 4, 3)
    x = torch.randn(2, 4).to(input_dtype)
    hx = (
        None
        if state_dtype is None
        else (torch.randn(2, 3).to(state_dtype), torch.randn(2, 3).to(state_dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x, hx), stock(x, hx)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-7)


def test_copies_and_state_dict() -> None:
    stock, ours = twins(torch.nn.LSTMCell, 4, 3)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fuseblock.nn.LSTMCell
        assert torch.equal(copied(x)[0], ours(x)[0])
    torch.manual_seed(3)
    a = torch.nn.LSTMCell(4, 3).state_dict()
    torch.manual_seed(3)
    b = fuseblock.nn.LSTMCell(4, 3).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_weight_norm_and_plain_attributes() -> None:
    x, hx = torch.randn(2, 4), (torch.randn(2, 3), torch.randn(2, 3))
    stock, ours = twins(torch.nn.LSTMCell, 4, 3)
    for cell in (stock, ours):
        torch.nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    check_against_stock(stock, ours, (x, hx))
    stock, ours = twins(torch.nn.LSTMCell, 4, 3)
    for cell in (stock, ours):
        raw = cell._parameters.pop("weight_hh")
        cell.weight_hh = raw.detach() * 0.5
    for a, b in zip(ours(x, hx), stock(x, hx), strict=True):
        torch.testing.assert_close(a, b)


def test_per_sample_gradients() -> None:
    ours = fuseblock.nn.LSTMCell(4, 3)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict, x: torch.Tensor) -> torch.Tensor:
        h, c = torch.func.functional_call(ours, parameters, (x,))
        return (h * c).sum()

    x = torch.randn(5, 4)
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for row, sample in enumerate(x):
        want = torch.func.grad(loss)(parameters, sample)
        for name in want:
            torch.testing.assert_close(got[name][row], want[name])
