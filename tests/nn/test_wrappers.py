"""Weights that are not plain parameters, copies, state dicts and `torch.func`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import fuseblock

from .parity import tensors_of, twins


def gradients(module: torch.nn.Module, x: Tensor, root: torch.nn.Module) -> list[Tensor]:
    parameters = [p for _, p in sorted(root.named_parameters())]
    loss = sum(out.square().sum() for out in tensors_of(module(x)))
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "weight_hh_l1_reverse"])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm"],
)
def test_normalised_weights(engine: str, wrap: Callable, name: str) -> None:
    """Same outputs, same gradients of g and v, also after an optimizer step, a cast and a switch to eval."""
    stock, ours = twins(torch.nn.LSTM, 4, 3, num_layers=2, bidirectional=True)
    for module in (stock, ours):
        torch.manual_seed(0)
        wrap(module, name)
        # In training each read of a parametrized spectral norm is a power iteration, and stock reads several times.
        module.train(wrap is not parametrizations.spectral_norm)
    x = torch.randn(5, 2, 4)
    for _ in range(2):
        for a, b in zip(gradients(ours, x, ours), gradients(stock, x, stock), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for (_, p), (_, q) in zip(
                sorted(stock.named_parameters()), sorted(ours.named_parameters()), strict=True
            ):
                p.mul_(0.9), q.mul_(0.9)
    stock.eval().double(), ours.eval().double()
    torch.testing.assert_close(ours(x.double())[0], stock(x.double())[0])


class WeightDrop(torch.nn.Module):
    """DropConnect on recurrent weights as AWD-LSTM does it, with its way of muting flatten_parameters."""

    def __init__(self, module: torch.nn.LSTM, name: str, p: float) -> None:
        super().__init__()
        self.module, self.name, self.p = module, name, p
        module.flatten_parameters = lambda *args, **kwargs: None
        raw = module._parameters.pop(name)
        module.register_parameter(name + "_raw", torch.nn.Parameter(raw.data))

    def forward(self, x: Tensor) -> tuple:
        raw = getattr(self.module, self.name + "_raw")
        setattr(self.module, self.name, F.dropout(raw, self.p, self.training) * 1.0)
        return self.module(x)


class FastaiWeightDrop(WeightDrop):
    """The variant that writes the dropped tensor into the dictionary of parameters."""

    def forward(self, x: Tensor) -> tuple:
        raw = getattr(self.module, self.name + "_raw")
        self.module._parameters[self.name] = F.dropout(raw, self.p, self.training) * 1.0
        return self.module(x)


@pytest.mark.also_on("aten", "cuda")
@pytest.mark.parametrize("wrapper", [WeightDrop, FastaiWeightDrop])
def test_weight_drop(engine: str, wrapper: type) -> None:
    """Each call uses the mask just drawn; the raw weight gets the gradient."""
    ours = fuseblock.nn.LSTM(4, 6)
    plain = torch.nn.LSTM(4, 6)
    plain.load_state_dict(ours.state_dict())
    dropped = wrapper(ours, "weight_hh_l0", 0.5)
    x = torch.randn(5, 2, 4)
    for seed in (1, 2):
        torch.manual_seed(seed)
        y, _ = dropped(x)
        torch.manual_seed(seed)
        weights = dict(plain.named_parameters()) | {"weight_hh_l0": F.dropout(plain.weight_hh_l0, 0.5, True)}
        want, _ = torch.func.functional_call(plain, weights, (x,))
        torch.testing.assert_close(y, want)
        (grad,) = torch.autograd.grad(y.sum(), ours.weight_hh_l0_raw)
        (expected,) = torch.autograd.grad(want.sum(), plain.weight_hh_l0)
        torch.testing.assert_close(grad, expected)
    dropped.eval()
    torch.testing.assert_close(dropped(x)[0], plain(x)[0])


def test_replaced_parameter_is_used() -> None:
    """Assigning, loading with assign=True, or .data: the next call sees it."""
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    x = torch.randn(5, 2, 4)
    ours(x)
    fresh = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    for module in (stock, ours):
        module.load_state_dict(fresh, assign=True)
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    for module in (stock, ours):
        module.weight_hh_l0 = torch.nn.Parameter(fresh["weight_hh_l0"] * 2)
        module.bias_ih_l0.data = fresh["bias_ih_l0"] * 3
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"proj_size": 2, "bidirectional": True, "num_layers": 2}]
)
def test_state_dict_both_ways(options: dict) -> None:
    stock, ours = torch.nn.LSTM(4, 3, **options), fuseblock.nn.LSTM(4, 3, **options)
    x = torch.randn(5, 2, 4)
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    ours.reset_parameters()
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in ours.named_parameters()]


def test_looks_like_stock() -> None:
    options = {
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
        "dropout": 0.1,
        "bidirectional": True,
        "proj_size": 2,
    }
    stock, ours = twins(torch.nn.LSTM, 4, 3, **options)
    assert isinstance(ours, torch.nn.LSTM) and repr(ours) == repr(stock)
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [
        [w.shape for w in ws] for ws in stock.all_weights
    ]
    assert [w is v for w, v in zip(ours._flat_weights, ours.parameters(), strict=True)] == [True] * 12
    ours.flatten_parameters()


def test_copies() -> None:
    ours = fuseblock.nn.LSTM(4, 3, 2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for copied in copies:
        assert type(copied) is fuseblock.nn.LSTM
        assert torch.equal(copied(x)[0], ours(x)[0])
        with torch.no_grad():
            copied.weight_hh_l0.zero_()
        assert not torch.equal(copied(x)[0], ours(x)[0])
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half(x.bfloat16())[0].dtype == torch.bfloat16


def test_state_of_a_pickled_stock_module() -> None:
    """What torch.nn.LSTM pickles, also what versions before proj_size did, revives as ours."""
    stock = torch.nn.LSTM(4, 3, 2)
    state = stock.__getstate__()
    old = {
        key: value
        for key, value in state.items()
        if key not in ("proj_size", "_flat_weights", "_flat_weights_names")
    }
    old["_all_weights"] = [list(weights) for weights in stock.all_weights]
    x = torch.randn(5, 2, 4)
    for saved in (state, old):
        revived = fuseblock.nn.LSTM.__new__(fuseblock.nn.LSTM)
        revived.__setstate__(copy.deepcopy(saved))
        torch.testing.assert_close(revived(x)[0], stock(x)[0])


def test_deepcopy_of_parametrized() -> None:
    ours = parametrizations.weight_norm(fuseblock.nn.LSTM(4, 3), "weight_hh_l0")
    copied = copy.deepcopy(ours)
    x = torch.randn(5, 2, 4)
    want = ours(x)[0]
    torch.testing.assert_close(copied(x)[0], want)
    parametrize.remove_parametrizations(copied, "weight_hh_l0")
    assert type(copied) is fuseblock.nn.LSTM
    torch.testing.assert_close(copied(x)[0], want)


def test_functional_call_uses_the_given_weights() -> None:
    """Other values, other dtypes, and the module's own weights untouched."""
    stock, ours = twins(torch.nn.LSTM, 4, 3)
    x = torch.randn(5, 2, 4)
    weights = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in ours.named_parameters()}
    got = torch.func.functional_call(ours, weights, (x.double(),))[0]
    stock.double().load_state_dict(weights)
    torch.testing.assert_close(got, stock(x.double())[0])
    assert ours(x)[0].dtype == torch.float32


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}])
def test_per_sample_gradients(engine: str, options: dict, ragged: bool) -> None:
    """vmap(grad) equals one backward per sample."""
    ours = fuseblock.nn.LSTM(3, 4, **options, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict, x: Tensor, length: Tensor) -> Tensor:
        lengths = {"lengths": length.unsqueeze(0)} if ragged else {}
        y, (h_n, c_n) = torch.func.functional_call(ours, parameters, (x.unsqueeze(1),), lengths)
        return y.square().sum() + (h_n * 2).sum() + c_n.exp().sum()

    x, lengths = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([6, 1, 0, 4])
    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, lengths)
    for row in range(4):
        want = torch.func.grad(loss)(parameters, x[row], lengths[row])
        for name in want:
            torch.testing.assert_close(got[name][row], want[name])


def test_ensemble_by_vmap() -> None:
    """vmap over stacked weights, the recipe for model ensembles."""
    modules = [fuseblock.nn.LSTM(3, 4) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(5, 2, 3)

    def call(parameters: dict, buffers: dict) -> Tensor:
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))[0]

    got = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([module(x)[0] for module in modules]))


def test_hessian_vector_product() -> None:
    stock, ours = twins(torch.nn.LSTM, 2, 3, dtype=torch.float64)
    x, v = torch.randn(2, 4, 1, 2, dtype=torch.float64).unbind()
    results = []
    for module in (stock, ours):
        grad = torch.func.grad(lambda value, module=module: module(value)[0].square().sum())
        _, vjp = torch.func.vjp(grad, x)
        results.append(vjp(v)[0])
    torch.testing.assert_close(*results)
