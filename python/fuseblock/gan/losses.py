r"""Adversarial losses on logits: functions of two sides each, and a module per loss.

Every loss is a pair of functions to minimise, with r = D(x) the logits of real and f = D(G(z)) those of fake samples:

    ``<loss>_discriminator_loss(real_logits, fake_logits)``
    ``<loss>_generator_loss(fake_logits, real_logits=None)``

Logits may have any shape, (N,) of images or (N, 1, H, W) of patches; the mean is over all elements, a 0-d tensor. It is
taken in float32 for float16 and bfloat16 logits, and is float32 then; else it has the logits' dtype. S is softplus,
S(x) = log(1 + exp(x)), so that -log sigmoid(x) = S(-x) and -log(1 - sigmoid(x)) = S(x): nothing saturates or overflows
before the logits do, and every order of gradient exists, in forward mode too. Infinite and NaN logits travel into the loss.

All functions raise TypeError unless logits are real floating-point tensors, and ValueError for empty ones or those of two
devices. The relativistic losses need ``real_logits`` on the generator's side too, and raise ValueError without; the others
ignore them.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _logits(value: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
    if value.numel() == 0:
        raise ValueError(f"{name}: expected at least one logit, got shape {tuple(value.shape)}")
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _both(real_logits: Tensor | None, fake_logits: Tensor, *, paired: bool = False) -> tuple[Tensor, Tensor]:
    if real_logits is None:
        raise ValueError("a relativistic loss compares fake with real: the generator needs real_logits too")
    real, fake = _logits(real_logits, "real_logits"), _logits(fake_logits, "fake_logits")
    if real.device != fake.device:
        raise ValueError(
            f"expected real_logits and fake_logits on one device, got {real.device} and {fake.device}"
        )
    if paired and real.shape != fake.shape:
        raise ValueError(
            "the relativistic loss pairs real with fake: expected logits of one shape, "
            f"got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    return real, fake


def _softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear above 20, which costs float64 its accuracy and everyone the second derivative there.
    return -F.logsigmoid(-x)


def minimax_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log sigmoid(r) - E log(1 - sigmoid(f)) = E S(-r) + E S(f) (Goodfellow et al. 2014, arXiv:1406.2661)."""
    real, fake = _both(real_logits, fake_logits)
    return _softplus(-real).mean() + _softplus(fake).mean()


def minimax_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """E log(1 - sigmoid(f)) = -E S(f), the value that D maximises; flat where D wins (Goodfellow et al. 2014)."""
    return -_softplus(_logits(fake_logits, "fake_logits")).mean()


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E S(-r) + E S(f): as :func:`minimax_discriminator_loss` (Goodfellow et al. 2014, arXiv:1406.2661)."""
    return minimax_discriminator_loss(real_logits, fake_logits)


def non_saturating_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-E log sigmoid(f) = E S(-f): a gradient where D wins (Goodfellow et al. 2014, section 3)."""
    return _softplus(-_logits(fake_logits, "fake_logits")).mean()


def least_squares_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E (r - 1)^2 / 2 + E f^2 / 2 (Mao et al. 2017, arXiv:1611.04076, equation 9: labels 0, 1, 1)."""
    real, fake = _both(real_logits, fake_logits)
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def least_squares_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """E (f - 1)^2 / 2 (Mao et al. 2017, arXiv:1611.04076, equation 9)."""
    return 0.5 * (_logits(fake_logits, "fake_logits") - 1).square().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E max(0, 1 - r) + E max(0, 1 + f) (Lim & Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957)."""
    real, fake = _both(real_logits, fake_logits)
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-E f (Lim & Ye 2017, arXiv:1705.02894)."""
    return -_logits(fake_logits, "fake_logits").mean()


def wasserstein_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E f - E r, for a critic kept Lipschitz, say by :func:`~fuseblock.gan.wgan_gp_penalty` (Arjovsky et al. 2017,
    arXiv:1701.07875).
    """
    real, fake = _both(real_logits, fake_logits)
    return fake.mean() - real.mean()


def wasserstein_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-E f (Arjovsky et al. 2017, arXiv:1701.07875)."""
    return -_logits(fake_logits, "fake_logits").mean()


def relativistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E S(f - r) over pairs (RpGAN: Jolicoeur-Martineau 2018, arXiv:1807.00734; with R1 and R2 it is R3GAN's: Huang et
    al. 2024, arXiv:2501.05441).

    Raises:
        ValueError: ``real_logits`` and ``fake_logits`` of different shapes.
    """
    real, fake = _both(real_logits, fake_logits, paired=True)
    return _softplus(fake - real).mean()


def relativistic_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """E S(r - f) over pairs (arXiv:1807.00734, arXiv:2501.05441).

    Raises:
        ValueError: no ``real_logits``, or of another shape than ``fake_logits``.
    """
    real, fake = _both(real_logits, fake_logits, paired=True)
    return _softplus(real - fake).mean()


def relativistic_average_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E S(E f - r) + E S(f - E r) (RaSGAN: Jolicoeur-Martineau 2018, arXiv:1807.00734, equations 10 and 11).

    The inner means are over this process' batch.
    """
    real, fake = _both(real_logits, fake_logits)
    return _softplus(fake.mean() - real).mean() + _softplus(fake - real.mean()).mean()


def relativistic_average_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """E S(E r - f) + E S(r - E f): the discriminator's with real and fake exchanged (arXiv:1807.00734).

    Raises:
        ValueError: no ``real_logits``.
    """
    real, fake = _both(real_logits, fake_logits)
    return _softplus(real.mean() - fake).mean() + _softplus(real - fake.mean()).mean()


class AdversarialLosses(NamedTuple):
    """What :class:`AdversarialLoss` returns: 0-d tensors."""

    discriminator: Tensor
    generator: Tensor


class _DiscriminatorLoss(Protocol):
    def __call__(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor: ...


class _GeneratorLoss(Protocol):
    def __call__(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor: ...


class AdversarialLoss(nn.Module):
    """Base of the loss modules: a loss as an object, to be chosen once and passed around. Subclasses name its functions.

    Shapes: logits of any shape; losses ``()``. Raises what the functions raise (see :mod:`fuseblock.gan.losses`).

    Attributes:
        is_probability: whether ``sigmoid(logits)`` estimates the probability of being real.
        needs_real: whether :meth:`generator_loss` needs ``real_logits``.
    """

    _discriminator: ClassVar[_DiscriminatorLoss]
    _generator: ClassVar[_GeneratorLoss]
    is_probability: ClassVar[bool] = False
    needs_real: ClassVar[bool] = False

    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """What the discriminator minimises."""
        return type(self)._discriminator(real_logits, fake_logits)

    def generator_loss(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """What the generator minimises."""
        return type(self)._generator(fake_logits, real_logits)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> AdversarialLosses:
        """Both sides at once, for evaluation: training computes them from different graphs."""
        return AdversarialLosses(
            self.discriminator_loss(real_logits, fake_logits), self.generator_loss(fake_logits, real_logits)
        )


class MinimaxLoss(AdversarialLoss):
    """:func:`minimax_discriminator_loss` and :func:`minimax_generator_loss`."""

    _discriminator = staticmethod(minimax_discriminator_loss)
    _generator = staticmethod(minimax_generator_loss)
    is_probability = True


class NonSaturatingLoss(AdversarialLoss):
    """:func:`non_saturating_discriminator_loss` and :func:`non_saturating_generator_loss`."""

    _discriminator = staticmethod(non_saturating_discriminator_loss)
    _generator = staticmethod(non_saturating_generator_loss)
    is_probability = True


class LeastSquaresLoss(AdversarialLoss):
    """:func:`least_squares_discriminator_loss` and :func:`least_squares_generator_loss`."""

    _discriminator = staticmethod(least_squares_discriminator_loss)
    _generator = staticmethod(least_squares_generator_loss)


class HingeLoss(AdversarialLoss):
    """:func:`hinge_discriminator_loss` and :func:`hinge_generator_loss`."""

    _discriminator = staticmethod(hinge_discriminator_loss)
    _generator = staticmethod(hinge_generator_loss)


class WassersteinLoss(AdversarialLoss):
    """:func:`wasserstein_discriminator_loss` and :func:`wasserstein_generator_loss`."""

    _discriminator = staticmethod(wasserstein_discriminator_loss)
    _generator = staticmethod(wasserstein_generator_loss)


class RelativisticLoss(AdversarialLoss):
    """:func:`relativistic_discriminator_loss` and :func:`relativistic_generator_loss`."""

    _discriminator = staticmethod(relativistic_discriminator_loss)
    _generator = staticmethod(relativistic_generator_loss)
    needs_real = True


class RelativisticAverageLoss(AdversarialLoss):
    """:func:`relativistic_average_discriminator_loss` and :func:`relativistic_average_generator_loss`."""

    _discriminator = staticmethod(relativistic_average_discriminator_loss)
    _generator = staticmethod(relativistic_average_generator_loss)
    needs_real = True


#: The loss modules by name, for configuration files and command lines.
LOSSES: dict[str, type[AdversarialLoss]] = {
    "minimax": MinimaxLoss,
    "non-saturating": NonSaturatingLoss,
    "least-squares": LeastSquaresLoss,
    "hinge": HingeLoss,
    "wasserstein": WassersteinLoss,
    "relativistic": RelativisticLoss,
    "relativistic-average": RelativisticAverageLoss,
}
