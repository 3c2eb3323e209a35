"""Drives the six kernels of ``batch_norm_act`` of any backend: coefficients from sums, and what is summed over ranks.

    forward    stats -> all-gather -> fwd_apply
    backward   bwd_reduce: S1 = sum G, S2 = sum G xhat -> all-reduce -> bwd_apply: dx = k0 G + k1 + k2 xhat
    second     bwd_bwd_reduce: up to 12 sums -> all-reduce -> bwd_bwd_apply:
               q = k0 V + k1 + k2 xhat + v_r;   a_dy = q act'(z) + k3 min(z, 0);
               a_z = h q (smooth), k3 h (prelu), 0;   a_x = k4 V + k5 G + k6 a_z + k7 + k8 xhat

with z = w xhat + b + r, G = dy act'(z), h = dy act''(z) (prelu: dy [z <= 0]), V and v_r the cotangents of dx and dresidual.
The means of a_x's terms over the batch follow from the sums, so one pass for sums and one for results are enough.

Instance norm (``per_sample``) is the same with the channels of every sample in the place of channels: what is (C,) or (k, C)
then is (N C,) or (k, N C), the channels of one sample behind those of the sample before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .._activations import PIECEWISE_LINEAR, number
from .._library import state_dtype
from .._ranks import process_group


@dataclass(frozen=True)
class Site:
    """What describes one normalisation to the kernels.

    Attributes:
        x: (N, C, ...), contiguous or channels-last; every tensor of its shape has its strides.
        mean, invstd, weight, bias: (C,) in the dtype of the statistics; weight and bias may be absent.
        residual: like x, or None: there is none, or ``mask`` says what is needed of it.
        mask: uint8, a bit per element in memory order, the lowest first: whether z > 0; or None.
        slope: of prelu, (C,) or (1,), in the dtype of the statistics.
        activation: its number in `fuseblock._activations`.
        negative_slope: of leaky_relu.
        per_sample: the channels of every sample are channels of their own. There is no residual then.
    """

    x: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    slope: Tensor | None
    activation: int
    negative_slope: float
    per_sample: bool = False


class Kernels(Protocol):
    """The kernels of one backend. Sums and coefficients are (k, C) in the dtype of the statistics.

    Statistics per sample are not asked of ``cpu``, which does them in its fused calls.
    """

    def stats(self, x: Tensor, per_sample: bool = False) -> Tensor:
        """(2, C): mean and sum of squared deviations; zeros of nothing."""

    def fwd_apply(self, site: Site, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """(y, mask)."""

    def bwd_reduce(self, dy: Tensor, site: Site) -> Tensor:
        """(2, C): sums of G and G xhat; for prelu (3, C), with that of dy min(z, 0)."""

    def bwd_apply(
        self, dy: Tensor, site: Site, k: Tensor, want_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(dx, dresidual = G) of coefficients (3, C)."""

    def bwd_bwd_reduce(self, v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site) -> Tensor:
        """Sums of V, V xhat, G, G xhat, G V; for smooth activations and prelu also of h, h xhat, h xhat^2, h V,
        h V xhat; and with v_residual of h v_r, h v_r xhat: (5, C), (10, C) or (12, C).
        """

    def bwd_bwd_apply(
        self, v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site, k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(a_x, a_dy, a_residual = a_z, where the residual is saved) of coefficients (9, C)."""


def is_masked(activation: str) -> bool:
    """Whether the sign of z is all that derivatives need of it, so that a mask stands for the residual."""
    return activation in ("relu", "leaky_relu")


def needs_residual(activation: str) -> bool:
    """Whether derivatives need the residual itself, and neither nothing of it nor its share in a mask."""
    return not is_masked(activation) and activation != "identity"


def dense_like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """The tensor t with the strides of the dense tensor x."""
    if t is None or t.stride() == x.stride():
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def dense(x: Tensor) -> Tensor:
    """The tensor x, contiguous unless it is channels-last."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def number_of_channels(x: Tensor, per_sample: bool) -> int:
    """How many channels have statistics of their own."""
    return x.shape[0] * x.shape[1] if per_sample else x.shape[1]


def folding(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which knows no statistics per sample, as an operator of the family that does: by a batch of one.

    With ``per_sample`` as the last argument, (N, C, ...) becomes (1, N C, ...), which copies what is channels-last.
    """

    def fold(*args: Any) -> Any:
        *own, per_sample = args
        if not per_sample:
            return run(*own)
        # Of the tensors with several dimensions, which have x's shape, x is the last: there is no residual.
        x = dense([a for a in own if isinstance(a, Tensor) and a.dim() > 1][-1])
        shape = x.shape
        folded = 1, shape[0] * shape[1], *shape[2:]
        results = run(*(a.reshape(folded) if isinstance(a, Tensor) and a.shape == shape else a for a in own))

        def unfolded(t: Tensor) -> Tensor:
            like_x = t.view(shape)
            return like_x if x.is_contiguous() else like_x.movedim(1, -1).contiguous().movedim(-1, 1)

        return tuple(unfolded(t) if t.shape == folded else t for t in results)

    return fold


def wide(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A per-channel operand in the dtype of the statistics of x."""
    return None if t is None else t.to(state_dtype(x.dtype)).contiguous()


def _over_ranks(sums: Tensor, group: str) -> Tensor:
    """The sums of all ranks; `sums` itself stays that of this rank."""
    if not group:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=process_group(group))
    return total


def _batch_statistics(local: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, number of values) of all ranks, from this rank's mean and sum of squared deviations."""
    n = local.new_full((), count)
    if not group:
        return local[0].clone(), local[1] / n, n
    ranks_of = process_group(group)
    own = torch.cat([local.flatten(), n[None]])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(ranks_of))]
    dist.all_gather(gathered, own, group=ranks_of)
    ranks = torch.stack(gathered)
    counts = ranks[:, -1:]
    mean, squares = ranks[:, :-1].view(len(gathered), 2, -1).unbind(1)
    total = counts.sum()
    # As in Chan, Golub and LeVeque 1979: deviations from a rank's mean, and of the means from the common one.
    common = (counts / total * mean).sum(0)
    spread = squares + counts * (mean - common).square()
    return common, spread.sum(0) / total, total


def forward(
    kernels: Kernels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``batch_norm_act`` on the kernels of a backend; see ``ops/batch_norm_act.py``."""
    x = dense(x)
    values = x.numel() // max(number_of_channels(x, per_sample), 1)
    if mean is None or var is None:
        mean, var, count = _batch_statistics(kernels.stats(x, per_sample), values, group)
    else:
        state = state_dtype(x.dtype)
        mean, var = mean.to(state, copy=True), var.to(state, copy=True)
        count = mean.new_full((), values)
        if training and group:
            mean, var, count = _batch_statistics(torch.stack([mean, var * values]), values, group)
    invstd = (var + eps).rsqrt()
    site = Site(
        x,
        mean,
        invstd,
        wide(weight, x),
        wide(bias, x),
        dense_like(residual, x),
        None,
        wide(slope, x),
        number(activation),
        negative_slope,
        per_sample,
    )
    y, mask = kernels.fwd_apply(site, save and residual is not None and is_masked(activation))
    return y, mean, var, invstd, count, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def backward(
    kernels: Kernels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``batch_norm_act_bwd`` on the kernels of a backend; see ``ops/batch_norm_act.py``."""
    dy, site = backward_site(
        dy, x, weight, bias, residual, slope, mean, invstd, mask, activation, negative_slope, per_sample
    )
    # One tensor each: outputs of an operator do not alias.
    dx, dresidual = x.new_empty(0), x.new_empty(0)
    sums = means = None
    if want_sums or (training and want_dx):
        sums = kernels.bwd_reduce(dy, site)
        means = _over_ranks(sums[:2], group) / count if training else None
    if want_dx or want_dresidual:
        k = first_order_coefficients(site, means)
        dx, g = kernels.bwd_apply(dy, site, k, want_dresidual)
        dresidual = dresidual if g is None else g
    return dx, *gradients_of_channels(sums if want_sums else None, mean, weight, bias, slope), dresidual


def first_order_coefficients(site: Site, means: Tensor | None) -> Tensor:
    """The coefficients of `Kernels.bwd_apply`, from the means (2, C) of G and G xhat; None: statistics are constants."""
    scale = site.invstd if site.weight is None else site.invstd * site.weight
    through = scale.new_zeros(2, *scale.shape) if means is None else -scale * means
    return torch.cat([scale[None], through])


def gradients_of_channels(
    sums: Tensor | None, mean: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight, dbias, dslope) from the sums of `Kernels.bwd_reduce`; empty where sums or operand are absent."""

    def gradient(operand: Tensor | None, row: int) -> Tensor:
        if sums is None or operand is None:
            return mean.new_empty(0)
        return _of_slope(sums[row], operand) if row == 2 else sums[row].to(operand.dtype, copy=True)

    return gradient(weight, 1), gradient(bias, 0), gradient(slope, 2)


def backward_site(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    per_sample: bool,
) -> tuple[Tensor, Site]:
    """Return dy with the strides of the dense x, and what describes the normalisation to the kernels."""
    x = dense(x)
    like_x = dense_like(dy, x)
    assert like_x is not None
    residual = None if mask is not None else dense_like(residual, x)
    affine = wide(weight, x), wide(bias, x), residual, mask, wide(slope, x)
    return like_x, Site(x, mean, invstd, *affine, number(activation), negative_slope, per_sample)


def _of_slope(per_channel: Tensor, slope: Tensor) -> Tensor:
    whole = per_channel.sum(0, keepdim=True) if slope.numel() == 1 else per_channel
    return whole.to(slope.dtype, copy=True)


def second_order(
    kernels: Kernels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``batch_norm_act_bwd_bwd`` on the kernels of a backend; see ``ops/batch_norm_act.py``."""
    dy, site = backward_site(
        dy, x, weight, bias, residual, slope, mean, invstd, mask, activation, negative_slope, per_sample
    )
    v, v_r = dense_like(v_dx, site.x), dense_like(v_dresidual, site.x)
    zero = torch.zeros_like(mean)

    def cotangent(t: Tensor | None) -> Tensor:
        return zero if t is None else t.to(zero.dtype).expand_as(zero)

    # The adjoint of z, which is what v_r counts for in the sums, is zero where the activation is linear.
    sums = kernels.bwd_bwd_reduce(v, None if is_linear(activation) else v_r, dy, site)
    smooth = activation not in PIECEWISE_LINEAR
    given = cotangent(v_dweight), cotangent(v_dbias), cotangent(v_dslope)
    w = torch.ones_like(mean) if site.weight is None else site.weight
    k, a_w, a_z, a_slope = second_order_coefficients(sums, *given, w, invstd, count, smooth, training, group)
    a_x, a_dy, a_r = kernels.bwd_bwd_apply(v, v_r, dy, site, k)
    a_bias = mean.new_empty(0)
    if bias is not None:
        a_bias = bias.new_empty(0) if is_linear(activation) else a_z.to(bias.dtype)
    return (
        a_dy,
        a_x,
        mean.new_empty(0) if weight is None else a_w.to(weight.dtype),
        a_bias,
        x.new_empty(0) if a_r is None or is_linear(activation) else a_r,
        mean.new_empty(0) if slope is None else _of_slope(a_slope, slope),
    )


def is_linear(activation: str) -> bool:
    """Whether the adjoint of z is zero: a fixed slope on either side."""
    return activation in PIECEWISE_LINEAR and activation != "prelu"


def second_order_coefficients(
    sums: Tensor,
    v_w: Tensor,
    v_b: Tensor,
    v_a: Tensor,
    w: Tensor,
    s: Tensor,
    count: Tensor,
    smooth: bool,
    training: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k (9, C), a_w (C,), sum of a_z (C,), a_slope (C,)) from the sums of `Kernels.bwd_bwd_reduce`.

    ``s`` is invstd; every other argument but ``count`` is (C,), of this rank.
    """
    zero = torch.zeros_like(s)
    ws = w * s
    t1, t2, s1, s2, gv = sums[:5]
    h0, h1, h2, hv0, hv1 = sums[5:10] if len(sums) > 5 else (zero,) * 5
    hr0, hr1 = sums[10:12] if len(sums) > 10 else (zero, zero)
    # a_z = h q, with q = ws (V - T1/N - xhat T2/N) + v_w xhat + v_b + v_r: what of its sums needs no other rank
    if smooth:
        fixed0, fixed1 = v_w * h1 + v_b * h0 + hr0, v_w * h2 + v_b * h1 + hr1
    else:
        fixed0, fixed1 = v_a * h0, v_a * h1
    if not training:
        sum_z0, sum_z1 = (ws * hv0 + fixed0, ws * hv1 + fixed1) if smooth else (fixed0, fixed1)
        a_slope = ws * hv0 + v_w * h1 + v_b * h0 + hr0
        k = torch.stack([ws, v_b, v_w, v_a, zero, s * v_w, ws, zero, zero])
        return k, s * gv + sum_z1, sum_z0, a_slope

    local = torch.stack(
        [t1, t2, s1, s2, gv, h0, h1, h2, hv0, hv1, v_w * s1 + w * fixed0, v_w * s2 + w * fixed1]
    )
    total = _over_ranks(local, group)
    n_t1, n_t2, n_s1, n_s2 = (total[:4] / count).unbind()  # means over the batch
    k1, k2 = v_b - ws * n_t1, v_w - ws * n_t2
    sum_e0 = total[10] - ws * (n_t1 * total[3] + n_s1 * total[1])
    sum_e1 = total[11] - 2 * ws * n_t2 * total[3]
    sum_z0, sum_z1 = fixed0, fixed1
    if smooth:
        sum_e0 = sum_e0 + w * ws * (total[8] - n_t1 * total[5] - n_t2 * total[6])
        sum_e1 = sum_e1 + w * ws * (total[9] - n_t1 * total[6] - n_t2 * total[7])
        sum_z0 = ws * (hv0 - n_t1 * h0 - n_t2 * h1) + fixed0
        sum_z1 = ws * (hv1 - n_t1 * h1 - n_t2 * h2) + fixed1
    d = w * (total[4] - n_s1 * total[0] - n_s2 * total[1])
    k7 = -s * sum_e0 / count
    k8 = -s * (sum_e1 + s * d) / count
    k = torch.stack([ws, k1, k2, v_a, -s * ws * n_s2, s * k2, ws, k7, k8])
    a_w = s * (gv - t1 * n_s1 - t2 * n_s2) + sum_z1
    a_slope = ws * (hv0 - n_t1 * h0 - n_t2 * h1) + v_w * h1 + v_b * h0 + hr0
    return k, a_w, sum_z0, a_slope


#: The drivers by the names of their operators.
DRIVERS: dict[str, Callable[..., Any]] = {
    "batch_norm_act": forward,
    "batch_norm_act_bwd": backward,
    "batch_norm_act_bwd_bwd": second_order,
}
