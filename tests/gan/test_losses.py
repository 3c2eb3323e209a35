"""Adversarial losses: values against their equations, gradients of three orders, both ends of the number line, bad input."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fuseblock import gan

NAMES = sorted(gan.LOSSES)
SYMMETRIC = ("relativistic", "relativistic-average")


def functions(name):
    stem = name.replace("-", "_")
    return getattr(gan, f"{stem}_discriminator_loss"), getattr(gan, f"{stem}_generator_loss")


def softplus(x):
    """log(1 + exp(x)) of a Python float, accurate everywhere."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def expected(name, r, f):
    """(discriminator, generator) loss of lists of floats, from the papers' equations."""
    mr, mf = mean(r), mean(f)
    cross_entropy = mean(softplus(-x) for x in r) + mean(softplus(x) for x in f)
    return {
        "minimax": (cross_entropy, -mean(softplus(x) for x in f)),
        "non-saturating": (cross_entropy, mean(softplus(-x) for x in f)),
        "least-squares": (
            mean((x - 1) ** 2 for x in r) / 2 + mean(x**2 for x in f) / 2,
            mean((x - 1) ** 2 for x in f) / 2,
        ),
        "hinge": (mean(max(0, 1 - x) for x in r) + mean(max(0, 1 + x) for x in f), -mf),
        "wasserstein": (mf - mr, -mf),
        "relativistic": (
            mean(softplus(y - x) for x, y in zip(r, f, strict=True)),
            mean(softplus(x - y) for x, y in zip(r, f, strict=True)),
        ),
        "relativistic-average": (
            mean(softplus(mf - x) for x in r) + mean(softplus(y - mr) for y in f),
            mean(softplus(mr - y) for y in f) + mean(softplus(x - mf) for x in r),
        ),
    }[name]


def logits(shape=(7,), dtype=torch.float64, scale=2.0):
    return (scale * torch.randn(2, *shape, dtype=torch.float64)).to(dtype).unbind(0)


@pytest.mark.parametrize("scale", [1.0, 30.0, 900.0])
@pytest.mark.parametrize("name", NAMES)
def test_values(name, scale):
    real, fake = logits(scale=scale)
    d_loss, g_loss = functions(name)
    for ours, truth in zip(
        (d_loss(real, fake), g_loss(fake, real)), expected(name, real.tolist(), fake.tolist()), strict=True
    ):
        assert float(ours) == pytest.approx(truth, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_the_functions(name):
    real, fake = logits((2, 1, 3, 3))
    module, (d_loss, g_loss) = gan.LOSSES[name](), functions(name)
    assert torch.equal(module.discriminator_loss(real, fake), d_loss(real, fake))
    assert torch.equal(module.generator_loss(fake, real), g_loss(fake, real))
    both = module(real, fake)
    assert torch.equal(both.discriminator, d_loss(real, fake))
    assert torch.equal(both.generator, g_loss(fake, real))
    assert module.needs_real == (name in SYMMETRIC)
    if not module.needs_real:
        assert torch.equal(module.generator_loss(fake), g_loss(fake))


@pytest.mark.parametrize("name", NAMES)
def test_three_orders_and_forward_mode(name):
    # Away from the hinge's corners, where finite differences mean nothing.
    pair = [
        torch.linspace(-2.3, 3.1, 5, dtype=torch.float64),
        torch.linspace(2.7, -3.3, 5, dtype=torch.float64),
    ]
    pair = [x.requires_grad_() for x in pair]
    d_loss, g_loss = functions(name)
    for loss in (d_loss, lambda r, f: g_loss(f, r)):
        assert gradcheck(loss, pair, check_forward_ad=True)
        assert gradgradcheck(loss, pair)

        def second(r, f, loss=loss):
            first = torch.autograd.grad(loss(r, f), (r, f), create_graph=True, materialize_grads=True)
            total = sum(g.square().sum() for g in first)
            return torch.autograd.grad(total, (r, f), create_graph=True, materialize_grads=True)

        if name not in ("wasserstein", "hinge"):  # their gradients are constants
            assert gradcheck(second, pair)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_summed_in_float32(name, dtype):
    real, fake = logits((5000,), dtype, 8.0)
    for loss, args in zip(functions(name), ((real, fake), (fake, real)), strict=True):
        value = loss(*args)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(*(x.float() for x in args)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_huge_logits_stay_finite(name, sign):
    real, fake = (torch.full((3,), value * sign).requires_grad_() for value in (1e4, -1e4))
    for loss, args in zip(functions(name), ((real, fake), (fake, real)), strict=True):
        value = loss(*args)
        gradients = torch.autograd.grad(value, args, allow_unused=True, materialize_grads=True)
        assert value.isfinite() and all(g.isfinite().all() for g in gradients)


def test_non_saturating_gradient_where_the_discriminator_wins():
    fake = torch.tensor([-50.0, -1000.0], requires_grad=True)
    (strong,) = torch.autograd.grad(gan.non_saturating_generator_loss(fake), fake)
    assert torch.equal(strong, torch.tensor([-0.5, -0.5]))
    (weak,) = torch.autograd.grad(gan.minimax_generator_loss(fake), fake)
    assert float(weak.abs().max()) < 1e-20


@pytest.mark.parametrize("x", [15.0, 25.0, 35.0])
def test_curvature_does_not_vanish_early(x):
    """F.softplus calls itself linear above 20: its second derivative is 0 there."""
    fake = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    loss = gan.non_saturating_discriminator_loss(torch.zeros(1, dtype=torch.float64), fake)
    (first,) = torch.autograd.grad(loss, fake, create_graph=True)
    (second,) = torch.autograd.grad(first, fake)
    assert float(second) == pytest.approx(math.exp(-x), rel=1e-6)


def test_non_finite_logits_travel():
    for name, bad in product(NAMES, (math.nan, math.inf)):
        real, fake = torch.tensor([0.3, bad]), torch.tensor([bad, -0.2])
        d_loss, g_loss = functions(name)
        assert not d_loss(-real, fake).isfinite()
        if math.isnan(bad):
            assert g_loss(fake, real).isnan()


def test_bad_input():
    x = torch.randn(4)
    for name in NAMES:
        d_loss, g_loss = functions(name)
        with pytest.raises(
            TypeError, match=r"fake_logits: expected a floating-point tensor, got torch\.int64"
        ):
            d_loss(x, torch.ones(4, dtype=torch.int64))
        with pytest.raises(TypeError, match="fake_logits: expected a floating-point tensor, got float"):
            g_loss(1.0, x)
        with pytest.raises(ValueError, match=r"fake_logits: expected at least one logit, got shape \(0,\)"):
            g_loss(x[:0], x)
        if name in SYMMETRIC:
            with pytest.raises(ValueError, match="needs real_logits"):
                g_loss(x)
    for loss in functions("relativistic"):
        with pytest.raises(ValueError, match="one shape"):
            loss(x, x[:3])
