"""Operator ``spectral_norm``: many weights, each divided by its largest singular value as the power method estimates it.

    spectral_norm(weights, us, vs, dims, n_power_iterations, eps) -> (ys, state)      us and vs are updated in place
    spectral_norm_bwd(dys, weights, state, dims) -> dws                               a dy or dw may be None

The equations are in `fuseblock.functional.spectral_norm`. Saved are the weights and the state: u, v, sigma of every weight,
one after the other, which every backward can take from every forward; of 16-bit weights it may be float32. Not a dispatcher
operator: tracers see the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _tables, dispatch
from .._library import KERNEL_DTYPES, backward_is_seen, forward_mode_active, opaque, wants_gradient
from ..dispatch import Candidate
from ..reference.spectral_norm import (
    Tensors,
    as_matrix,
    from_matrix,
    power_iteration,
    sigma_of,
    spectral_norm_bwd_reference,
    spectral_norm_reference,
    split_state,
)
from . import _candidates


def spectral_norm(
    weights: Tensors, us: Tensors, vs: Tensors, dims: list[int], n_power_iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """The weights, normalised.

    Raises:
        BackendError: a backend is forced that cannot run the call.
    """
    args = weights, us, vs, dims, n_power_iterations, eps
    forced = dispatch.forced()
    if forced == "reference" or (forced in ("auto", "aten") and _why_equations(weights)):
        iterate = _opaque_iteration if torch.compiler.is_compiling() else power_iteration
        return tuple(spectral_norm_reference(*args, iterate)[0])
    if wants_gradient(weights):
        return _Normalize.apply(us, vs, dims, n_power_iterations, eps, *weights)  # type: ignore[no-any-return]
    return tuple(dispatch.run("spectral_norm", args)[0])


def _why_equations(weights: Tensors) -> str | None:
    """The reason why autograd, or a tracer or transform, has to see the equations themselves, or None."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_mode_active():
        return "a compiler, a transform or forward mode needs PyTorch's operations"
    dtypes = {w.dtype for w in weights}.difference(KERNEL_DTYPES)
    return f"dtype {dtypes.pop()} is not one of float64, float32, float16, bfloat16" if dtypes else None


# Inductor would rather run small iterations again in backward than save u and v, but from the v that forward has updated.
_opaque_iteration = opaque(
    "spectral_power_iteration(Tensor matrix, Tensor v, int n_power_iterations, float eps) -> (Tensor, Tensor)",
    impl=power_iteration,
    fake=lambda matrix, v, n_power_iterations, eps: (
        matrix.new_empty(matrix.shape[0]),
        matrix.new_empty(matrix.shape[1]),
    ),
)


def _aten(
    weights: Tensors, us: Tensors, vs: Tensors, dims: list[int], n_power_iterations: int, eps: float
) -> tuple[list[Tensor], Tensor]:
    """By batched operators of PyTorch, on any device. us and vs are copied, since the next call updates them."""
    matrices = [as_matrix(w, dim) for w, dim in zip(weights, dims, strict=True)]
    if n_power_iterations:
        new_us, new_vs, sigmas = _power_method(matrices, vs, n_power_iterations, eps)
        torch._foreach_copy_(list(us), new_us)
        torch._foreach_copy_(list(vs), new_vs)
    else:
        sigmas = [sigma_of(m, u, v) for m, u, v in zip(matrices, us, vs, strict=True)]
    state = [x for u, v, sigma in zip(us, vs, sigmas, strict=True) for x in (u, v, sigma.view(1))]
    return list(torch._foreach_div(list(weights), sigmas)), torch.cat(state)


def _power_method(
    matrices: list[Tensor], vs: Tensors, n_power_iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New u, v and sigma; sigma without a third product, as u^T W v = <W^T u, v>."""
    new_vs: Tensors = vs
    for _ in range(n_power_iterations):
        new_us = _unit([torch.mv(m, v) for m, v in zip(matrices, new_vs, strict=True)], eps)
        images = [torch.mv(m.t(), u) for m, u in zip(matrices, new_us, strict=True)]
        new_vs = _unit(images, eps)
    return new_us, list(new_vs), [torch.dot(i, v) for i, v in zip(images, new_vs, strict=True)]


def _unit(vectors: list[Tensor], eps: float) -> list[Tensor]:
    norms = torch._foreach_norm(vectors)
    torch._foreach_clamp_min_(norms, eps)
    return list(torch._foreach_div(vectors, norms))


def _aten_bwd(
    dys: Sequence[Tensor | None], weights: Tensors, state: Tensor, dims: list[int]
) -> list[Tensor | None]:
    """In one pass over dy and W, one over dy and dW, and one to divide."""
    dws: list[Tensor | None] = []
    for dy, w, dim, (u, v, sigma) in zip(dys, weights, dims, split_state(state, weights, dims), strict=True):
        if dy is None:
            dws.append(None)
            continue
        g = as_matrix(dy, dim)
        inner = torch.dot(g.flatten(), as_matrix(w, dim).flatten())
        dws.append(from_matrix(torch.addr(g, u * (-inner / sigma), v).div_(sigma), w, dim))
    return dws


def _why_not_cpu(weights: Tensors, us: Tensors, vs: Tensors, *args: Any) -> str | None:
    return _why_not_dense((*weights, *us, *vs))


def _why_not_cpu_bwd(dys: Any, weights: Tensors, state: Tensor, *args: Any) -> str | None:
    return _why_not_dense((*weights, state))


def _why_not_dense(tensors: Tensors) -> str | None:
    dtype = tensors[0].dtype
    fit = all(x.dtype is dtype and x.is_contiguous() and x.device.type == "cpu" for x in tensors)
    if fit and dtype in (torch.float32, torch.float64):
        return None
    return "it takes contiguous tensors on a CPU, all float32 or all float64"


def _unseen(candidate: Candidate) -> Candidate:
    """The candidate for forward calls whose equations nobody has to see."""
    if candidate.run is None:
        return candidate

    def why_not(weights: Tensors, *args: Any) -> str | None:
        return _why_equations(weights) or candidate.why_not(weights, *args)

    return replace(candidate, why_not=why_not)


def _register() -> None:
    for op, batched, why_not_cpu, equations in (
        ("spectral_norm", _aten, _why_not_cpu, spectral_norm_reference),
        ("spectral_norm_bwd", _aten_bwd, _why_not_cpu_bwd, spectral_norm_bwd_reference),
    ):
        cpu = _candidates.compiled("cpu", op)
        found = (
            replace(cpu, why_not=why_not_cpu) if cpu.run else cpu,
            *_candidates.triton(op, "triton_spectral_norm"),
            Candidate("aten", batched, lambda *args: None),
        )
        unseen = map(_unseen, found) if op == "spectral_norm" else found
        dispatch.register(op, *unseen, _candidates.reference(equations))


def _key(weights: Tensors) -> _tables.Key:
    return (
        ("dtype", weights[0].dtype),
        ("layout", "contiguous" if all(w.is_contiguous() for w in weights) else "channels-last"),
        ("weights", len(weights)),
        ("elements", sum(w.numel() for w in weights)),
    )


def _forward_key(args: Sequence[Any]) -> _tables.Key:
    return *_key(args[0]), ("iterates", args[4] > 0)


def _backward_key(args: Sequence[Any]) -> _tables.Key:
    dys, weights, *_ = args
    return _key([w for dy, w in zip(dys, weights, strict=True) if dy is not None])


_register()
dispatch.measured("spectral_norm", dispatch.Question(0, _forward_key))
dispatch.measured("spectral_norm_bwd", dispatch.Question(1, _backward_key))


class _Normalize(torch.autograd.Function):
    """y = W / sigma of every weight as one node: sigma is a function of W, u and v are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        us: Tensors,
        vs: Tensors,
        dims: list[int],
        n_power_iterations: int,
        eps: float,
        *weights: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ys, state = dispatch.run("spectral_norm", (weights, us, vs, dims, n_power_iterations, eps))
        ctx.dims, ctx.forced = dims, dispatch.forced()
        ctx.save_for_backward(state, *weights)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        state, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        given = [dy if want else None for dy, want in zip(dys, wanted, strict=True)]
        args = given, weights, state, ctx.dims
        if all(dy is None for dy in given):
            dws = given
        elif backward_is_seen():
            dws = spectral_norm_bwd_reference(*args)
        else:
            with dispatch.backend(ctx.forced):
                dws = dispatch.run("spectral_norm_bwd", args)
        return (None,) * 5 + tuple(None if dy is None else dw for dy, dw in zip(given, dws, strict=True))
