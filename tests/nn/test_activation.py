"""ReLU and LeakyReLU: values and derivatives of every order, what they keep, and when they write over their input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fuseblock

KINDS = {"relu": (nn.ReLU, fuseblock.nn.ReLU), "leaky_relu": (nn.LeakyReLU, fuseblock.nn.LeakyReLU)}


def _pair(kind: str, overwrites: bool) -> tuple[nn.Module, nn.Module]:
    stock, ours = KINDS[kind]
    options = (0.2,) if kind == "leaky_relu" else ()
    act = ours(*options)
    act.overwrites = overwrites
    return stock(*options), act


def _derivatives(f: nn.Module, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Three orders of gradient of f(w x)^3 with respect to w and x, and f(w x)."""
    w = torch.tensor(1.5, dtype=x.dtype, requires_grad=True)
    x = x.detach().requires_grad_()
    y = f(w * x)
    found, last = [y.detach()], y**3
    for weight in weights:
        gradients = torch.autograd.grad((last * weight).sum(), (w, x), create_graph=True)
        found += [gradient.detach() for gradient in gradients]
        last = gradients[0] * gradients[1]
    return found


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 40_000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_is_pytorchs(kind: str, shape: tuple[int, ...], overwrites: bool) -> None:
    stock, ours = _pair(kind, overwrites)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    weights = [torch.randn_like(x) for _ in range(3)]
    for got, want in zip(_derivatives(ours, x, weights), _derivatives(stock, x, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_values(kind: str, overwrites: bool) -> None:
    stock, ours = _pair(kind, overwrites)
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45]])
    found = []
    for act in (ours, stock):
        z = x.clone().requires_grad_()
        y = act(z * 1)
        found.append((y.detach(), *torch.autograd.grad(y, z, torch.ones_like(y))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_undefined_gradients_stay_undefined(kind: str, overwrites: bool) -> None:
    stock, ours = _pair(kind, overwrites)
    found = []
    for act in (ours, stock):
        x, w = torch.randn(2, 50, 30, 20, requires_grad=True), torch.ones(20, requires_grad=True)
        (g,) = torch.autograd.grad((act(x * 2) * w).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.sum(), x, allow_unused=True)[0])
    assert found[0] is None
    assert found[1] is not None and not found[1].any()  # what is avoided


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_result_is_written_over_a_convolutions_output(kind: str, needs_grad: bool) -> None:
    stock, ours = _pair(kind, overwrites=True)
    conv = nn.Conv2d(3, 4, 3)
    kept: list[Tensor] = []
    with (
        torch.set_grad_enabled(needs_grad),
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t),
    ):
        z = conv(torch.randn(2, 3, 8, 8))
        want, kept[:] = stock(z), []
        y = ours(z)
    assert y.data_ptr() == z.data_ptr()
    torch.testing.assert_close(y, want)
    assert [t.data_ptr() for t in kept] == ([y.data_ptr()] if needs_grad else [])


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_inputs_of_others_are_left(kind: str) -> None:
    _, ours = _pair(kind, overwrites=True)
    batch = torch.randn(2, 3, 8, 8)
    before = batch.clone()
    ours(batch[0])
    assert batch.equal(before)
    apart = _pair(kind, overwrites=False)[1]
    apart(batch)
    assert batch.equal(before)


def test_negative_slopes_and_transforms() -> None:
    """The sign of the result does not tell that of the input; transforms see PyTorch's operations."""
    act = fuseblock.nn.LeakyReLU(-0.5)
    act.overwrites = True
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: act(x * 1), x)
    relu = fuseblock.nn.ReLU()
    x = x.detach()
    assert torch.func.grad(lambda x: relu(x).sum())(x).equal((x > 0).double())
    assert torch.vmap(relu)(x).equal(x.relu())


class Features(nn.Module):
    """Reads the first convolution's output twice, the second's once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv1(x)
        return self.act2(self.conv2(self.act1(features))) + self.pool(features)


def test_fuse_finds_who_alone_reads_a_convolutions_output() -> None:
    torch.manual_seed(0)
    shared = nn.ReLU()
    model = nn.Sequential(
        Features(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.LeakyReLU(),
        nn.Conv2d(4, 4, 1),
        shared,
        nn.AvgPool2d(2),
        shared,
        nn.Conv2d(4, 4, 1),
        nn.LeakyReLU(inplace=True),
    )
    before = copy.deepcopy(model)
    fuseblock.fuse(model, verbose=False)
    marked = {name for name, module in model.named_modules() if getattr(module, "overwrites", False)}
    assert marked == {"0.act2", "2", "8"}
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(model(x), before(x))
    fuseblock.unfuse(model, verbose=False)
    for module, stock in zip(model.modules(), before.modules(), strict=True):
        assert type(module) is type(stock) and module.__dict__.keys() == stock.__dict__.keys()


def test_hooks_on_a_convolution_see_its_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    fuseblock.fuse(model, verbose=False)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    torch.testing.assert_close(seen[0], nn.functional.conv2d(x, model[0].weight, model[0].bias))
