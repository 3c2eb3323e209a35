"""fuseblock.nn.spectral_norm: parameters, buffers and gradients of torch.nn.utils.parametrizations, a model at a time."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fuseblock
from fuseblock import _ext
from fuseblock.nn import remove_spectral_norm, spectral_norm

KINDS = ["cpu", "aten", "reference"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run on the compiled kernels, on PyTorch's operators and on the plain equations."""
    if request.param == "cpu" and _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    with fuseblock.backend("auto" if request.param == "cpu" else request.param):
        yield request.param


def critic() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1),
        torch.nn.LeakyReLU(0.1),
        torch.nn.ConvTranspose2d(4, 6, 4, 2, 1),
        torch.nn.BatchNorm2d(6, track_running_stats=False),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 64, 1, bias=False),
    )


LAYERS = (0, 2, 6)


def pair() -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """The same critic, normalised by PyTorch and by us, with the same buffers."""
    stock, mine = critic(), critic()
    for k in LAYERS:
        parametrizations.spectral_norm(stock[k])
    spectral_norm(mine).load_state_dict(stock.state_dict())
    return stock, mine


def state_of(model: torch.nn.Sequential) -> dict[str, Tensor]:
    """State in our names."""
    renamed = {}
    for key, value in model.state_dict().items():
        key = key.replace("parametrizations.weight.original", "weight_orig")
        renamed[key.replace("parametrizations.weight.0._", "weight_")] = value
    return renamed


def assert_same_state(mine: torch.nn.Sequential, stock: torch.nn.Sequential) -> None:
    got, want = mine.state_dict(), state_of(stock)
    assert got.keys() == want.keys()
    for key in got:
        torch.testing.assert_close(got[key], want[key], msg=key)


def gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
    return {
        name.replace("parametrizations.weight.original", "weight_orig"): p.grad
        for name, p in model.named_parameters()
    }


def assert_same_gradients(mine: torch.nn.Module, stock: torch.nn.Module) -> None:
    got, want = gradients(mine), gradients(stock)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name, rtol=1e-4, atol=1e-5)


def two_forwards(model: torch.nn.Module, x: Tensor) -> None:
    (model(x).mean() - model(x + 1).square().mean()).backward()


def r1(model: torch.nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    slope.square().sum().backward()


def training_steps(model: torch.nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def frozen(model: torch.nn.Module, x: Tensor) -> None:
    model.eval()
    model(x).sum().backward()


def partly_frozen(model: torch.nn.Module, x: Tensor) -> None:
    model[0].eval()
    model(x).sum().backward()


@pytest.mark.parametrize(
    "step", [two_forwards, r1, training_steps, frozen, partly_frozen], ids=lambda s: s.__name__
)
def test_as_parametrizations(kind: str, step: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    stock, mine = pair()
    assert_same_state(mine, stock)
    step(stock, x)
    step(mine, x)
    assert_same_gradients(mine, stock)
    assert_same_state(mine, stock)


def test_evaluation_leaves_the_buffers() -> None:
    _, mine = pair()
    before = copy.deepcopy(mine.state_dict())
    mine.eval()(torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())


def test_second_order_through_sigma(kind: str) -> None:
    """The gradient of a gradient with respect to the weights themselves."""
    found = []
    for model in pair():
        model.double()
        loss = model(torch.ones(2, 3, 8, 8, dtype=torch.float64).cumsum(-1)).square().sum()
        weights = [
            p
            for name, p in sorted(model.named_parameters())
            if name.split(".")[1] in ("parametrizations", "weight_orig")
        ]
        first = torch.autograd.grad(loss, weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_weights_are_normalised() -> None:
    _, mine = pair()
    seen = {}
    mine[6].register_forward_pre_hook(lambda layer, args: seen.update(weight=layer.weight))
    for _ in range(50):
        mine(torch.randn(2, 3, 8, 8))
    assert torch.linalg.matrix_norm(seen["weight"], 2).item() == pytest.approx(1, abs=1e-4)
    assert not hasattr(mine[6], "weight")


def test_one_iteration_a_forward() -> None:
    """A layer that is called twice in a forward meets one weight."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.layer(x)
                self.seen.append(self.layer.weight)
            return x

    model = spectral_norm(Twice())
    model(torch.ones(1, 4))
    assert model.seen[0] is model.seen[1]


def test_a_layer_on_its_own() -> None:
    """Outside of the model's forward a layer normalises itself, as under parametrizations."""
    x = torch.randn(2, 3, 8, 8)
    stock, mine = pair()
    for model in (stock, mine):
        model[2](model[0](x)).square().sum().backward()
    assert_same_gradients(mine, stock)
    assert_same_state(mine, stock)
    assert not hasattr(mine[0], "weight")
    single = spectral_norm(torch.nn.Linear(3, 2))
    before = single.weight_u.clone()
    single.weight_v.copy_(torch.tensor([0.6, -0.8, 0.0]))
    single(torch.ones(1, 3)).sum().backward()
    assert single.weight_orig.grad is not None and not torch.equal(before, single.weight_u)


class Checkpointed(torch.nn.Module):
    """A critic, of which a part is recomputed in the backward."""

    def __init__(self, inner: torch.nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.inner[:2], self.inner[2:]
        if self.use_reentrant is None:
            return rest(first(x))
        return rest(checkpoint(first, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_in_the_model(use_reentrant: bool) -> None:
    """The recomputed layer meets the weight of its forward, and the buffers move once."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    found = []
    for use in (use_reentrant, None):
        torch.manual_seed(0)
        model = spectral_norm(Checkpointed(critic(), use))
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
        found.append(model)
    assert_same_gradients(*found)
    assert all(torch.equal(a, b) for a, b in zip(found[0].buffers(), found[1].buffers(), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_of_the_model(use_reentrant: bool) -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    _, mine = pair()
    other = copy.deepcopy(mine)
    checkpoint(mine, x, use_reentrant=use_reentrant).square().sum().backward()
    other(x).square().sum().backward()
    assert_same_gradients(mine, other)
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), other.buffers(), strict=True))


def test_an_error_in_the_forward_leaves_no_weight() -> None:
    _, mine = pair()
    with pytest.raises(RuntimeError):
        mine(torch.ones(1, 5, 8, 8))
    assert not any(hasattr(mine[k], "weight") for k in LAYERS)


def test_copies() -> None:
    x = torch.randn(2, 3, 8, 8)
    _, mine = pair()
    mine(x).sum().backward()
    expected = None
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        copied.zero_grad()
        y = copied(x)
        expected = y if expected is None else expected
        assert torch.equal(y, expected)
        y.sum().backward()
        assert all(p.grad is not None for p in copied.parameters())
        assert copied[0].weight_u.data_ptr() != mine[0].weight_u.data_ptr()
        remove_spectral_norm(copied)
    assert torch.equal(mine(x), expected)


def test_state_dict_round_trips() -> None:
    x = torch.randn(2, 3, 8, 8)
    _, mine = pair()
    mine(x)
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    other = spectral_norm(critic())
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.eval()(x), mine.eval()(x))


def test_stock_checkpoints() -> None:
    """Those of parametrizations load here, those of torch.nn.utils.spectral_norm both ways."""
    x = torch.randn(2, 3, 8, 8)
    stock, mine = pair()
    stock(x)
    mine.load_state_dict(stock.state_dict())
    torch.testing.assert_close(mine.eval()(x), stock.eval()(x))

    old = critic()
    for k in LAYERS:
        torch.nn.utils.spectral_norm(old[k])
    mine.load_state_dict(old.state_dict())
    torch.testing.assert_close(mine(x), old.eval()(x))
    mine.train()(x)
    old.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine.eval()(x), old(x))


def test_parameters_keep_their_order() -> None:
    model = critic()
    names, parameters = zip(*model.named_parameters(), strict=True)
    spectral_norm(model)
    assert [name.removesuffix("_orig") for name, _ in model.named_parameters()] == list(names)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_removal() -> None:
    x = torch.randn(2, 3, 8, 8)
    _, mine = pair()
    parameters = list(mine.parameters())
    y = mine.eval()(x)
    assert remove_spectral_norm(mine) is mine
    torch.testing.assert_close(mine(x), y)
    assert mine.state_dict().keys() == critic().state_dict().keys()
    assert all(a is b for a, b in zip(mine.parameters(), parameters, strict=True))
    assert not any(
        m._forward_pre_hooks or m._forward_hooks or m._load_state_dict_pre_hooks for m in mine.modules()
    )
    with pytest.raises(ValueError, match="not applied"):
        remove_spectral_norm(mine)
    assert spectral_norm(mine)(x).shape == y.shape


def test_options() -> None:
    model = spectral_norm(critic(), n_power_iterations=3, types=(torch.nn.Conv2d,))
    assert hasattr(model[0], "weight_orig") and hasattr(model[2], "weight")
    stock = critic()
    a = spectral_norm(torch.nn.Linear(4, 6), dim=1)
    b = parametrizations.spectral_norm(torch.nn.Linear(4, 6), dim=1)
    a.load_state_dict(b.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(a(x), b(x))
    assert a.weight_u.shape == (4,)
    spectral_norm(stock, types=(torch.nn.Linear,))
    spectral_norm(stock, types=(torch.nn.Conv2d,))
    stock(torch.randn(2, 3, 8, 8))
    remove_spectral_norm(stock)
    assert stock[0].weight.requires_grad and stock[6].weight.requires_grad


def test_autocast() -> None:
    stock, mine = pair()
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = mine(x)
    assert got.dtype == torch.bfloat16
    assert mine[0].weight_u.dtype == torch.float32
    torch.testing.assert_close(got.float(), stock(x), rtol=0.1, atol=0.1)
    assert_same_state(mine, stock)  # the power method itself is not run in 16 bits


def test_transforms() -> None:
    _, mine = pair()
    mine.eval()
    parameters = {name: p.detach() for name, p in mine.named_parameters()}
    x = torch.randn(2, 3, 8, 8)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(mine, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    loss_of = mine(x).square().sum()
    for (name, want), value in zip(
        zip(parameters, torch.autograd.grad(loss_of, list(mine.parameters())), strict=True),
        got.values(),
        strict=True,
    ):
        torch.testing.assert_close(value, want, msg=name)
    assert torch.func.jvp(loss, (parameters,), (parameters,))[1].isfinite()


CALLS = {
    "model": lambda model, x: model(x),
    "two forwards": lambda model, x: model(x) - model(2 * x).square(),
    "layers": lambda model, x: model[2](model[0](x)),
}


def assert_compiles(mine: torch.nn.Module, call: Any, x: Tensor, backend: str) -> None:
    """As one graph, step by step like the model itself."""
    torch._dynamo.reset()
    other = copy.deepcopy(mine)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for _ in range(2):
        for model in (mine, other):
            y = (compiled if model is mine else call)(model, x)
            model.zero_grad()
            y.square().sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.add_(p.grad.sign(), alpha=-0.1)
            if model is mine:
                got = y
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(dict(mine.named_buffers()), dict(other.named_buffers()))
        assert_same_gradients(mine, other)
    assert not any("weight" in m.__dict__ for m in mine.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_compile(call: str, training: bool) -> None:
    mine = pair()[1].double().train(training)
    assert_compiles(mine, CALLS[call], torch.randn(2, 3, 8, 8, dtype=torch.float64), "aot_eager")


@pytest.mark.slow
def test_inductor() -> None:
    """Its backward meets the u and v that the forward divided by, also where a power iteration is cheap."""
    torch.manual_seed(0)
    mine = spectral_norm(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Tanh())).double()
    assert_compiles(mine, CALLS["model"], torch.randn(2, 3, 4, 4, dtype=torch.float64), "inductor")


def test_errors() -> None:
    with pytest.raises(ValueError, match="no layer"):
        spectral_norm(torch.nn.ReLU())
    with pytest.raises(ValueError, match="n_power_iterations"):
        spectral_norm(critic(), n_power_iterations=0)
    with pytest.raises(ValueError, match="already"):
        spectral_norm(spectral_norm(critic()))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(parametrizations.spectral_norm(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="initialised"):
        spectral_norm(torch.nn.Sequential(torch.nn.LazyConv2d(3, 3)))
    with pytest.raises(ValueError, match="two or more dimensions"):
        spectral_norm(torch.nn.Linear(2, 2), name="bias")
    with pytest.raises(ValueError, match="dim"):
        spectral_norm(torch.nn.Linear(2, 2), dim=2)
    partly = torch.nn.Sequential(torch.nn.Linear(2, 2), spectral_norm(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="already"):
        spectral_norm(partly)
    assert isinstance(partly[0].weight, torch.nn.Parameter), "nothing is changed before an error"
