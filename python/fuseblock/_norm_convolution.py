"""A batch norm in training, its activation and the convolution behind them, as one autograd node.

Apart, the convolution's backward writes the gradient of its input, and the norm's backward reads that and x twice. Here the
operator `norm_act_conv_bwd` does both, and reads them once less. A backward that is itself recorded (``create_graph=True``)
runs on the operators that it would run on apart, whose derivatives compose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from ._convolution import Geometry
from ._library import backward_is_seen, keep_arguments, wanted
from .ops import batch_norm_act, batch_norm_act_bwd, norm_act_conv_bwd
from .ops._conv_stats import convolution_gradients

#: Of the normalised input, the weight and the bias: the convolution, alone or with further results without gradients.
Convolve = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    geometry: Geometry,
    convolve: Convolve,
    statistics: tuple[Tensor | None, Tensor | None],
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
    """(results of ``convolve``, (mean, var, count) of x), arguments as in `functional.batch_norm_act` and `Geometry`.

    ``statistics``: mean and var of x where its producer has them. All tensors are of one dtype, the norm's of any.
    """
    options = eps, activation, negative_slope
    with torch.no_grad():
        normed = batch_norm_act(x, weight, bias, None, None, *statistics, *options, True, "", False)
    a, mean, var, invstd, count, _ = normed
    # The engine can be asked about inner nodes only, and views are such.
    leaves = x, weight, bias, conv_weight, conv_bias
    inner = (t if t is None else torch.ops.aten.alias.default(t) for t in leaves)
    kept = a, mean, var, invstd, count
    results = _NormConvolution.apply(*inner, kept, options, geometry, convolve)  # type: ignore[no-untyped-call]
    return results, (mean, var, count)


class _NormConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        kept: tuple[Tensor, ...],
        options: tuple[float, str, float],
        geometry: Geometry,
        convolve: Convolve,
    ) -> tuple[Tensor, ...]:
        results = convolve(kept[0], conv_weight, conv_bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        keep_arguments(ctx, (x, weight, bias, conv_weight, conv_bias), range(5))
        ctx.save_for_backward(x, weight, bias, conv_weight, *kept)
        ctx.options, ctx.geometry = options, geometry
        ctx.forced = dispatch.forced()
        return results

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *unused: None) -> Any:  # type: ignore[override]
        if dy is None:
            return (None,) * 9
        want_x, want_weight, want_bias, want_conv, want_conv_bias = wanted(ctx)
        want_affine = want_weight or want_bias
        with dispatch.backend(ctx.forced):
            run = _recorded if backward_is_seen() else _fused
            dx, dweight, dbias, dconv = run(ctx, dy, want_x, want_affine, want_conv)
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias if want_bias else None,
            dconv,
            dy.sum((0, 2, 3)) if want_conv_bias else None,
            *(None,) * 4,
        )


def _fused(ctx: Any, dy: Tensor, want_x: bool, want_affine: bool, want_conv: bool) -> Any:
    """(dx, dweight, dbias, gradient of the convolution's weight)."""
    x, weight, bias, conv_weight, a, mean, _, invstd, _ = ctx.saved_tensors
    _, activation, negative_slope = ctx.options
    stride, padding, _, transposed, _, groups = ctx.geometry
    _, dconv = convolution_gradients(dy, a, conv_weight, ctx.geometry, False, want_conv)
    if not want_x and not want_affine:
        return None, None, None, dconv
    statistics = weight, bias, mean, invstd
    shape = *stride, *padding, groups, transposed
    return *norm_act_conv_bwd(x, conv_weight, dy, *statistics, *shape, activation, negative_slope), dconv


def _recorded(ctx: Any, dy: Tensor, want_x: bool, want_affine: bool, want_conv: bool) -> Any:
    """The same of differentiable operators: what is kept of the forward is computed again, as a function of x."""
    x, weight, bias, conv_weight, _, mean, var, invstd, count = ctx.saved_tensors
    eps, *act = ctx.options
    a = batch_norm_act(x, weight, bias, None, None, mean, var, eps, *act, True, "", False)[0]
    want_a = want_x or want_affine
    da, dconv = convolution_gradients(dy, a, conv_weight, ctx.geometry, want_a, want_conv)
    if da is None:
        return None, None, None, dconv
    saved = x, weight, bias, None, None, mean, invstd, count, None
    of_norm = batch_norm_act_bwd(da, *saved, *act, True, "", eps, want_x, want_affine, False)
    return *of_norm[:3], dconv
