"""Spectral normalisation in plain PyTorch: the oracle, and what tracers and transforms see; any order of gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Sequence[Tensor]
#: New u and v from a matrix, v, the number of iterations and eps.
Iteration = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


def as_matrix(w: Tensor, dim: int) -> Tensor:
    """A weight as a matrix: dimension ``dim`` first, the others flattened."""
    return (w if dim == 0 else w.movedim(dim, 0)).flatten(1)


def from_matrix(matrix: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse of `as_matrix`."""
    if dim == 0:
        return matrix.view(like.shape)
    sizes = like.shape[dim], *like.shape[:dim], *like.shape[dim + 1 :]
    return matrix.view(sizes).movedim(0, dim)


def sigma_of(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """u^H W v."""
    return torch.vdot(u, torch.mv(matrix, v))


def split_state(state: Tensor, weights: Tensors, dims: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(u, v, sigma) of every weight, in its dtype."""
    sizes = [n for w, d in zip(weights, dims, strict=True) for n in (w.shape[d], w.numel() // w.shape[d], 1)]
    parts = iter(state.split(sizes))
    return [(next(parts).to(w.dtype), next(parts).to(w.dtype), next(parts).to(w.dtype)[0]) for w in weights]


def power_iteration(matrix: Tensor, v: Tensor, n_power_iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """New u and v, from one iteration on."""
    for _ in range(n_power_iterations):
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
        v = F.normalize(torch.mv(matrix.mH, u), dim=0, eps=eps)
    return u, v


def spectral_norm_reference(
    weights: Tensors,
    us: Tensors,
    vs: Tensors,
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    iterate: Iteration = power_iteration,
) -> tuple[list[Tensor], Tensor]:
    """Op `spectral_norm`."""
    ys, state = [], []
    for w, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = as_matrix(w, dim)
        with torch.no_grad():
            if n_power_iterations:
                new_u, new_v = iterate(matrix.detach(), v, n_power_iterations, eps)
                u.copy_(new_u)
                v.copy_(new_v)
            else:
                new_u, new_v = u.clone(), v.clone()
        sigma = sigma_of(matrix, new_u, new_v)
        ys.append(w / sigma)
        state += [new_u, new_v, sigma.detach().view(1)]
    return ys, torch.cat(state)


def spectral_norm_bwd_reference(
    dys: Sequence[Tensor | None], weights: Tensors, state: Tensor, dims: Sequence[int]
) -> list[Tensor | None]:
    """Op `spectral_norm_bwd`, as a function of dys and weights that autograd differentiates."""
    dws: list[Tensor | None] = []
    for dy, w, dim, (u, v, _) in zip(dys, weights, dims, split_state(state, weights, dims), strict=True):
        if dy is None:
            dws.append(None)
            continue
        matrix, g = as_matrix(w, dim), as_matrix(dy, dim)
        sigma = sigma_of(matrix, u, v)
        dws.append(from_matrix((g - (g * matrix).sum() / sigma * torch.outer(u, v)) / sigma, w, dim))
    return dws
