"""The activations of the convolution blocks: names, numbers shared with the kernels, equations.

    identity    z                       relu        max(z, 0)
    leaky_relu  max(z, 0) + a min(z, 0) prelu       the same with a learned slope a per channel, or one for all
    silu        z sigmoid(z)            tanh        tanh(z)
    elu         max(z, 0) + expm1(min(z, 0))

The derivative at z = 0 is that of the negative side, as in PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: In the order of ``enum class Activation`` of csrc/math/pointwise.h and of the constants of kernels/pointwise.py.
NAMES = ("identity", "relu", "leaky_relu", "prelu", "silu", "tanh", "elu")

#: Their second derivative is zero; the sign of z is all that a derivative needs.
PIECEWISE_LINEAR = frozenset({"identity", "relu", "leaky_relu", "prelu"})


def number(name: str) -> int:
    """The number by which kernels know the activation."""
    return NAMES.index(name)


def check_activation(op: str, name: str, slope: Tensor | None, channels: int) -> None:
    """Raise ValueError unless ``name`` is known and ``slope`` is given for prelu alone, (C,) or (1,)."""
    if name not in NAMES:
        raise ValueError(f"{op}: expected an activation among {', '.join(NAMES)}, got {name!r}")
    if (slope is not None) != (name == "prelu"):
        raise ValueError(f"{op}: slope belongs to activation 'prelu' and to no other, got {name!r}")
    if slope is not None and tuple(slope.shape) not in ((1,), (channels,)):
        raise ValueError(f"{op}: expected slope of shape (1,) or ({channels},), got {tuple(slope.shape)}")


def activate(z: Tensor, name: str, negative_slope: float = 0.01, slope: Tensor | None = None) -> Tensor:
    """The activation in plain PyTorch; ``slope`` must broadcast against ``z``."""
    if name == "identity":
        return z
    if name == "relu":
        return F.relu(z)
    if name == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if name == "prelu":
        assert slope is not None
        return torch.where(z > 0, z, slope * z)
    if name == "silu":
        return F.silu(z)
    return torch.tanh(z) if name == "tanh" else F.elu(z)
