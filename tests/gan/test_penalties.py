"""Gradient penalties: closed forms, gradients by the discriminator's parameters, 16 bit, reproducibility, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fuseblock import gan
from fuseblock.gan.penalties import _SquaredNorm

EPS = torch.finfo(torch.float64).eps


def linear(weight):
    """D(x) = <w, x>: its gradient is w everywhere."""
    return lambda x: (x * weight).flatten(1).sum(1)


def images(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture
def weight():
    return images(2, 3, 3).requires_grad_()


def test_r1_and_r2_of_a_linear_discriminator(weight):
    real, fake = images(4, 2, 3, 3), images(4, 2, 3, 3)
    for penalty in (
        gan.r1_penalty(linear(weight), real, gamma=3.0),
        gan.r2_penalty(linear(weight), fake, gamma=3.0),
        gan.R1Penalty(3.0)(linear(weight), real, fake),
        gan.R2Penalty(3.0)(linear(weight), real, fake),
    ):
        assert penalty.shape == ()
        assert float(penalty.detach()) == pytest.approx(
            1.5 * float(weight.detach().square().sum()), rel=1e-13
        )
        (gradient,) = torch.autograd.grad(penalty, weight)
        torch.testing.assert_close(gradient, 3.0 * weight.detach(), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 0.25), (2.0, 1.0)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_wgan_gp_of_a_linear_discriminator(weight, scale, expected, one_sided):
    with torch.no_grad():
        weight *= scale / weight.norm()
    real, fake = images(4, 2, 3, 3), images(4, 2, 3, 3)
    penalty = gan.wgan_gp_penalty(linear(weight), real, fake, weight=7.0, one_sided=one_sided)
    value = 0.0 if one_sided and scale < 1 else 7.0 * expected
    assert float(penalty.detach()) == pytest.approx(value, rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, weight)
    factor = 0.0 if value == 0.0 else 7.0 * 2 * (scale - 1) / scale
    torch.testing.assert_close(gradient, factor * weight.detach(), rtol=1e-12, atol=1e-300)
    at_target = gan.wgan_gp_penalty(linear(weight), real, fake, target=scale)
    assert float(at_target.detach()) < (64 * EPS) ** 2


def test_only_the_samples_named_count():
    """A discriminator whose slope is the distance from the origin tells R1, R2 and WGAN-GP apart."""

    def bowl(x):
        return 0.5 * x.square().flatten(1).sum(1)

    real, fake = images(5, 6), images(5, 6)
    assert float(gan.r1_penalty(bowl, real, gamma=2.0)) == pytest.approx(float(real.square().sum(1).mean()))
    assert float(gan.r2_penalty(bowl, fake, gamma=2.0)) == pytest.approx(float(fake.square().sum(1).mean()))
    random = torch.Generator().manual_seed(3)
    between = gan.interpolate(real, fake, generator=random)
    random.manual_seed(3)
    penalty = gan.WGANGPPenalty(2.0)(bowl, real, fake, random)
    assert float(penalty) == pytest.approx(2 * float((between.norm(dim=1) - 1).square().mean()))


def test_interpolation():
    real, fake = torch.ones(2000, 1, 2, 2), torch.zeros(2000, 1, 2, 2)
    random = torch.Generator().manual_seed(5)
    first = gan.interpolate(real, fake, generator=random)
    assert torch.equal(first, first[:, :, :1, :1].expand_as(first)), "one number per sample"
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    assert abs(float(first[:, 0, 0, 0].mean()) - 0.5) < 4 / math.sqrt(12 * 2000)
    assert len(first.unique()) > 1900
    assert not torch.equal(first, gan.interpolate(real, fake, generator=random))
    random.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(first, gan.interpolate(real, fake, generator=random))
    assert torch.equal(before, torch.get_rng_state()), "the default generator is left alone"


@pytest.mark.parametrize("name", ["r1", "r2", "wgan-gp"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_by_the_parameters(name, norm):
    """Second derivatives of the discriminator against finite differences of its first."""
    conv = nn.Conv2d(2, 3, 2).double()
    batch_norm = nn.BatchNorm2d(3).double()
    real, fake = images(3, 2, 3, 3), images(3, 2, 3, 3)

    def penalty(w, b):
        def discriminator(x):
            hidden = torch.nn.functional.conv2d(x, w, b)
            return torch.tanh(batch_norm(hidden) if norm else hidden).flatten(1).sum(1)

        if name == "wgan-gp":
            random = torch.Generator().manual_seed(0)
            return gan.wgan_gp_penalty(discriminator, real, fake, generator=random)
        return gan.r1_penalty(discriminator, real) if name == "r1" else gan.r2_penalty(discriminator, fake)

    assert gradcheck(penalty, (conv.weight, conv.bias))


def test_samples_are_cut_from_their_graph(weight):
    z = images(4, 18).requires_grad_()
    fake = z.reshape(4, 2, 3, 3) * 2
    real = images(4, 2, 3, 3)
    total = (
        gan.r1_penalty(linear(weight), real)
        + gan.r2_penalty(linear(weight), fake)
        + gan.wgan_gp_penalty(linear(weight), real, fake)
    )
    total.backward()
    assert z.grad is None
    assert not real.requires_grad


def test_no_gradient_no_nan():
    """WGAN-GP where D is flat: the norm 0 costs 1, and its slope is taken as 0."""
    weight = torch.zeros(3, requires_grad=True)
    penalty = gan.wgan_gp_penalty(lambda x: x @ weight, torch.randn(4, 3), torch.randn(4, 3), weight=1.0)
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert float(penalty) == 1.0
    assert torch.equal(gradient, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_norms_are_summed_in_float32(dtype):
    """64 squares of 300 overflow float16, and do not fit bfloat16's 8 bits."""
    weight = torch.full((64,), 300.0, dtype=dtype, requires_grad=True)
    x = images(2, 64, dtype=dtype)
    for penalty, value in (
        (gan.r1_penalty(linear(weight), x, gamma=2.0), 64 * 300.0**2),
        (gan.wgan_gp_penalty(linear(weight), x, -x, weight=1.0), (8 * 300.0 - 1) ** 2),
    ):
        assert penalty.dtype == torch.float32
        assert float(penalty.detach()) == value


def test_grad_scale_saves_small_float16_gradients():
    """2^-14 twice is nothing in float16."""
    small = torch.tensor(2.0**-14, dtype=torch.float16)
    x = torch.ones(1, 4, dtype=torch.float16)

    def discriminator(x):
        return (x * small * small).flatten(1).sum(1)

    expected = 4 * 2.0**-56
    assert float(gan.r1_penalty(discriminator, x, gamma=2.0)) == 0.0
    for penalty in (
        gan.r1_penalty(discriminator, x, gamma=2.0, grad_scale=2.0**10),
        gan.R2Penalty(2.0, grad_scale=2.0**10)(discriminator, None, x),
        gan.wgan_gp_penalty(discriminator, x, x, weight=1.0, target=0.0, grad_scale=2.0**10),
    ):
        assert float(penalty) == pytest.approx(expected)


def test_norms_of_logits_that_exist(weight):
    x = images(4, 2, 3, 3).requires_grad_()
    logits = linear(weight)(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    norms = gan.squared_gradient_norm(logits, x)
    assert norms.shape == (4,)
    expected = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64) * weight.square().sum()
    torch.testing.assert_close(norms, expected.detach(), check_dtype=True)


@pytest.mark.parametrize("layers", [None, 3])
def test_path_length(layers):
    """Of a linear generator: lengths of A^T y for the same y."""
    shape = (2, 5) if layers is None else (2, layers, 5)
    latents = images(*shape).requires_grad_()
    matrix = images(math.prod(shape[1:]), 3 * 4 * 4).requires_grad_()

    def generated(matrix):
        return (latents.flatten(1) @ matrix).reshape(2, 3, 4, 4)

    def penalty(matrix):
        random = torch.Generator().manual_seed(1)
        return gan.path_length_penalty(generated(matrix), latents, 2.0, decay=0.1, generator=random)

    value, mean = penalty(matrix)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4
    squares = (noise.flatten(1) @ matrix.T).square()
    lengths = (squares.sum(1) if layers is None else squares.reshape(2, layers, 5).sum(2).mean(1)).sqrt()
    new = 0.9 * 2.0 + 0.1 * lengths.mean()
    assert float(mean) == pytest.approx(float(new), rel=1e-13)
    assert not mean.requires_grad
    assert float(value) == pytest.approx(float((lengths - new).square().mean()), rel=1e-12)
    assert gradcheck(lambda matrix: penalty(matrix)[0], (matrix,))


def test_path_length_of_a_zero_jacobian():
    """The second sample does not depend on its latents: no NaN, and the gradient of the first alone."""
    scale = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    latents = images(2, 3).requires_grad_()
    generated = (scale * latents.sum(1))[:, None, None, None].expand(2, 1, 2, 2)
    random = torch.Generator().manual_seed(0)
    value, mean = gan.path_length_penalty(generated, latents, 1.0, generator=random)
    (gradient,) = torch.autograd.grad(value, scale)
    assert value.isfinite() and mean.isfinite()
    assert gradient[0] != 0 and gradient[1] == 0


def test_samples_of_one_number():
    """(N,): the gradient of x^2 is 2 x, its squared norm 4 x^2."""
    x, zero = images(5), torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(gan.r1_penalty(torch.square, x, gamma=2.0), 4 * x.square().mean())
    torch.testing.assert_close(gan.r2_penalty(torch.square, x, gamma=2.0), 4 * x.square().mean())
    between = gan.interpolate(x, zero, generator=torch.Generator().manual_seed(0))
    penalty = gan.wgan_gp_penalty(torch.square, x, zero, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(penalty, 10 * (2 * between.abs() - 1).square().mean())


def test_path_length_module_keeps_the_mean():
    module = gan.PathLengthPenalty(decay=0.5)
    latents = torch.randn(4, 6, requires_grad=True)
    pictures = (latents.square() @ torch.randn(6, 12)).reshape(4, 3, 2, 2)
    random = torch.Generator().manual_seed(0)
    module(pictures, latents, random).backward(retain_graph=True)
    _, expected = gan.path_length_penalty(pictures, latents, 0.0, decay=0.5, generator=random.manual_seed(0))
    assert torch.equal(module.mean_length, expected)
    assert float(expected) > 0
    module.eval()(pictures, latents)
    assert torch.equal(module.mean_length, expected)
    assert set(module.state_dict()) == {"mean_length"}


def test_bad_input(weight):
    x = images(4, 2, 3, 3)
    with pytest.raises(ValueError, match=r"one shape, got \(4, 2, 3, 3\) and \(3, 2, 3, 3\)"):
        gan.wgan_gp_penalty(linear(weight), x, x[:3])
    with pytest.raises(TypeError, match="real: expected floating-point samples"):
        gan.r1_penalty(linear(weight), x.long())
    with pytest.raises(ValueError, match=r"fake: expected samples of shape \(N, ...\), got \(0, 2, 3, 3\)"):
        gan.r2_penalty(linear(weight), x[:0])
    with pytest.raises(ValueError, match=r"real: expected samples of shape \(N, ...\), got \(\)"):
        gan.r1_penalty(lambda x: x, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\)"):
        gan.path_length_penalty(x, images(3, 5), 0.0)


def test_repr():
    assert repr(gan.R1Penalty(2.0)) == "R1Penalty(gamma=2.0, grad_scale=1.0)"
    assert repr(gan.R2Penalty()) == "R2Penalty(gamma=10.0, grad_scale=1.0)"
    assert (
        repr(gan.WGANGPPenalty()) == "WGANGPPenalty(weight=10.0, target=1.0, one_sided=False, grad_scale=1.0)"
    )
    assert repr(gan.PathLengthPenalty()) == "PathLengthPenalty(decay=0.01)"


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2, 2)], ids=str)
def test_the_squared_norm_is_differentiable_to_any_order(shape):
    gradient = images(*shape).requires_grad_()
    if len(shape) > 1:
        with torch.no_grad():
            gradient[1] = 0.0  # where the norm itself has no derivative

    def squared(g):
        return _SquaredNorm.apply(g, 4.0)

    def slope(g):
        return torch.autograd.grad(squared(g).sum().square(), g, create_graph=True)[0]

    torch.testing.assert_close(squared(gradient), (gradient / 4).square().reshape(3, -1).sum(1))
    assert gradcheck(squared, gradient, check_forward_ad=True)
    assert gradgradcheck(squared, gradient) and gradgradcheck(slope, gradient)
    assert torch.equal(torch.vmap(squared)(gradient.detach()[None])[0], squared(gradient))


def test_the_squared_norm_passes_over_the_gradient_once():
    """One operator on tensors of its size forward, and one backward: so many launches they are on a GPU."""
    gradient, size = images(4, 3, 5, 5, dtype=torch.float32).requires_grad_(), 300
    free = {
        "view",
        "reshape",
        "expand",
        "unsqueeze",
        "slice",
        "alias",
        "_reshape_alias",
        "as_strided",
        "to",
        "detach",
    }

    def passes(run):
        with torch.profiler.profile(record_shapes=True) as profile:
            result = run()
        found = [e.name.removeprefix("aten::") for e in profile.events() if e.name.startswith("aten::")
                 and any(math.prod(shape) == size for shape in e.input_shapes if shape)]  # fmt: skip
        return result, [name for name in found if name not in free]

    squared, forward = passes(lambda: _SquaredNorm.apply(gradient, 2.0))
    assert forward == ["linalg_vector_norm"]
    _, backward = passes(lambda: torch.autograd.grad(squared.sum(), gradient))
    assert backward == ["mul"]
