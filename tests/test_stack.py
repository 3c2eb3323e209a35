"""The stack as one autograd node: frozen parts, autocast around backward, gradients that users change in place."""

from __future__ import annotations

import copy

import pytest
import torch

import fuseblock

# Layers that the fused op does not take (projection, few rows, large), and one that it does.
KINDS = {
    "projection": ({"proj_size": 2}, (7, 3)),
    "few rows": ({}, (2, 2)),
    "fused": ({}, (7, 3)),
}


def pair(kind: str, **options) -> tuple[torch.nn.LSTM, fuseblock.nn.LSTM, torch.Tensor]:
    extra, rows = KINDS[kind]
    torch.manual_seed(0)
    stock = torch.nn.LSTM(4, 5, dtype=torch.float64, bidirectional=True, **extra, **options)
    ours = fuseblock.nn.LSTM(4, 5, dtype=torch.float64, bidirectional=True, **extra, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours, torch.randn(*rows, 4, dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("trained", ["reverse", "weight_hh", "bias_ih", "l1"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_part_is_trained(kind: str, trained: str, order: int) -> None:
    stock, ours, x = pair(kind, num_layers=2)
    grads = []
    for module in (stock, ours):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained in name)
        leaf = x.clone().requires_grad_()
        loss = module(leaf)[0].sin().sum()
        if order == 2:
            (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
            loss = g.pow(2).sum()
        loss.backward()
        grads.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert all(g is not None for g in grads[1].values())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_inside_autocast(kind: str) -> None:
    _, ours, x = pair(kind, num_layers=2)
    ours, x = ours.float(), x.float()
    twin = copy.deepcopy(ours)
    twin(x)[0].sum().backward()
    loss = ours(x)[0].sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_share_no_memory(kind: str) -> None:
    _, ours, x = pair(kind)
    grads = torch.autograd.grad(ours(x)[0].sum(), list(ours.parameters()))
    before = [g.clone() for g in grads]
    for k, g in enumerate(grads):
        g.mul_(k + 2)
    for k, (g, old) in enumerate(zip(grads, before, strict=True)):
        assert torch.equal(g, old * (k + 2))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_a_retained_graph(kind: str) -> None:
    """Gates are written over by the last backward pass only."""
    _, ours, x = pair(kind)
    loss = ours(x)[0].sin().sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(ours.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(ours.parameters()))
