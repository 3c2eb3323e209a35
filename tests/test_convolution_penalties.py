"""Gradient penalties through the convolutions: what is computed, equals what PyTorch computes, or less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fuseblock import functional

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
CONVOLUTION = torch.ops.aten.convolution.default
WEIGHT_ALONE = (False, True, False)


class Recorder(TorchDispatchMode):
    """What is asked of the convolution ops: masks of the backward, number of the forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: Counter[tuple[bool, ...]] = Counter()
        self.forwards = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is CONVOLUTION_BACKWARD:
            self.masks[tuple(args[-1])] += 1
        self.forwards += func is CONVOLUTION
        return func(*args, **(kwargs or {}))


class _LeakyReLU(torch.autograd.Function):
    """Gives no gradient to what it does not depend on, as a linear function of dy has none for the sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mask = torch.where(x > 0, 1.0, 0.2).to(x) if mask is None else mask
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
        return None if dy is None else _LeakyReLU.apply(dy, ctx.mask), None


def leaky_relu(x: Tensor) -> Tensor:
    return _LeakyReLU.apply(x, None)


class Critic(torch.nn.Module):
    """Strided, grouped and transposed convolutions, without norms; and the features of the first."""

    def __init__(self, of: Any, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator) / 4)

        self.of, self.activation = of, activation
        self.first, self.bias = parameter(4, 3, 4, 4), parameter(4)
        self.grouped, self.up, self.last = parameter(8, 2, 3, 3), parameter(8, 3, 4, 4), parameter(1, 3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.of.conv2d(x, self.first, self.bias, 2, 1))
        x = self.activation(self.of.conv2d(x, self.grouped, None, 1, 1, groups=2))
        x = self.activation(self.of.conv_transpose2d(x, self.up, None, 2, 1))
        return self.of.conv2d(x, self.last, None, 2)


def training_step(model: Critic, x: Tensor) -> None:
    model(x).sum().backward()


def r1(model: Critic, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    slope.square().sum().backward()


def r1_with_loss(model: Critic, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (F.softplus(-y).mean() + slope.square().sum()).backward()


def wgan_gp(model: Critic, x: Tensor) -> None:
    between = (0.3 * x + 0.7 * x.flip(0)).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    (model(x).mean() - model(x.flip(0)).mean() + penalty).backward()


def path_length(model: Critic, x: Tensor) -> None:
    scale = torch.ones(3, requires_grad=True)  # stands for the latent code, whose path is not an image
    y = model(x * scale.view(1, 3, 1, 1))
    (slope,) = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), scale, create_graph=True
    )
    slope.square().sum().backward()


def frozen_weights(model: Critic, x: Tensor) -> None:
    model.requires_grad_(False)
    model.grouped.requires_grad_()
    r1_with_loss(model, x)


STEPS = [training_step, r1, r1_with_loss, wgan_gp, path_length, frozen_weights]


@pytest.mark.parametrize("activation", [torch.tanh, leaky_relu], ids=["tanh", "leaky_relu"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_first_backward_computes_what_pytorch_computes(step: Any, activation: Any) -> None:
    masks, grads = [], []
    x = torch.randn(3, 3, 8, 8)
    for of in (F, functional):
        model = Critic(of, activation)
        with Recorder() as recorder:
            step(model, x)
        masks.append(recorder.masks)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    stock, ours = masks
    # Beyond PyTorch's there are the weight gradients of second order, one a convolution that learns.
    learning = {training_step: 0, frozen_weights: 1}.get(step, 4)
    assert ours - stock == +Counter({WEIGHT_ALONE: learning}) and not stock - ours
    for name, want in grads[0].items():
        assert (grads[1][name] is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(grads[1][name], want, msg=name)


def test_nothing_is_propagated_for_absent_gradients() -> None:
    """R1 alone on a piecewise linear critic: no first-order backward of the convolutions is run on zeros."""
    with Recorder() as recorder:
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        model = Critic(functional, leaky_relu)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        recorder.masks.clear()
        slope.square().sum().backward()
    assert recorder.masks == {WEIGHT_ALONE: 4}
    assert model.bias.grad is None


def penalty_gradients(run: Callable[[Critic, Tensor], Tensor], of: Any) -> list[Tensor]:
    model = Critic(of, torch.tanh).double()
    x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).view(2, 3, 8, 8).sin().requires_grad_()
    (slope,) = torch.autograd.grad(run(model, x).square().sum(), x, create_graph=True)
    return list(torch.autograd.grad(slope.square().sum(), [x, *model.parameters()]))


def checkpointed(model: Critic, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def saved_elsewhere(model: Critic, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return model(x)


@pytest.mark.parametrize("run", [checkpointed, saved_elsewhere], ids=lambda run: run.__name__)
def test_checkpoints_and_saved_tensor_hooks(run: Any) -> None:
    want = penalty_gradients(lambda model, x: model(x), F)
    for got, w in zip(penalty_gradients(run, functional), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-10)
