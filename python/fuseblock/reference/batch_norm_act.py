"""Batch normalisation with an optional residual and an activation.

    xhat = (x - mean) / sqrt(var + eps)      mean, var over all dimensions but the channels', var biased
    y    = act(weight xhat + bias + residual)

Source: Ioffe and Szegedy 2015. With a process group, the batch is that of all its ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._activations import activate
from .._library import state_dtype
from .._ranks import process_group
from ._adjoint import adjoint


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """(C,) or (1,) as what broadcasts against x (N, C, ...), in the dtype of the statistics."""
    return value.to(state_dtype(x.dtype)).reshape(1, -1, *(1,) * (x.dim() - 2))


def _sum(value: Tensor) -> Tensor:
    return value.sum([d for d in range(value.dim()) if d != 1])


def _over_ranks(value: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a process group, differentiable any number of times."""
    if not group:
        return value
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value.contiguous(), group=process_group(group))  # type: ignore[no-any-return, no-untyped-call]


def _statistics(x: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, number of values) per channel of x, which has the dtype of the statistics."""
    count = _over_ranks(x.new_full((), x.numel() // max(x.shape[1], 1)), group)
    mean = _over_ranks(_sum(x), group) / count
    deviation = x - _per_channel(mean, x)
    return mean, _over_ranks(_sum(deviation * deviation), group) / count, count


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    z = xhat if weight is None else xhat * _per_channel(weight, xhat)
    z = z if bias is None else z + _per_channel(bias, xhat)
    return z if residual is None else z + residual.to(z.dtype)


def pack_signs(z: Tensor) -> Tensor:
    """One bit per element of a dense tensor, in the order of memory, the lowest first: whether it is positive."""
    ordered = z if z.is_contiguous() else z.movedim(1, -1)
    bits = torch.nn.functional.pad((ordered > 0).flatten(), (0, -z.numel() % 8)).view(-1, 8)
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=z.device)).sum(
        1, dtype=torch.uint8
    )


def unpack_signs(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack_signs`: a boolean tensor of the shape and layout of ``like``."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten()[: like.numel()].bool()
    if like.is_contiguous():
        return bits.view(like.shape)
    return bits.view(like.movedim(1, -1).shape).movedim(-1, 1)


def batch_norm_act_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, var, invstd, count, mask), see ``ops/batch_norm_act.py``. In training the batch's statistics are used."""
    wide = x.to(state_dtype(x.dtype))
    if training:
        mean, var, count = _statistics(wide, group)
    else:
        assert mean is not None
        assert var is not None
        mean, var, count = mean.to(wide.dtype, copy=True), var.to(wide.dtype, copy=True), wide.new_zeros(())
    invstd = (var + eps).rsqrt()
    xhat = (wide - _per_channel(mean, x)) * _per_channel(invstd, x)
    z = _affine(xhat, weight, bias, residual)
    y = activate(z, activation, negative_slope, None if slope is None else _per_channel(slope, x)).to(x.dtype)
    masked = save and residual is not None and activation in ("relu", "leaky_relu")
    mask = pack_signs(z.detach()) if masked else x.new_empty(0, dtype=torch.uint8)
    return y, mean, var, invstd, count, mask


def _derivative(z: Tensor, activation: str, negative_slope: float, slope: Tensor | None) -> Tensor:
    """act'(z) in differentiable operations."""
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "tanh":
        t = torch.tanh(z)
        return 1 - t * t
    one = torch.ones_like(z)
    if activation == "identity":
        return one
    if activation == "elu":
        return torch.where(z > 0, one, torch.exp(torch.where(z > 0, 0, z)))
    factor: Tensor | float = negative_slope if activation == "leaky_relu" else 0.0
    if slope is not None:
        factor = slope
    return torch.where(z > 0, one, one * factor)


def batch_norm_act_bwd_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dslope, dresidual) of `batch_norm_act_reference`; what there is not is empty.

    In training the statistics are computed again, so that derivatives go through them.
    """
    wide = x.to(state_dtype(x.dtype))
    if training:
        mean, var, count = _statistics(wide, group)
        invstd = (var + eps).rsqrt()
    xhat = (wide - _per_channel(mean, x)) * _per_channel(invstd, x)
    if mask is not None:
        z = torch.where(unpack_signs(mask, x), 1.0, -1.0).to(
            wide.dtype
        )  # its sign is all that is asked of it
    else:
        z = _affine(xhat, weight, bias, residual)
    grad = dy.to(wide.dtype)
    g = grad * _derivative(z, activation, negative_slope, None if slope is None else _per_channel(slope, x))
    dbias, dweight = _sum(g), _sum(g * xhat)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    if training:
        inner = g - _per_channel(_over_ranks(dbias, group) / count, x)
        inner = inner - xhat * _per_channel(_over_ranks(dweight, group) / count, x)
    else:
        inner = g
    dx = (_per_channel(scale, x) * inner).to(x.dtype) if want_dx else x.new_empty(0)
    dslope = wide.new_empty(0)
    if slope is not None and want_sums:
        dslope = _sum(grad * torch.where(z > 0, 0, z))
        dslope = (dslope if slope.shape == dslope.shape else dslope.sum(0, keepdim=True)).to(slope.dtype)
    return (
        dx,
        dweight.to(weight.dtype) if weight is not None and want_sums else wide.new_empty(0),
        dbias.to(bias.dtype) if bias is not None and want_sums else wide.new_empty(0),
        dslope,
        g.to(x.dtype) if want_dresidual else x.new_empty(0),
    )


def batch_norm_act_bwd_bwd_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(a_dy, a_x, a_weight, a_bias, a_residual, a_slope): adjoint of `batch_norm_act_bwd_reference`; empty if absent."""
    given = [dy, x, weight, bias, residual, slope]
    present = [n for n, t in enumerate(given) if t is not None]

    def backward(*leaves: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = [None] * len(given)
        for n, leaf in zip(present, leaves, strict=True):
            full[n] = leaf
        grad, data = full[:2]
        assert grad is not None
        assert data is not None
        saved = full[2], full[3], full[4], full[5], mean, invstd, count, mask
        options = activation, negative_slope, training, group, eps
        return batch_norm_act_bwd_reference(grad, data, *saved, *options, True, True, v_dresidual is not None)

    cotangents = (
        v_dx,
        None if weight is None else v_dweight,
        None if bias is None else v_dbias,
        None if slope is None else v_dslope,
        v_dresidual,
    )
    found = iter(adjoint(backward, [t for t in given if t is not None], cotangents))
    a_dy, a_x, a_weight, a_bias, a_residual, a_slope = (
        mean.new_empty(0) if t is None else next(found) for t in given
    )
    if activation in ("identity", "relu", "leaky_relu"):  # zeros
        a_bias, a_residual = a_bias.new_empty(0), x.new_empty(0)
    elif residual is None:
        a_residual = x.new_empty(0)
    return a_dy, a_x, a_weight, a_bias, a_residual, a_slope
