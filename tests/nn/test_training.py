"""Training behaviour of fuseblock.nn.LSTM: seeds, dropout, modes, dtypes, layouts, autocast, gradients of any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fuseblock

from .parity import check_against_stock, packed, tensors_of, twins


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"proj_size": 2}]
)
def test_same_seed_same_initial_values(options: dict) -> None:
    torch.manual_seed(7)
    stock = torch.nn.LSTM(4, 3, **options).state_dict()
    torch.manual_seed(7)
    ours = fuseblock.nn.LSTM(4, 3, **options).state_dict()
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[key], ours[key]) for key in stock)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}, {"proj_size": 3}])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed"])
def test_same_seed_same_dropout(engine: str, form: str, options: dict) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 8, num_layers=3, dropout=0.5, **options)
    x = torch.randn(6, 5, 4)
    call = {"batched": x, "unbatched": x[0], "packed": packed(x, [6, 2, 5, 1, 3])}[form]
    torch.manual_seed(1)
    want = tensors_of(stock(call))
    torch.manual_seed(1)
    got = tensors_of(ours(call))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(got[0], tensors_of(ours(call))[0])
    stock.eval(), ours.eval()
    torch.testing.assert_close(tensors_of(ours(call))[0], tensors_of(stock(call))[0])


def test_dropout_one_and_lengths(engine: str) -> None:
    """With dropout 1 the second layer sees zeros, whatever the input."""
    ours = fuseblock.nn.LSTM(4, 3, 2, dropout=1.0)
    lengths = torch.tensor([5, 2])
    a, b = ours(torch.randn(5, 2, 4), lengths=lengths)[0], ours(torch.randn(5, 2, 4), lengths=lengths)[0]
    assert torch.equal(a, b)


@pytest.mark.also_on("aten", "cuda")
def test_backward_in_eval_mode(engine: str) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3, num_layers=2, bidirectional=True)
    check_against_stock(stock.eval(), ours.eval(), (torch.randn(5, 2, 4),))


@pytest.mark.also_on("aten", "cuda")
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2, "bias": False}]
)
def test_gradient_penalty(engine: str, options: dict) -> None:
    check_gradient_penalty(6, options)


@pytest.mark.also_on("triton")
def test_gradient_penalty_of_two_steps(engine: str) -> None:
    check_gradient_penalty(2, {"bidirectional": True})


def check_gradient_penalty(n_steps: int, options: dict) -> None:
    """Second derivatives with respect to everything, of a penalty on the input's gradient."""
    stock, ours = twins(torch.nn.LSTM, 3, 4, dtype=torch.float64, **options)
    x = torch.randn(n_steps, 2, 3, dtype=torch.float64)

    def penalty(module: torch.nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y, (h_n, c_n) = module(leaf)
        (grad,) = torch.autograd.grad(y.square().sum() + c_n.sum() + h_n.exp().sum(), leaf, create_graph=True)
        loss = (grad.flatten(1).norm(dim=1) - 1).square().sum() + y.sum()
        return list(torch.autograd.grad(loss, [leaf, *module.parameters()]))

    for a, b in zip(penalty(ours), penalty(stock), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_third_order_raises_or_is_right() -> None:
    """Beyond the second order the reference backend is the answer."""
    stock, ours = twins(torch.nn.LSTM, 2, 2, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64)

    def third(module: torch.nn.Module) -> Tensor:
        value = leaf = x.clone().requires_grad_()
        value = module(leaf)[0].sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = grad.square().sum()
        return value

    with fuseblock.backend("reference"):
        torch.testing.assert_close(third(ours), third(stock), rtol=1e-9, atol=1e-12)


@pytest.mark.also_on("aten", "cuda")
@pytest.mark.parametrize("frozen", ["all weights", "input weights", "input", "biases"])
def test_partly_frozen(engine: str, frozen: str) -> None:
    """Gradients only of what requires them."""
    stock, ours = twins(torch.nn.LSTM, 4, 3, num_layers=2)
    x = torch.randn(5, 2, 4, requires_grad=frozen != "input")
    for module in (stock, ours):
        for name, parameter in module.named_parameters():
            off = {"all weights": True, "input weights": "weight_ih" in name, "biases": "bias" in name}
            parameter.requires_grad_(not off.get(frozen, False))
    grads = []
    for module in (stock, ours):
        leaf = x.detach().clone().requires_grad_(x.requires_grad)
        module(leaf)[0].square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.also_on("aten", "cuda")
def test_backward_through_one_output_only(engine: str) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    for index in range(3):
        grads = []
        for module in (stock, ours):
            module.zero_grad()
            tensors_of(module(x))[index].sum().backward()
            grads.append([p.grad for p in module.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.also_on("aten", "cuda", "triton")
def test_backward_twice_and_accumulation(engine: str) -> None:
    ours = fuseblock.nn.LSTM(4, 3)
    loss = ours(torch.randn(5, 2, 4))[0].sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    for parameter, once in zip(ours.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)


@pytest.mark.also_on("aten", "cuda", "triton")
def test_no_grad_and_inference_mode(engine: str) -> None:
    ours = fuseblock.nn.LSTM(4, 3)
    x = torch.randn(5, 2, 4)
    want = ours(x)[0].detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = ours(x)[0]
        assert not y.requires_grad
        torch.testing.assert_close(y.clone(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 4}])
def test_sixteen_bit(engine: str, dtype: torch.dtype, options: dict) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 8, dtype=dtype, **options)
    x = torch.randn(9, 3, 4, dtype=dtype)
    for a, b in zip(tensors_of(ours(x)), tensors_of(stock(x)), strict=True):
        assert a.dtype == b.dtype == dtype
    check_against_stock(stock, ours, (x,), dtype)


@pytest.mark.also_on("aten", "cuda")
def test_layouts(engine: str) -> None:
    """Inputs and states that are transposed, strided, expanded or offset."""
    stock, ours = twins(torch.nn.LSTM, 6, 5)
    inputs = {
        "transposed": torch.randn(3, 7, 6).transpose(0, 1),
        "features first": torch.randn(6, 7, 3).permute(1, 2, 0),
        "strided features": torch.randn(7, 3, 12)[..., ::2],
        "strided steps": torch.randn(14, 3, 6)[::2],
        "expanded": torch.randn(7, 1, 6).expand(7, 3, 6),
        "offset": torch.randn(9, 4, 6)[2:, 1:],
    }
    states = torch.randn(3, 1, 5).transpose(0, 1), torch.randn(1, 3, 10)[..., ::2]
    for x in inputs.values():
        for hx in (None, states):
            got, want = tensors_of(ours(x, hx)), tensors_of(stock(x, hx))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["batched", "packed"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(engine: str, input_dtype: torch.dtype, state_dtype: torch.dtype | None, form: str) -> None:
    """Under autocast the results have stock's dtypes and 16-bit accuracy."""
    stock, ours = twins(torch.nn.LSTM, 4, 3, num_layers=2)
    x = torch.randn(5, 2, 4).to(input_dtype)
    x = packed(x, [5, 3]) if form == "packed" else x
    hx = None
    if state_dtype is not None:
        hx = torch.randn(2, 2, 3).to(state_dtype), torch.randn(2, 2, 3).to(state_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = tensors_of(ours(x, hx)), tensors_of(stock(x, hx))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=2**-6)


def test_complex_weights() -> None:
    """torch.nn alone runs them: its results, unless a backend is forced."""
    stock, ours = twins(torch.nn.LSTM, 4, 3, dtype=torch.complex64)
    x = torch.randn(5, 2, 4, dtype=torch.complex64)
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    sequence = packed(x, [5, 2])
    torch.testing.assert_close(ours(sequence)[0].data, stock(sequence)[0].data)
    with fuseblock.backend("reference"):
        for call in (x, sequence):
            with pytest.raises(fuseblock.BackendError, match=r"LSTM: only torch\.nn runs"):
                ours(call)


def test_autocast_backward() -> None:
    """Gradients arrive in the parameters' dtype."""
    ours = fuseblock.nn.LSTM(4, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(torch.randn(5, 2, 4))[0].float().sum()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("where", ["input", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_travel_as_in_stock(engine: str, where: str, value: float) -> None:
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    x = torch.randn(5, 2, 4)
    if where == "input":
        x[2, 1, 0] = value
    else:
        with torch.no_grad():
            for module in (stock, ours):
                getattr(module, where).view(-1)[1] = value
    for a, b in zip(tensors_of(ours(x)), tensors_of(stock(x)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num())
