"""Host side of the CPU kernels in csrc/cpu/batch_norm_act_kernels.h.

Without a process group one call does sums, coefficients and results (channels of a contiguous tensor then come out of the
cache the second time); with one, this module is the kernel namespace of the driver (`batch_norm_act.Kernels`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .._activations import number
from .._library import KERNEL_DTYPES
from ..dispatch import Candidate
from .batch_norm_act import DRIVERS, Kernels, Site, dense, dense_like, is_masked

_OPS = torch.ops.fuseblock_cpu


def why_not(*args: Any) -> str | None:
    """The reason why an operator of the family batch_norm_act cannot run these arguments, or None."""
    x = next(a for a in args if isinstance(a, Tensor))
    if x.device.type != "cpu":
        return f"tensors are on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not one of float64, float32, float16, bfloat16"
    return None


def candidates(op: str) -> tuple[Candidate, ...]:
    """How C++ can run ``op``, a member of the family batch_norm_act."""
    return (Candidate("cpu", _RUN[op], why_not, devices=("cpu",)),)


def _site(site: Site) -> tuple[Any, ...]:
    affine = site.mean, site.invstd, site.weight, site.bias, site.residual, site.mask, site.slope
    return (*affine, site.activation, site.negative_slope)


def stats(x: Tensor, per_sample: bool = False) -> Tensor:
    """See `batch_norm_act.Kernels.stats`."""
    assert not per_sample
    return cast(Tensor, _OPS.batch_norm_act_stats.default(x))


def fwd_apply(site: Site, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    """See `batch_norm_act.Kernels.fwd_apply`."""
    y, mask = _OPS.batch_norm_act_fwd_apply.default(site.x, *_site(site), want_mask)
    return y, mask if want_mask else None


def bwd_reduce(dy: Tensor, site: Site) -> Tensor:
    """See `batch_norm_act.Kernels.bwd_reduce`."""
    return cast(Tensor, _OPS.batch_norm_act_bwd_reduce.default(dy, site.x, *_site(site)))


def bwd_apply(dy: Tensor, site: Site, k: Tensor, want_dresidual: bool) -> tuple[Tensor, Tensor | None]:
    """See `batch_norm_act.Kernels.bwd_apply`."""
    dx, g = _OPS.batch_norm_act_bwd_apply.default(dy, site.x, *_site(site), k, want_dresidual)
    return dx, g if want_dresidual else None


def bwd_bwd_reduce(v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site) -> Tensor:
    """See `batch_norm_act.Kernels.bwd_bwd_reduce`."""
    args = v, v_residual, dy, site.x, *_site(site)
    return cast(Tensor, _OPS.batch_norm_act_bwd_bwd_reduce.default(*args))


def bwd_bwd_apply(
    v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site, k: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `batch_norm_act.Kernels.bwd_bwd_apply`."""
    args = v, v_residual, dy, site.x, *_site(site), k
    a_x, a_dy, a_residual = _OPS.batch_norm_act_bwd_bwd_apply.default(*args)
    return a_x, a_dy, a_residual if a_residual.dim() > 1 else None


_KERNELS = cast(Kernels, sys.modules[__name__])


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    training: bool,
    group: str,
    save: bool,
    per_sample: bool = False,
) -> Any:
    """``batch_norm_act``; see ``ops/batch_norm_act.py``."""
    if training and group:
        args = (
            weight,
            bias,
            residual,
            slope,
            mean,
            var,
            eps,
            activation,
            negative_slope,
            training,
            group,
            save,
        )
        return DRIVERS["batch_norm_act"](_KERNELS, x, *args)
    x = dense(x)
    masked = save and residual is not None and is_masked(activation)
    return _OPS.batch_norm_act.default(
        x,
        weight,
        bias,
        dense_like(residual, x),
        slope,
        mean,
        var,
        None,
        None,
        0.0,
        eps,
        number(activation),
        negative_slope,
        training,
        masked,
        per_sample,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    training: bool,
    group: str,
    eps: float,
    want_dx: bool,
    want_sums: bool,
    want_dresidual: bool,
    per_sample: bool = False,
) -> Any:
    """``batch_norm_act_bwd``; see ``ops/batch_norm_act.py``."""
    if training and group:
        saved = x, weight, bias, residual, slope, mean, invstd, count, mask
        options = activation, negative_slope, training, group, eps, want_dx, want_sums, want_dresidual
        return DRIVERS["batch_norm_act_bwd"](_KERNELS, dy, *saved, *options)
    x = dense(x)
    kept = None if mask is not None else dense_like(residual, x)
    site = mean, invstd, weight, bias, kept, mask, slope, number(activation), negative_slope
    wants = want_dx, want_sums, want_dresidual
    return _OPS.batch_norm_act_bwd.default(dense_like(dy, x), x, *site, training, *wants, per_sample)


def second_order(
    v_dx: Tensor | None,
    v_dweight: Tensor | None,
    v_dbias: Tensor | None,
    v_dslope: Tensor | None,
    v_dresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    training: bool,
    group: str,
    eps: float,
    per_sample: bool = False,
) -> Any:
    """``batch_norm_act_bwd_bwd``; see ``ops/batch_norm_act.py``."""
    if training and group:
        v = v_dx, v_dweight, v_dbias, v_dslope, v_dresidual
        saved = x, weight, bias, residual, slope, mean, invstd, count, mask
        options = activation, negative_slope, training, group, eps
        return DRIVERS["batch_norm_act_bwd_bwd"](_KERNELS, *v, dy, *saved, *options)
    x = dense(x)
    kept = None if mask is not None else dense_like(residual, x)
    v_x, v_r = dense_like(v_dx, x), dense_like(v_dresidual, x)
    site = mean, invstd, weight, bias, kept, mask, slope, number(activation), negative_slope
    return _OPS.batch_norm_act_bwd_bwd.default(
        v_x, v_dweight, v_dbias, v_dslope, v_r, dense_like(dy, x), x, *site, training, per_sample
    )


_RUN: dict[str, Callable[..., Any]] = {
    "batch_norm_act": forward,
    "batch_norm_act_bwd": backward,
    "batch_norm_act_bwd_bwd": second_order,
}
