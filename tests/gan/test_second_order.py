"""The four penalties that GANs are trained with, through fuseblock, against eager PyTorch in float64.

WGAN-GP on a critic with batch norm; R1 on a spectral-norm discriminator; R1 and R2 on grouped residual blocks; path length
through upfirdn2d. Each compares the value, the gradients of all parameters, which are second derivatives of the network,
and buffers, on every backend. What is compared with is `torch.nn` and the penalties' equations, written out here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.utils import parametrizations

import fuseblock
from fuseblock import functional, gan
from fuseblock.nn import BatchNormAct2d, BiasAct2d, Conv2d, Conv2dBlock, LeakyReLU

from ..ops.bounds import error_ratio
from ..ops.test_upfirdn2d import composite

Results = dict[str, Tensor]


def on(*engines: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", engines, indirect=True)


def assert_equal(ours: Results, stock: Results, longest_sum: int) -> None:
    assert ours.keys() == stock.keys()
    for name, want in stock.items():
        ratio = error_ratio(ours[name].detach(), want.detach(), 0.0, longest_sum)
        assert ratio <= 1, f"{name}: error {ratio:.3g} times the allowed one"
        assert want.any(), f"{name} is zero: nothing is compared"


def after_backward(model: nn.Module, loss: Tensor, **values: Tensor) -> Results:
    """The loss, the gradients of its parameters by their stock names, and floating-point buffers."""
    loss.backward()
    found = {"loss": loss, **values}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"d {name.replace('parametrizations.weight.original', 'weight_orig')}"] = parameter.grad
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            found[name.replace("parametrizations.weight.0._", "weight_")] = buffer
    return found


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_slopes(model: nn.Module, samples: Tensor) -> Tensor:
    """Per sample the squared norm of the gradient, as papers' codes have it."""
    samples = samples.clone().requires_grad_()
    (slope,) = grad(model(samples).sum(), samples, create_graph=True)
    return slope.square().sum((1, 2, 3))


def off_initial_values(model: nn.Module) -> None:
    """Scales and shifts of norms: with shifts of 0 a norm behind makes the gradients of scales cancel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)


# ---- WGAN-GP, batch norm -------------------------------------------------------------------------------------------


def critic_with_batch_norm(activation: str, last: bool) -> tuple[nn.Module, nn.Module]:
    """(ours, stock) with equal values, batch norm in training."""
    act = {"leaky_relu": lambda: nn.LeakyReLU(0.2), "silu": nn.SiLU, "prelu": nn.PReLU}[activation]
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Conv2d(4, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), act()),
        nn.Sequential(nn.Conv2d(6, 5, 3, 1, 1, bias=False), nn.BatchNorm2d(5), act()),
        nn.Conv2d(5, 1, 2, bias=False),
    ).double()
    ours = nn.Sequential(
        Conv2dBlock(3, 4, 4, 2, 1, norm=None),
        Conv2dBlock(4, 6, 4, 2, 1, activation=activation),
        Conv2dBlock(6, 5, 3, 1, 1, activation=activation),
        Conv2d(5, 1, 2, bias=False),
    ).double()
    off_initial_values(stock)
    ours.load_state_dict(stock.state_dict())
    if last:
        ours, stock = (model.to(memory_format=torch.channels_last) for model in (ours, stock))
    return ours, stock


@on("auto", "reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize(
    ("activation", "last"), [("leaky_relu", False), ("leaky_relu", True), ("silu", False), ("prelu", True)]
)
def test_wgan_gp_critic_with_batch_norm(engine: str, activation: str, last: bool) -> None:
    ours, stock = critic_with_batch_norm(activation, last)
    real, fake = images(1, 3, 3, 8, 8), images(2, 3, 3, 8, 8)
    if last:
        real, fake = (x.contiguous(memory_format=torch.channels_last) for x in (real, fake))

    def random() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    got = gan.wasserstein_discriminator_loss(ours(real), ours(fake))
    got = got + gan.wgan_gp_penalty(ours, real, fake, generator=random())
    epsilon = torch.rand(3, 1, 1, 1, generator=random(), dtype=torch.float64)
    logits = stock(real), stock(fake)  # in the order of ours: the running statistics of all three enter
    norms = squared_slopes(stock, epsilon * real + (1 - epsilon) * fake).sqrt()
    want = logits[1].mean() - logits[0].mean() + 10 * (norms - 1).square().mean()
    assert_equal(after_backward(ours, got), after_backward(stock, want), 10 * real.numel())


# ---- R1, spectral norm ---------------------------------------------------------------------------------------------


@on("auto", "aten", "reference", "cpu")
def test_r1_on_a_spectral_norm_discriminator(engine: str) -> None:
    def build(conv: type, act: type) -> nn.Sequential:
        layers = conv(3, 4, 3, 1, 1), act(0.1), conv(4, 6, 4, 2, 1), act(0.1), conv(6, 6, 3, 1, 1, groups=2)
        return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(96, 1, bias=False)).double()

    torch.manual_seed(0)
    stock, ours = build(nn.Conv2d, nn.LeakyReLU), build(Conv2d, LeakyReLU)
    for layer in stock:
        if hasattr(layer, "weight"):
            parametrizations.spectral_norm(layer)
    fuseblock.nn.spectral_norm(ours).load_state_dict(stock.state_dict())
    real, fake = images(1, 2, 3, 8, 8), images(2, 2, 3, 8, 8)
    got = gan.hinge_discriminator_loss(ours(real), ours(fake)) + gan.r1_penalty(ours, real)
    logits = stock(real), stock(fake)
    want = F.relu(1 - logits[0]).mean() + F.relu(1 + logits[1]).mean()
    want = want + 5 * squared_slopes(stock, real).mean()
    assert_equal(after_backward(ours, got), after_backward(stock, want), 10 * real.numel())


# ---- R1 and R2, grouped residual blocks ----------------------------------------------------------------------------


class Residual(nn.Module):
    """x + body(x), or last(body(x), x) where the last module adds and activates."""

    def __init__(self, *body: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.last is None else self.last(self.body(x), x)


class NormThenAdd(nn.BatchNorm2d):
    """What `BatchNormAct2d` with a residual replaces."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return F.relu(super().forward(x) + residual)


def residual_discriminator(*, fused: bool) -> nn.Module:
    """R3GAN's block (1x1, grouped 3x3, 1x1), ours with bias and activation as one; then a grouped one with norm."""
    if fused:
        pointwise = [Conv2d(4, 8, 1, bias=False), BiasAct2d(8)]
        grouped = [Conv2d(8, 8, 3, 1, 1, groups=4, bias=False), BiasAct2d(8)]
        block = Residual(*pointwise, *grouped, Conv2d(8, 4, 1, bias=False))
        add = BatchNormAct2d(4, activation="relu")
        normed = Residual(Conv2dBlock(4, 4, 3, 1, 1, groups=2), last=add)
        layers = Conv2d(3, 4, 3, 1, 1), block, normed, nn.Flatten(), nn.Linear(144, 1, bias=False)
    else:
        pointwise = [nn.Conv2d(4, 8, 1), nn.LeakyReLU(0.2)]
        grouped = [nn.Conv2d(8, 8, 3, 1, 1, groups=4), nn.LeakyReLU(0.2)]
        block = Residual(*pointwise, *grouped, nn.Conv2d(8, 4, 1, bias=False))
        conv = nn.Conv2d(4, 4, 3, 1, 1, groups=2, bias=False)
        body = nn.Sequential(conv, nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        normed = Residual(body, last=NormThenAdd(4))
        layers = nn.Conv2d(3, 4, 3, 1, 1), block, normed, nn.Flatten(), nn.Linear(144, 1, bias=False)
    return nn.Sequential(*layers).double()


@on("auto", "reference", "cpu", "triton", "cuda")
def test_r1_and_r2_on_grouped_residual_blocks(engine: str) -> None:
    torch.manual_seed(0)
    stock, ours = residual_discriminator(fused=False), residual_discriminator(fused=True)
    off_initial_values(stock)
    renamed = {"1.body.0.bias": "1.body.1.bias", "1.body.2.bias": "1.body.3.bias"}
    state = {renamed.get(name, name): value for name, value in stock.state_dict().items()}
    ours.load_state_dict(state)
    real, fake = images(1, 2, 3, 6, 6), images(2, 2, 3, 6, 6)
    got = gan.relativistic_discriminator_loss(ours(real), ours(fake))
    got = got + gan.r1_penalty(ours, real, gamma=3.0) + gan.r2_penalty(ours, fake, gamma=3.0)
    logits = stock(real), stock(fake)
    want = F.softplus(logits[1] - logits[0]).mean()
    want = want + 1.5 * (squared_slopes(stock, real).mean() + squared_slopes(stock, fake).mean())
    expected = after_backward(stock, want)
    for before, after in renamed.items():
        expected[f"d {after}"] = expected.pop(f"d {before}")
    assert_equal(after_backward(ours, got), expected, 10 * real.numel())


# ---- path length, upfirdn2d ----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """StyleGAN2 in small: modulated convolutions, filtered upsampling, bias and activation, and an image skip."""

    def __init__(self, resample: Callable[..., Tensor], conv: Callable[..., Tensor], act: Callable) -> None:
        super().__init__()
        self.resample, self.conv, self.act = resample, conv, act
        shapes = (3, 3, 3), (3, 5), (4,), (4, 3, 3, 3), (3, 4, 3, 3), (4,), (2, 3, 1, 1)
        for k, shape in enumerate(shapes):
            self.register_parameter(f"p{k}", nn.Parameter(images(k, *shape) / 2))

    def forward(self, w: Tensor) -> Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
        f = torch.outer(taps, taps) / 64
        start, first, second, up, down, bias, rgb = self.parameters()
        small = start * (1 + w[:, 0] @ first.T)[:, :, None, None]
        x = self.act(self.conv(self.resample(small, f, 2, 1, (2, 1, 2, 1), False, 4.0), up, None, 1, 1), bias)
        x = self.conv(x * (1 + w[:, 1, :4] * second)[:, :, None, None], down, None, 1, 1)
        skip = self.resample(small, f, 2, 1, (2, 1, 2, 1), False, 4.0)
        # Downsampling, too, as behind an activation at twice the size.
        large = self.resample(self.resample(x + skip, f, 2, 1, (2, 1, 2, 1)), f, 1, 2, (1, 1, 1, 1))
        return self.conv(large.tanh(), rgb)


@on("auto", "reference", "cpu", "cuda")
def test_path_length_through_upfirdn2d(engine: str) -> None:
    def fused_act(x: Tensor, bias: Tensor) -> Tensor:
        return functional.bias_act(x, bias, activation="leaky_relu", negative_slope=0.2, gain=math.sqrt(2))

    def stock_act(x: Tensor, bias: Tensor) -> Tensor:
        return F.leaky_relu(x + bias[:, None, None], 0.2) * math.sqrt(2)

    ours = Generator(functional.upfirdn2d, functional.conv2d, fused_act)
    stock = Generator(composite, F.conv2d, stock_act)
    latents = images(9, 2, 2, 5).requires_grad_()
    pictures = ours(latents)
    got, mean = gan.path_length_penalty(
        pictures, latents, 0.4, decay=0.1, generator=torch.Generator().manual_seed(1)
    )
    w = copy.deepcopy(latents)
    expected = stock(w)
    noise = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ) / math.sqrt(expected.shape[2] * expected.shape[3])
    (jacobian,) = grad((expected * noise).sum(), w, create_graph=True)
    lengths = jacobian.square().sum(2).mean(1).sqrt()
    running = 0.4 + 0.1 * (lengths.mean() - 0.4)
    want = (lengths - running).square().mean()
    got_by, want_by = (
        after_backward(model, loss, images=y, mean=a)
        for model, loss, y, a in ((ours, got, pictures, mean), (stock, want, expected, running))
    )
    assert_equal(got_by | {"d w": latents.grad}, want_by | {"d w": w.grad}, 10 * expected.numel())
