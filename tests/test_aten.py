"""The engine aten: PyTorch's own layer, with a second derivative by recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fuseblock

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
    {"proj_size": 2, "num_layers": 2},
]


def pair(**options) -> tuple[torch.nn.LSTM, fuseblock.nn.LSTM]:
    torch.manual_seed(0)
    stock = torch.nn.LSTM(3, 4, dtype=torch.float64, **options)
    ours = fuseblock.nn.LSTM(3, 4, dtype=torch.float64, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def penalty_grads(module: torch.nn.LSTM, x: Tensor) -> list[Tensor]:
    """Gradients of a gradient penalty with respect to the parameters."""
    x = x.clone().requires_grad_()
    y, (h_n, c_n) = module(x)
    (g,) = torch.autograd.grad(y.sin().sum() + h_n.sum() + c_n.pow(2).sum(), x, create_graph=True)
    return list(
        torch.autograd.grad(g.norm(dim=-1).sub(1).pow(2).sum(), list(module.parameters()), allow_unused=True)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_stocks(options) -> None:
    stock, ours = pair(**options)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    want = stock(x)[0]
    with fuseblock.backend("aten"):
        got = ours(x)[0]
    assert torch.equal(got, want)
    got_grads = torch.autograd.grad(got.sin().sum(), list(ours.parameters()))
    want_grads = torch.autograd.grad(want.sin().sum(), list(stock.parameters()))
    for a, b in zip(got_grads, want_grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_double_backward_is_that_of_the_equations(options) -> None:
    _, ours = pair(**options)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with fuseblock.backend("aten"):
        got = penalty_grads(ours, x)
    with fuseblock.backend("reference"):
        want = penalty_grads(ours, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_backward_twice_needs_retain_graph() -> None:
    _, ours = pair()
    with fuseblock.backend("aten"):
        loss = ours(torch.randn(5, 2, 3, dtype=torch.float64))[0].sum()
    loss.backward(retain_graph=True)
    first = ours.weight_hh_l0.grad.clone()
    loss.backward()
    torch.testing.assert_close(ours.weight_hh_l0.grad, 2 * first, **CLOSE)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_dropout_masks_are_stocks_and_survive_recomputation() -> None:
    stock, ours = pair(num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.manual_seed(1)
    want = stock(x)[0]
    with fuseblock.backend("aten"):
        torch.manual_seed(1)
        got = ours(x)[0]
        assert torch.equal(got, want)
        torch.manual_seed(1)
        penalty = penalty_grads(ours, x)
    with fuseblock.backend("reference"):
        torch.manual_seed(1)
        expected = penalty_grads(ours, x)
    for a, b in zip(penalty, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_gradients_nobody_asked_for() -> None:
    _, ours = pair()
    frozen = copy.deepcopy(ours).requires_grad_(False)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with fuseblock.backend("aten"):
        frozen(x)[0].sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in frozen.parameters())
    with fuseblock.backend("aten"), torch.no_grad():
        assert not ours(x)[0].requires_grad


def test_one_state_only() -> None:
    _, ours = pair()
    weights = ours._live_weights()
    x, h0 = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    got = []
    for name in ("aten", "reference"):
        with fuseblock.backend(name):
            got.append(fuseblock.functional.lstm(x, h0, None, weights))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_forward_mode_is_not_for_pytorchs_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference at sizes where PyTorch's layer is preferred still has tangents."""
    monkeypatch.setattr("fuseblock._engine._MAPPED_BYTES", 0)
    monkeypatch.setattr("fuseblock._engine.fused_layers", lambda *args: [False])
    stock, ours = pair()
    ours.requires_grad_(False)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64).unbind()
    with forward_ad.dual_level():
        y, _ = ours(forward_ad.make_dual(x, tangent))
        got = forward_ad.unpack_dual(y).tangent
    step = 1e-6
    want = (stock(x + step * tangent)[0] - stock(x - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
