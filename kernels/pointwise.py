"""Activations of the convolution blocks on float32 and float64 tiles, with first and second derivatives.

ACT is the number of python/fuseblock/_activations.py, and SLOPE the factor of negative arguments: a constexpr for
leaky_relu (a float argument of a kernel would be float32), a tile or scalar for prelu, ignored otherwise.

    identity z    relu max(z, 0)    leaky_relu, prelu max(z, 0) + a min(z, 0)
    silu z sigmoid(z)    tanh    elu max(z, 0) + expm1(min(z, 0))

As in PyTorch, the derivative at z = 0 is that of the negative side, and the second derivative there is 0 for elu. NaN
travels.
"""

import triton
import triton.language as tl

from .activations import sigmoid, tanh

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
PRELU = tl.constexpr(3)
SILU = tl.constexpr(4)
TANH = tl.constexpr(5)
ELU = tl.constexpr(6)


@triton.jit
def expm1_negative(z):
    """exp(z) - 1 for z <= 0, with a small relative error; something else, but no NaN, for z > 0."""
    # (e^z - 1) = 2t / (1 - t) with t = tanh(z / 2), whose relative error is small.
    t = tanh(0.5 * tl.where(z > 0, 0.0, z))
    return 2.0 * t / (1.0 - t)


@triton.jit
def act(z, SLOPE, ACT: tl.constexpr):
    """The activation of z."""
    if ACT == RELU:
        result = tl.where(z <= 0, 0.0, z)
    elif ACT == LEAKY_RELU or ACT == PRELU:  # noqa: SIM109 (Triton has no "in")
        result = tl.where(z > 0, z, SLOPE * z)
    elif ACT == SILU:
        result = z * sigmoid(z)
    elif ACT == TANH:
        result = tanh(z)
    elif ACT == ELU:
        result = tl.where(z > 0, z, expm1_negative(z))
    else:
        result = z
    return result


@triton.jit
def is_positive(z, ACT: tl.constexpr):
    """The one bit of z that the derivative of a piecewise linear activation needs; a NaN passes gradients of relu."""
    if ACT == RELU:
        return (z > 0) | (z != z)
    else:
        return z > 0


@triton.jit
def act_grad_of_sign(positive, SLOPE, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """The derivative of a piecewise linear activation, from `is_positive`."""
    one = tl.full(positive.shape, 1.0, DTYPE)
    if ACT == RELU:
        result = tl.where(positive, one, 0.0)
    elif ACT == LEAKY_RELU or ACT == PRELU:  # noqa: SIM109 (Triton has no "in")
        result = tl.where(positive, one, one * SLOPE)
    else:
        result = one
    return result


@triton.jit
def act_grad(z, SLOPE, ACT: tl.constexpr):
    """The derivative at z."""
    if ACT == SILU:
        s = sigmoid(z)
        result = s * (1.0 + z * (1.0 - s))
    elif ACT == TANH:
        t = tanh(z)
        result = 1.0 - t * t
    elif ACT == ELU:
        result = tl.where(z > 0, 1.0, tl.exp(tl.where(z > 0, 0.0, z)))
    else:
        result = act_grad_of_sign(is_positive(z, ACT), SLOPE, ACT, z.dtype)
    return result


@triton.jit
def act_grad_grad(z, ACT: tl.constexpr):
    """The second derivative at z; zero for piecewise linear activations."""
    if ACT == SILU:
        s = sigmoid(z)
        result = s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    elif ACT == TANH:
        t = tanh(z)
        result = -2.0 * t * (1.0 - t * t)
    elif ACT == ELU:
        result = tl.where(z >= 0, 0.0, tl.exp(tl.where(z > 0, 0.0, z)))
    else:
        result = tl.zeros(z.shape, z.dtype)
    return result
