"""ReLU and LeakyReLU: values and derivatives of every order, what they keep, and when they write over their input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fuseblock
from fuseblock.nn.activation import activate_over

KINDS = {"relu": (nn.ReLU, fuseblock.nn.ReLU), "leaky_relu": (nn.LeakyReLU, fuseblock.nn.LeakyReLU)}


def _pair(kind: str, over: bool, *, inplace: bool = False) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The stock module, and ours as a module by itself or behind a convolution."""
    stock, ours = KINDS[kind]
    options = (0.2, inplace) if kind == "leaky_relu" else (inplace,)
    act = ours(*options)
    return stock(*options), (lambda x: activate_over(act, x)) if over else act


def _derivatives(f: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
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


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 40_000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_is_pytorchs(kind: str, shape: tuple[int, ...], over: bool) -> None:
    stock, ours = _pair(kind, over)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    weights = [torch.randn_like(x) for _ in range(3)]
    for got, want in zip(_derivatives(ours, x, weights), _derivatives(stock, x, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_values(kind: str, over: bool) -> None:
    stock, ours = _pair(kind, over)
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45]])
    found = []
    for act in (ours, stock):
        z = x.clone().requires_grad_()
        y = act(z * 1)
        found.append((y.detach(), *torch.autograd.grad(y, z, torch.ones_like(y))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_undefined_gradients_stay_undefined(kind: str, over: bool) -> None:
    stock, ours = _pair(kind, over)
    found = []
    for act in (ours, stock):
        x, w = torch.randn(2, 50, 30, 20, requires_grad=True), torch.ones(20, requires_grad=True)
        (g,) = torch.autograd.grad((act(x * 2) * w).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.sum(), x, allow_unused=True)[0])
    assert found[0] is None
    assert found[1] is not None and not found[1].any()  # what is avoided


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_output_is_overwritten(
    kind: str, needs_grad: bool, layout: torch.memory_format
) -> None:
    stock, ours = _pair(kind, over=True)
    conv = nn.Conv2d(3, 40, 3).to(memory_format=layout)
    kept: list[Tensor] = []
    with (
        torch.set_grad_enabled(needs_grad),
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t),
    ):
        z = conv(torch.randn(2, 3, 24, 24).to(memory_format=layout))
        want, kept[:] = stock(z), []
        y = ours(z)
    assert y.data_ptr() == z.data_ptr()
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, want)
    bits = (y.numel() + 7) // 8
    size = {"relu": y.numel() * 4, "leaky_relu": bits}[kind]
    assert sum(t.numel() * t.itemsize for t in kept) == (size if needs_grad else 0)


@pytest.mark.parametrize("size", [20, 40_000])
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_later_changes_in_place_are_the_errors_that_they_are_in_pytorch(
    kind: str, inplace: bool, over: bool, size: int
) -> None:
    for act in _pair(kind, over, inplace=inplace):
        x = torch.randn(2, size, requires_grad=True)
        y = act(x * 2)
        y += 1
        if kind == "relu" or inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y.sum(), x)
        else:
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.where(x > 0, 2.0, 0.4))


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_not_overwritten(kind: str) -> None:
    _, ours = _pair(kind, over=True)
    batch = torch.randn(2, 3, 8, 8)
    before = batch.clone()
    ours(batch[0])
    assert batch.equal(before)


def test_negative_slopes_transforms_and_forced_backends() -> None:
    """The sign of the result does not tell that of the input; transforms see PyTorch's operations."""
    act = fuseblock.nn.LeakyReLU(-0.5)
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activate_over(act, x * 1), x)
    relu = fuseblock.nn.ReLU()
    x = x.detach()
    assert torch.func.grad(lambda x: relu(x).sum())(x).equal((x > 0).double())
    assert torch.vmap(relu)(x).equal(x.relu())
    image = torch.randn(2, 40, 24, 24, requires_grad=True)
    with fuseblock.backend("reference"):
        y = activate_over(fuseblock.nn.LeakyReLU(0.2), image * 1)
        assert y.grad_fn.name() != "_LeakyReLUOverBackward"
    torch.testing.assert_close(y, nn.functional.leaky_relu(image, 0.2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [20, 40_000])
def test_forward_mode_over_a_recorded_graph_is_right_or_refused(kind: str, size: int) -> None:
    found = []
    for act in _pair(kind, over=True):
        x = torch.linspace(-1, 2, 2 * size, dtype=torch.float64).view(2, size).requires_grad_()
        y = act(x * 2)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 0.5))
            try:
                (g,) = torch.autograd.grad(y, x, dual)
            except NotImplementedError as refusal:
                found.append(refusal)
                continue
            found.append(forward_ad.unpack_dual(g).tangent)
    want, got = found
    if isinstance(got, NotImplementedError):
        assert (kind, size) == ("leaky_relu", 40_000)  # kept as bits: the operator says what to use
    else:
        torch.testing.assert_close(got, want)
