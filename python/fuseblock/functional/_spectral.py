"""Spectral normalisation of many weights in one call.

With W a weight as a matrix (its output channels first), u and v unit vectors kept from call to call:

    power iteration    u = W v / max(|W v|, eps),  v = W^T u / max(|W^T u|, eps)
    forward            sigma = u^T W v,  y = W / sigma
    backward           dW = (dy - <dy, W> / sigma u v^T) / sigma        (u and v are constants)

Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018; the derivative is its eq. 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.spectral_norm import spectral_norm as normalize

__all__ = ["spectral_norm"]


def spectral_norm(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    dims: Sequence[int] | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> tuple[Tensor, ...]:
    """Every weight divided by its largest singular value, as estimated by the power method.

        u = W v / max(|W v|, eps),  v = W^T u / max(|W^T u|, eps)  (``n_power_iterations`` times)
        y = W / (u^T W v)

    W is a weight as a matrix of shape (n_out, n_in): dimension ``dim`` first, the others flattened.

    Args:
        weights: tensors of two or more dimensions, real or complex.
        us: (n_out,) each. vs: (n_in,) each. Unit vectors, **updated in place**; the graph does not refer to them, so that
            two calls before one backward are right.
        dims: where the output channels of each weight are; None: dimension 0 of all.
        n_power_iterations: 0 leaves ``us`` and ``vs`` as they are (evaluation).
        eps: smallest norm that is divided by in the power method.

    Returns:
        As many tensors, of the shapes, dtypes and memory formats of ``weights``. Differentiable in ``weights``, any
        number of times, with u and v as constants.

    Raises:
        ValueError: the numbers of tensors differ, a shape, device or dim does not fit, ``n_power_iterations`` is negative.
        TypeError: integer weights. fuseblock.BackendError: the forced backend cannot run the call: ``cpu`` takes contiguous
            float32 or float64 tensors on a CPU, ``triton`` contiguous or channels-last weights of one dtype on a GPU, both
            outside of compilers, transforms and forward mode; ``cuda`` has no kernels. (Unforced, ``aten``, batched PyTorch
            operations, takes what neither can run and where a table of measurements says so.)
    """
    args = arguments(weights, us, vs, dims=dims, n_power_iterations=n_power_iterations, eps=eps)
    if not weights:
        return ()
    device = weights[0].device.type
    # Not `torch.amp.is_autocast_available`, which dynamo of torch 2.11 does not know; "meta" has no autocast.
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return normalize(*args)
    return normalize(*args)


def arguments(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    dims: Sequence[int] | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], list[int], int, float]:
    """Those of the operator, checked: errors as in `spectral_norm`."""
    dims = [0] * len(weights) if dims is None else list(dims)
    if not len(weights) == len(us) == len(vs) == len(dims):
        raise ValueError(
            "spectral_norm: expected as many us, vs and dims as weights, "
            f"got {len(weights)} weights, {len(us)} us, {len(vs)} vs, {len(dims)} dims"
        )
    if n_power_iterations < 0:
        raise ValueError(f"spectral_norm: expected n_power_iterations >= 0, got {n_power_iterations}")
    for w, u, v, dim in zip(weights, us, vs, dims, strict=True):
        if not (w.is_floating_point() or w.is_complex()):
            raise TypeError(f"spectral_norm: expected floating point or complex weights, got {w.dtype}")
        if not weights[0].device == w.device == u.device == v.device:
            raise ValueError(
                f"spectral_norm: expected weights, us and vs on {weights[0].device}, as the first weight, "
                f"got {w.device}, {u.device}, {v.device}"
            )
        if w.dim() >= 2 and not -w.dim() <= dim < w.dim():
            raise ValueError(f"spectral_norm: expected dim to be one of the {w.dim()} of a weight, got {dim}")
        if w.dim() < 2 or u.shape != (w.shape[dim],) or u.numel() * v.numel() != w.numel() or v.dim() != 1:
            raise ValueError(
                "spectral_norm: expected a weight of two or more dimensions, u of its output channels, v of the rest, "
                f"got {tuple(w.shape)}, {tuple(u.shape)}, {tuple(v.shape)}, dim {dim}"
            )
    whole = [dim % w.dim() for w, dim in zip(weights, dims, strict=True)]
    return weights, us, vs, whole, n_power_iterations, eps
