"""The convolution modules give what those of torch.nn give: PyTorch's own module inputs, and the rest of their faces."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

import fuseblock

from .parity import FUSED, assert_equal_float64, check_against_stock, evaluate, tensors_of, twins, with_leaves

STOCK = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d]
INFOS = {info.module_cls: info for info in module_db if info.module_cls in STOCK}


def module_inputs(stock_class: type, dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    info = INFOS[stock_class]
    return list(info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True))


MODULE_INPUTS = [
    pytest.param(stock, index, id=f"{stock.__name__}-{index}")
    for stock in STOCK
    for index in range(len(module_inputs(stock, torch.float64)))
]


@pytest.mark.parametrize(("stock_class", "index"), MODULE_INPUTS)
def test_pytorch_module_inputs(stock_class: type, index: int) -> None:
    sample = module_inputs(stock_class, torch.float64)[index]
    args, options = sample.constructor_input.args, sample.constructor_input.kwargs
    stock, ours = twins(stock_class, *args, **options, dtype=torch.float64)
    call = sample.forward_input.args
    assert_equal_float64(evaluate(ours, call), evaluate(stock, call), longest_sum=1)
    if sample.reference_fn is not None:
        expected = sample.reference_fn(ours, *call)
        for got, want in zip(tensors_of(ours(*call)), tensors_of(expected), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    sample = module_inputs(stock_class, torch.float32)[index]
    check_against_stock(*twins(stock_class, *args, **options), sample.forward_input.args)


@pytest.mark.parametrize(("stock_class", "index"), MODULE_INPUTS)
def test_pytorch_module_inputs_gradcheck(stock_class: type, index: int) -> None:
    sample = module_inputs(stock_class, torch.float64)[index]
    constructor = sample.constructor_input
    _, ours = twins(stock_class, *constructor.args, **constructor.kwargs, dtype=torch.float64)
    args = with_leaves(sample.forward_input.args)
    names = [name for name, _ in ours.named_parameters()]
    tensors = [p.detach().requires_grad_() for p in ours.parameters()]

    def call(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        # Not functional_call, under which the check would be of the same tensors, but slower.
        for name, tensor in zip(names, tensors, strict=True):
            ours._parameters[name] = tensor  # type: ignore[assignment]
        return ours(x)

    assert gradcheck(call, (*args, *tensors), fast_mode=True)
    assert gradgradcheck(call, (*args, *tensors), fast_mode=True)


SHAPES = {
    torch.nn.Conv1d: ((4, 6, 3), (2, 4, 9)),
    torch.nn.Conv2d: ((4, 6, 3), (2, 4, 7, 6)),
    torch.nn.ConvTranspose1d: ((4, 6, 3), (2, 4, 9)),
    torch.nn.ConvTranspose2d: ((4, 6, 3), (2, 4, 7, 6)),
}
COMMON: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "groups": 2, "bias": False},
    {"dilation": 2, "padding": 2},
]
OPTIONS = [(stock, options) for stock in STOCK for options in COMMON]
OPTIONS += [
    (stock, {"padding": padding, "padding_mode": mode})
    for stock in STOCK[:2]
    for padding in (2, "same", "valid")
    for mode in ("zeros", "reflect", "replicate", "circular")
]
OPTIONS += [
    (torch.nn.ConvTranspose1d, {"stride": 2, "output_padding": 1}),
    (torch.nn.ConvTranspose2d, {"stride": (2, 3), "output_padding": (1, 2), "groups": 2}),
]


@pytest.mark.parametrize(
    ("stock_class", "options"), OPTIONS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v)
)
def test_options(stock_class: type, options: dict[str, Any]) -> None:
    """Forward, gradients, and the gradient of a penalty on them; batched and not."""
    arguments, shape = SHAPES[stock_class]
    stock, ours = twins(stock_class, *arguments, **options, dtype=torch.float64)
    for size in (shape, shape[1:]):
        x = torch.randn(size, dtype=torch.float64)
        assert_equal_float64(evaluate(ours, (x,)), evaluate(stock, (x,)), longest_sum=1)
        found = []
        for module in (ours, stock):
            leaf = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(module(leaf).tanh().sum(), leaf, create_graph=True)
            gradients = torch.autograd.grad(slope.square().sum(), [leaf, *module.parameters()])
            found.append({str(k): g for k, g in enumerate(gradients)})
        assert_equal_float64(*found, longest_sum=ours.weight.numel() + x.numel())


def node_of_second_order(module: torch.nn.Module, x: torch.Tensor, *args: Any) -> str:
    (dw,) = torch.autograd.grad(module(x, *args).square().sum(), module.weight, create_graph=True)
    return dw.grad_fn.name()


@pytest.mark.parametrize("stock_class", STOCK)
@pytest.mark.parametrize("batched", [True, False])
def test_second_order_is_ours(stock_class: type, batched: bool) -> None:
    stock, ours = twins(stock_class, *SHAPES[stock_class][0])
    x = torch.randn(SHAPES[stock_class][1] if batched else SHAPES[stock_class][1][1:])
    assert node_of_second_order(ours, x) == "_GradientsBackward"
    assert node_of_second_order(stock, x) == "ConvolutionBackwardBackward0"


@pytest.mark.parametrize("size", [(16, 13), [2, 6, 16, 13], torch.Size((15, 14))])
def test_output_size(size: Any) -> None:
    stock, ours = twins(torch.nn.ConvTranspose2d, 4, 6, 3, stride=2)
    x = torch.randn(2, 4, 7, 6)
    assert torch.equal(ours(x, output_size=size), stock(x, output_size=size))
    assert ours(x, size).shape[2:] == tuple(size)[-2:]
    stock, ours = twins(torch.nn.ConvTranspose1d, 4, 6, 3, stride=2)
    assert torch.equal(ours(x[..., 0], output_size=[16]), stock(x[..., 0], output_size=[16]))


def test_channels_last() -> None:
    for stock_class in (torch.nn.Conv2d, torch.nn.ConvTranspose2d):
        _, ours = twins(stock_class, 4, 6, 3, groups=2)
        ours = ours.to(memory_format=torch.channels_last)
        x = torch.randn(2, 4, 7, 6).to(memory_format=torch.channels_last).requires_grad_()
        y = ours(x)
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert slope.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stock_class", STOCK)
def test_face(stock_class: type) -> None:
    """repr, state_dict, copies, initial values: as the stock module."""
    arguments, shape = SHAPES[stock_class]
    stock, ours = twins(stock_class, *arguments, padding=1)
    assert isinstance(ours, stock_class)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is FUSED[stock_class] and torch.equal(copied(x), stock(x))
    torch.manual_seed(3)
    a = stock_class(*arguments).state_dict()
    torch.manual_seed(3)
    b = FUSED[stock_class](*arguments).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stock_class", STOCK)
def test_autocast(stock_class: type) -> None:
    stock, ours = twins(stock_class, *SHAPES[stock_class][0])
    x = torch.randn(SHAPES[stock_class][1])
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x), stock(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_weight_wrappers() -> None:
    """Parametrized weights and torch.func.functional_call."""
    stock, ours = twins(torch.nn.Conv2d, 3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    weights = {"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}
    assert torch.equal(
        torch.func.functional_call(ours, weights, x), torch.func.functional_call(stock, weights, x)
    )
    for module in (stock, ours):
        torch.nn.utils.parametrizations.weight_norm(module)
    check_against_stock(stock, ours, (x,))


class Counted(torch.nn.Module):
    """A parametrization that counts how often it makes a weight."""

    made = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.made += 1
        return weight


@pytest.mark.parametrize("stock_class", STOCK)
def test_parametrized_weights_are_made_once_a_forward(stock_class: type) -> None:
    """Spectral norm, for one, iterates whenever its weight is read."""
    _, ours = twins(stock_class, 3, 4, 3)
    counted = Counted()
    torch.nn.utils.parametrize.register_parametrization(ours, "weight", counted)
    counted.made = 0
    ours(torch.randn(2, 3, 9, 9) if "2d" in stock_class.__name__ else torch.randn(2, 3, 9))
    assert counted.made == 1


def test_per_sample_gradients() -> None:
    _, ours = twins(torch.nn.Conv2d, 3, 4, 3)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, parameters, (x,)).square().sum()

    x = torch.randn(5, 3, 6, 6)
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for row, sample in enumerate(x):
        want = torch.func.grad(loss)(parameters, sample)
        for name in want:
            torch.testing.assert_close(got[name][row], want[name])


def test_compile_fullgraph() -> None:
    stock, ours = twins(torch.nn.Conv2d, 3, 4, 3, padding=1, padding_mode="reflect")
    up = twins(torch.nn.ConvTranspose2d, 4, 2, 4, 2, 1)
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(torch.nn.Sequential(ours, up[1]), fullgraph=True, backend="aot_eager")
    check_against_stock(torch.nn.Sequential(stock, up[0]), torch.nn.Sequential(ours, up[1]), (x,))
    found = []
    for model, parameters in (
        (compiled, ours.parameters()),
        (torch.nn.Sequential(stock, up[0]), stock.parameters()),
    ):
        y = model(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(parameters))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


BAD_CALLS = {
    "channels": ((4, 6, 3), {}, (2, 3, 7, 6)),
    "dimensions": ((4, 6, 3), {}, (4, 7)),
    "kernel": ((4, 6, 3), {}, (2, 4, 0, 0)),
}


@pytest.mark.parametrize("stock_class", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("what", BAD_CALLS)
def test_errors_in_calls(stock_class: type, what: str) -> None:
    arguments, options, shape = BAD_CALLS[what]
    stock, ours = twins(stock_class, *arguments, **options)
    errors = []
    for module in (stock, ours):
        with pytest.raises((RuntimeError, ValueError)) as error:
            module(torch.ones(shape))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("stock_class", STOCK)
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((4, 6, 3), {"groups": 4}),
        ((3, 6, 3), {"groups": 2}),
        ((4, 6, 3), {"groups": 0}),
        ((4, 6, 3), {"padding_mode": "no"}),
    ],
)
def test_errors_in_construction(stock_class: type, arguments: tuple, options: dict) -> None:
    errors = []
    for cls in (stock_class, FUSED[stock_class]):
        with pytest.raises(ValueError, match=r".") as error:
            cls(*arguments, **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_output_size_errors() -> None:
    _, ours = twins(torch.nn.ConvTranspose2d, 4, 6, 3, stride=2)
    with pytest.raises(ValueError, match="requested an output size"):
        ours(torch.ones(1, 4, 5, 5), output_size=(20, 20))


def test_dtype_mismatch() -> None:
    ours = fuseblock.nn.Conv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match="should be the same"):
        ours(torch.ones(1, 3, 4, 4, dtype=torch.float64))
