"""Spectral normalisation of many weights in one call.

With W a weight as a matrix (its output channels first), u and v unit vectors kept from call to call:

    power iteration    u = W v / max(|W v|, eps),  v = W^T u / max(|W^T u|, eps)
    forward            sigma = u^T W v,  y = W / sigma
    backward           dW = (dy - <dy, W> / sigma u v^T) / sigma        (u and v are constants)

Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018; the derivative is its eq. 12.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext, dispatch
from .._library import KERNEL_DTYPES, backward_is_seen, forward_mode_active, opaque, wants_gradient

__all__ = ["spectral_norm"]

_Tensors = Sequence[Tensor]


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
            outside of compilers, transforms and forward mode; ``cuda`` has no kernels. (Unforced, what neither can run is
            left to batched PyTorch operations.)
    """
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
    if not weights:
        return ()
    dims = [dim % w.dim() for w, dim in zip(weights, dims, strict=True)]
    device = weights[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _normalized(weights, us, vs, dims, n_power_iterations, eps)
    return _normalized(weights, us, vs, dims, n_power_iterations, eps)


def _normalized(
    weights: _Tensors, us: _Tensors, vs: _Tensors, dims: list[int], n_power_iterations: int, eps: float
) -> tuple[Tensor, ...]:
    plain = _plain_equations(weights)
    kernels = _chosen(weights, us, vs, dims, plain)
    if plain:
        return _reference(weights, us, vs, dims, n_power_iterations, eps)
    if wants_gradient(weights):
        return _Normalize.apply(kernels, us, vs, dims, n_power_iterations, eps, *weights)  # type: ignore[no-any-return]
    return tuple(kernels.forward(weights, us, vs, dims, n_power_iterations, eps)[0])


def _plain_equations(weights: _Tensors) -> bool:
    """Whether autograd, or a tracer or transform, has to see the equations themselves."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_mode_active()
        or dispatch.forced() == "reference"
        or any(w.dtype not in KERNEL_DTYPES for w in weights)
    )


def _matrix(w: Tensor, dim: int) -> Tensor:
    return (w if dim == 0 else w.movedim(dim, 0)).flatten(1)


def _from_matrix(matrix: Tensor, like: Tensor, dim: int) -> Tensor:
    if dim == 0:
        return matrix.view(like.shape)
    sizes = like.shape[dim], *like.shape[:dim], *like.shape[dim + 1 :]
    return matrix.view(sizes).movedim(0, dim)


def _sigma(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.vdot(u, torch.mv(matrix, v))


def _reference(
    weights: _Tensors, us: _Tensors, vs: _Tensors, dims: list[int], n_power_iterations: int, eps: float
) -> tuple[Tensor, ...]:
    ys = []
    for w, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = _matrix(w, dim)
        with torch.no_grad():
            if n_power_iterations:
                iterate = _opaque_iteration if torch.compiler.is_compiling() else _plain_iteration
                new_u, new_v = iterate(matrix.detach(), v, n_power_iterations, eps)
                u.copy_(new_u)
                v.copy_(new_v)
            else:
                new_u, new_v = u.clone(), v.clone()
        ys.append(w / _sigma(matrix, new_u, new_v))
    return tuple(ys)


def _plain_iteration(matrix: Tensor, v: Tensor, n_power_iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """New u and v, from one iteration on."""
    for _ in range(n_power_iterations):
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
        v = F.normalize(torch.mv(matrix.mH, u), dim=0, eps=eps)
    return u, v


# Inductor would rather run small iterations again in backward than save u and v, but from the v that forward has updated.
_opaque_iteration = opaque(
    "spectral_power_iteration(Tensor matrix, Tensor v, int n_power_iterations, float eps) -> (Tensor, Tensor)",
    impl=_plain_iteration,
    fake=lambda matrix, v, n_power_iterations, eps: (
        matrix.new_empty(matrix.shape[0]),
        matrix.new_empty(matrix.shape[1]),
    ),
)


class _Kernels(NamedTuple):
    """Forward: ys, and u, v, sigma of every weight one after the other as one tensor, which backward is given.

    Of 16-bit weights it may be float32.
    """

    forward: Callable[..., tuple[list[Tensor], Tensor]]
    backward: Callable[..., list[Tensor | None]]


def _forward(
    weights: _Tensors, us: _Tensors, vs: _Tensors, dims: list[int], n_power_iterations: int, eps: float
) -> tuple[list[Tensor], Tensor]:
    """By PyTorch's operators, on any device. us and vs are copied, since the next call updates them."""
    matrices = [_matrix(w, dim) for w, dim in zip(weights, dims, strict=True)]
    if n_power_iterations:
        new_us, new_vs, sigmas = _power_method(matrices, vs, n_power_iterations, eps)
        torch._foreach_copy_(list(us), new_us)
        torch._foreach_copy_(list(vs), new_vs)
    else:
        sigmas = [_sigma(m, u, v) for m, u, v in zip(matrices, us, vs, strict=True)]
    state = [x for u, v, sigma in zip(us, vs, sigmas, strict=True) for x in (u, v, sigma.view(1))]
    return list(torch._foreach_div(list(weights), sigmas)), torch.cat(state)


def _power_method(
    matrices: list[Tensor], vs: _Tensors, n_power_iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New u, v and sigma; sigma without a third product, as u^T W v = <W^T u, v>."""
    new_vs: Sequence[Tensor] = vs
    for _ in range(n_power_iterations):
        new_us = _unit([torch.mv(m, v) for m, v in zip(matrices, new_vs, strict=True)], eps)
        images = [torch.mv(m.t(), u) for m, u in zip(matrices, new_us, strict=True)]
        new_vs = _unit(images, eps)
    return new_us, list(new_vs), [torch.dot(i, v) for i, v in zip(images, new_vs, strict=True)]


def _unit(vectors: list[Tensor], eps: float) -> list[Tensor]:
    norms = torch._foreach_norm(vectors)
    torch._foreach_clamp_min_(norms, eps)
    return list(torch._foreach_div(vectors, norms))


def _split(state: Tensor, weights: _Tensors, dims: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(u, v, sigma) of every weight."""
    sizes = [n for w, d in zip(weights, dims, strict=True) for n in (w.shape[d], w.numel() // w.shape[d], 1)]
    parts = state.split(sizes)
    return [(parts[k], parts[k + 1], parts[k + 2].squeeze(0)) for k in range(0, len(parts), 3)]


def _backward(
    dys: list[Tensor | None], weights: _Tensors, state: Tensor, dims: list[int]
) -> list[Tensor | None]:
    """In one pass over dy and W, one over dy and dW, and one to divide."""
    dws: list[Tensor | None] = []
    for dy, w, dim, (u, v, sigma) in zip(dys, weights, dims, _split(state, weights, dims), strict=True):
        if dy is None:
            dws.append(None)
            continue
        g = _matrix(dy, dim)
        inner = torch.dot(g.flatten(), _matrix(w, dim).flatten())
        dws.append(_from_matrix(torch.addr(g, u * (-inner / sigma), v).div_(sigma), w, dim))
    return dws


def _recorded_backward(
    dys: list[Tensor | None], weights: _Tensors, state: Tensor, dims: list[int]
) -> list[Tensor | None]:
    """The same as a function of dy and W that autograd differentiates."""
    dws: list[Tensor | None] = []
    for dy, w, dim, (u, v, _) in zip(dys, weights, dims, _split(state, weights, dims), strict=True):
        if dy is None:
            dws.append(None)
            continue
        matrix, g, u, v = _matrix(w, dim), _matrix(dy, dim), u.to(w.dtype), v.to(w.dtype)
        sigma = _sigma(matrix, u, v)
        dws.append(_from_matrix((g - (g * matrix).sum() / sigma * torch.outer(u, v)) / sigma, w, dim))
    return dws


_ATEN = _Kernels(_forward, _backward)
_CPU = (
    _Kernels(torch.ops.fuseblock_cpu.spectral_norm.default, torch.ops.fuseblock_cpu.spectral_norm_bwd.default)
    if _ext.has("fuseblock_cpu", "spectral_norm")
    else None
)


def _triton_kernels() -> tuple[_Kernels | None, Callable[..., str | None]]:
    if importlib.util.find_spec("triton") is None:
        return None, lambda *args: "triton is not installed"
    from ..launch import triton_spectral_norm

    return _Kernels(triton_spectral_norm.forward, triton_spectral_norm.backward), triton_spectral_norm.why_not


_TRITON, _why_not_triton = _triton_kernels()


def _chosen(weights: _Tensors, us: _Tensors, vs: _Tensors, dims: list[int], plain: bool) -> _Kernels:
    """Compiled kernels where they serve, PyTorch's operators elsewhere.

    Raises:
        BackendError: a backend is forced that cannot run the call.
    """
    name = dispatch.forced()
    if name not in ("auto", "cpu", "cuda", "triton") or (name == "auto" and plain):
        return _ATEN
    if name == "auto":
        name = "triton" if weights[0].is_cuda else "cpu"
        kernels, reason = _backend(name, weights, us, vs, dims)
        return kernels if kernels is not None and reason is None else _ATEN
    kernels, reason = _backend(name, weights, us, vs, dims)
    if reason is None and plain:
        reason = "a compiler, a transform or forward mode needs PyTorch's operations"
    if kernels is None or reason is not None:
        raise dispatch.BackendError(f"no backend can run spectral_norm (asked for {name}): {reason}")
    return kernels


def _backend(
    name: str, weights: _Tensors, us: _Tensors, vs: _Tensors, dims: list[int]
) -> tuple[_Kernels | None, str | None]:
    """A backend's kernels, and the reason why they cannot run, or None."""
    if name == "cpu":
        return _CPU, _why_not_cpu(weights, us, vs)
    if name == "triton":
        return _TRITON, _why_not_triton(weights, us, vs, dims)
    return None, "not implemented"


def _why_not_cpu(weights: _Tensors, us: _Tensors, vs: _Tensors) -> str | None:
    """The reason why the compiled kernels cannot run, or None."""
    if _CPU is None:
        return _ext.why_not
    dtype = weights[0].dtype
    fit = all(x.dtype is dtype and x.is_contiguous() and x.device.type == "cpu" for x in (*weights, *us, *vs))
    if fit and dtype in (torch.float32, torch.float64):
        return None
    return "it takes contiguous tensors on a CPU, all float32 or all float64"


class _Normalize(torch.autograd.Function):
    """y = W / sigma of every weight as one node: sigma is a function of W, u and v are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: _Kernels,
        us: _Tensors,
        vs: _Tensors,
        dims: list[int],
        n_power_iterations: int,
        eps: float,
        *weights: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ys, state = kernels.forward(weights, us, vs, dims, n_power_iterations, eps)
        ctx.kernels, ctx.dims = kernels, dims
        ctx.save_for_backward(state, *weights)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        state, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        given = [dy if need else None for dy, need in zip(dys, needed, strict=True)]
        backward = _recorded_backward if backward_is_seen() else ctx.kernels.backward
        dws = backward(given, weights, state, ctx.dims)
        return (None,) * 6 + tuple(None if dy is None else dw for dy, dw in zip(given, dws, strict=True))
