r"""Gradient penalties: R1, R2, WGAN-GP and path length, as functions and modules.

A penalty differentiates a network by its input with ``create_graph=True``: its own gradient is a second derivative of
the network. fuseblock's blocks have fused kernels for that, and its convolutions compute no weight gradients that nobody
asked for.

Only the input is differentiated, so a network under DistributedDataParallel may be passed: gradients of parameters, and
with them its communication, come from the one ``backward()`` of the whole loss. Penalties run eagerly: AOTAutograd refuses
double backward through a compiled region. Per-sample norms presume samples that do not influence each other; with batch
statistics in the network (batch norm in training) the gradient is that of the whole batch's logits by one sample.

Squared norms are summed in float32 for 16-bit gradients (float64 for float64), and penalties have that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Anything that maps samples (N, ...) to logits (N, ...): a module, or a closure over its conditions.
Discriminator = Callable[[Tensor], Tensor]


def squared_gradient_norm(logits: Tensor, samples: Tensor, *, grad_scale: float = 1.0) -> Tensor:
    r"""Per-sample :math:`\lVert \nabla_x \sum D(x) \rVert^2`, differentiable again: what the penalties are made of.

    Use it where logits of samples exist already, to save a penalty its own forward pass.

    Args:
        logits: any shape, computed from ``samples``.
        samples: ``(N, ...)``, with ``requires_grad`` set before ``logits`` were computed.
        grad_scale: multiplies the logits before and divides the norm after, in float32: a power of two such as
            2**10 keeps float16 gradients out of the subnormal range.

    Returns:
        ``(N,)``, float32 for 16-bit samples, else the samples' dtype.

    Raises:
        RuntimeError: ``logits`` do not depend on ``samples`` (PyTorch's).
    """
    total = logits.sum(dtype=_statistics_dtype(logits))
    (gradient,) = torch.autograd.grad(
        total * grad_scale if grad_scale != 1.0 else total, samples, create_graph=True
    )
    squared: Tensor = _SquaredNorm.apply(gradient, grad_scale)
    return squared


def r1_penalty(
    discriminator: Discriminator, real: Tensor, *, gamma: float = 10.0, grad_scale: float = 1.0
) -> Tensor:
    r""":math:`\frac{\gamma}{2} E\,\lVert \nabla_x D(x) \rVert^2` at real samples (Mescheder et al. 2018, arXiv:1801.04406,
    equation 9).

    Args:
        discriminator: maps samples to logits.
        real: ``(N, ...)``; it is detached.
        gamma: strength; 10 is the paper's.
        grad_scale: as in :func:`squared_gradient_norm`.

    Returns:
        A 0-d tensor that depends on the discriminator's parameters.

    Raises:
        TypeError: samples that are not floating point.
        ValueError: samples without a batch dimension, or none at all.
    """
    samples = _leaf(real, "real")
    return 0.5 * gamma * squared_gradient_norm(discriminator(samples), samples, grad_scale=grad_scale).mean()


def r2_penalty(
    discriminator: Discriminator, fake: Tensor, *, gamma: float = 10.0, grad_scale: float = 1.0
) -> Tensor:
    r""":math:`\frac{\gamma}{2} E\,\lVert \nabla_x D(x) \rVert^2` at generated samples (Mescheder et al. 2018,
    arXiv:1801.04406, equation 10). ``fake`` is detached; else as :func:`r1_penalty`.
    """
    samples = _leaf(fake, "fake")
    return 0.5 * gamma * squared_gradient_norm(discriminator(samples), samples, grad_scale=grad_scale).mean()


def interpolate(real: Tensor, fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r""":math:`\hat x = \epsilon x + (1 - \epsilon) \tilde x` with one :math:`\epsilon \sim U[0, 1)` per sample, detached.

    Raises:
        TypeError: samples that are not floating point.
        ValueError: ``real`` and ``fake`` of different shapes or devices.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"expected real and fake of one shape, got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    if real.device != fake.device:
        raise ValueError(f"expected real and fake on one device, got {real.device} and {fake.device}")
    start, end = _leaf(fake, "fake").detach(), _leaf(real, "real").detach()
    weight = torch.rand(
        (len(real), *(1,) * (real.dim() - 1)),
        generator=generator,
        device=real.device,
        dtype=_statistics_dtype(real),
    )
    return torch.lerp(start, end, weight.to(real.dtype))


def wgan_gp_penalty(
    discriminator: Discriminator,
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    generator: torch.Generator | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    r""":math:`\lambda\, E\,(\lVert \nabla_{\hat x} D(\hat x) \rVert - 1)^2` between real and fake samples (Gulrajani et al.
    2017, arXiv:1704.00028, equation 3).

    Args:
        discriminator: maps samples to logits; the paper's critics have no batch norm.
        real, fake: ``(N, ...)`` of one shape; they are detached.
        weight: lambda; 10 is the paper's.
        target: the norm aimed at.
        one_sided: penalise norms above ``target`` only (the paper's section 4, "two-sided penalty").
        generator: random numbers of :func:`interpolate`, for a reproducible penalty.
        grad_scale: as in :func:`squared_gradient_norm`.

    Returns:
        A 0-d tensor that depends on the discriminator's parameters. Where the gradient is exactly zero, so is the penalty's.

    Raises:
        TypeError: samples that are not floating point.
        ValueError: ``real`` and ``fake`` of different shapes or devices, without a batch dimension, or empty.
    """
    samples = interpolate(real, fake, generator=generator).requires_grad_()
    squared = squared_gradient_norm(discriminator(samples), samples, grad_scale=grad_scale)
    excess = _root(squared) - target
    return weight * (excess.relu() if one_sided else excess).square().mean()


def path_length_penalty(
    images: Tensor,
    latents: Tensor,
    mean_length: Tensor | float,
    *,
    decay: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r""":math:`E\,(\lVert J_w^T y \rVert - a)^2`, :math:`y \sim N(0, I) / \sqrt{HW}`, a the running mean of lengths
    (Karras et al. 2020, arXiv:1912.04958, equation 4; in the form of its official code).

    Args:
        images: ``(N, C, H, W)``, generated from ``latents``.
        latents: ``(N, D)``, or ``(N, L, D)`` with one latent per layer, whose squared lengths are averaged over L.
        mean_length: a before this step; 0 at first.
        decay: how much of this step's mean length enters a.
        generator: random numbers for y.

    Returns:
        The penalty, a 0-d tensor (the paper's weight is 2, every 8th step times 8), and the new a, detached. Where J is
        exactly zero, so is the penalty's gradient.

    Raises:
        ValueError: images or latents of other ranks, or of different N.
    """
    if images.dim() != 4 or latents.dim() not in (2, 3) or len(images) != len(latents):
        raise ValueError(
            "expected images (N, C, H, W) and latents (N, D) or (N, L, D), "
            f"got {tuple(images.shape)} and {tuple(latents.shape)}"
        )
    noise = torch.randn(
        images.shape, generator=generator, device=images.device, dtype=_statistics_dtype(images)
    ) / math.sqrt(images.shape[2] * images.shape[3])
    (jacobian,) = torch.autograd.grad((images * noise).sum(), latents, create_graph=True)
    squared = jacobian.to(_statistics_dtype(jacobian)).square().sum(-1)
    lengths = _root(squared if squared.dim() == 1 else squared.mean(1))
    mean = torch.as_tensor(mean_length, dtype=lengths.dtype, device=lengths.device)
    mean = torch.lerp(mean, lengths.mean(), decay)
    return (lengths - mean).square().mean(), mean.detach()


class R1Penalty(nn.Module):
    """:func:`r1_penalty` as a module: ``penalty(discriminator, real, fake)``, where ``fake`` is not used."""

    def __init__(self, gamma: float = 10.0, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.gamma, self.grad_scale = gamma, grad_scale

    def forward(self, discriminator: Discriminator, real: Tensor, fake: Tensor | None = None) -> Tensor:
        """The penalty, ``()``."""
        return r1_penalty(discriminator, real, gamma=self.gamma, grad_scale=self.grad_scale)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"gamma={self.gamma}, grad_scale={self.grad_scale}"


class R2Penalty(nn.Module):
    """:func:`r2_penalty` as a module: ``penalty(discriminator, real, fake)``, where ``real`` is not used."""

    def __init__(self, gamma: float = 10.0, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.gamma, self.grad_scale = gamma, grad_scale

    def forward(self, discriminator: Discriminator, real: Tensor | None, fake: Tensor) -> Tensor:
        """The penalty, ``()``."""
        return r2_penalty(discriminator, fake, gamma=self.gamma, grad_scale=self.grad_scale)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"gamma={self.gamma}, grad_scale={self.grad_scale}"


class WGANGPPenalty(nn.Module):
    """:func:`wgan_gp_penalty` as a module: ``penalty(discriminator, real, fake, generator=None)``."""

    def __init__(
        self, weight: float = 10.0, target: float = 1.0, one_sided: bool = False, grad_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight, self.target, self.one_sided, self.grad_scale = weight, target, one_sided, grad_scale

    def forward(
        self,
        discriminator: Discriminator,
        real: Tensor,
        fake: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty, ``()``."""
        return wgan_gp_penalty(
            discriminator,
            real,
            fake,
            weight=self.weight,
            target=self.target,
            one_sided=self.one_sided,
            generator=generator,
            grad_scale=self.grad_scale,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"weight={self.weight}, target={self.target}, one_sided={self.one_sided}, grad_scale={self.grad_scale}"


class PathLengthPenalty(nn.Module):
    """:func:`path_length_penalty` as a module that keeps the running mean: ``penalty(images, latents, generator=None)``.

    ``mean_length`` is a buffer ``()``, so checkpoints hold it; it moves in training only.
    """

    mean_length: Tensor

    def __init__(self, decay: float = 0.01) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_length", torch.zeros(()))

    def forward(self, images: Tensor, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The penalty, ``()``."""
        penalty, mean = path_length_penalty(
            images, latents, self.mean_length.clone(), decay=self.decay, generator=generator
        )
        if self.training:
            self.mean_length.copy_(mean)
        return penalty

    def extra_repr(self) -> str:
        """The arguments."""
        return f"decay={self.decay}"


class _SquaredNorm(torch.autograd.Function):
    r"""Per-sample :math:`\lVert g / s \rVert^2`, with any order of derivative: one launch over g forward and one backward.

    As a composition it is two and three of them, and in 16 bit it keeps a copy of g in float32.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, scale: float) -> Tensor:
        dtype = _statistics_dtype(gradient)
        norm = torch.linalg.vector_norm(gradient[:, None], dim=_all_but_first(gradient), dtype=dtype)
        squared: Tensor = (norm / scale if scale != 1.0 else norm).square()
        return squared

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        gradient, ctx.scale = inputs
        ctx.save_for_backward(gradient)
        ctx.save_for_forward(gradient)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        factor = (dy * (2.0 / ctx.scale**2)).reshape(-1, *(1,) * (gradient.dim() - 1))
        return (gradient * factor).to(gradient.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (gradient,) = ctx.saved_tensors
        products = (gradient.to(_statistics_dtype(gradient)) * tangent)[:, None]
        slope: Tensor = products.sum(_all_but_first(gradient)) * (2.0 / ctx.scale**2)
        return slope


def _all_but_first(gradient: Tensor) -> tuple[int, ...]:
    """The dimensions to sum over, of a gradient with another one after the first: samples may be numbers."""
    return tuple(range(1, gradient.dim() + 1))


def _root(squared: Tensor) -> Tensor:
    """The square root, whose infinite slope at 0 is left out: there, and nowhere else, the constant 0 takes its place."""
    zero = squared == 0
    return torch.where(zero, 0.0, squared.masked_fill(zero, 1.0).sqrt())


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _leaf(samples: Tensor, name: str) -> Tensor:
    """The samples cut out of their graph, to be differentiated by."""
    if not samples.is_floating_point():
        raise TypeError(f"{name}: expected floating-point samples, got {samples.dtype}")
    if samples.dim() == 0 or samples.numel() == 0:
        raise ValueError(f"{name}: expected samples of shape (N, ...), got {tuple(samples.shape)}")
    return samples.detach().requires_grad_()
