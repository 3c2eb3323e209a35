"""Operator ``batch_norm_act``: batch normalisation, residual and activation, with first and second derivatives.

    (y, mean, var, invstd, count, mask) = batch_norm_act(x, weight, bias, residual, slope, mean, var, eps, activation,
                                                         negative_slope, training, group, save, per_sample)
    y = act(weight (x - mean) invstd + bias + residual),   invstd = (var + eps)^-1/2

x (N, C, ...), contiguous or channels-last, which y keeps; other layouts are copied. weight, bias (C,); slope (C,) or
(1,), of prelu alone. In training mean and (biased) var are those of the batch: computed, or taken from ``mean`` and
``var`` where the producer of x summed them; gradients go through them. Else ``mean`` and ``var`` are constants.
``group`` names a process group whose ranks share their statistics ("": none); all three orders then sum over its ranks.
``per_sample`` makes it an instance norm: the channels of every sample are channels of their own, what is (C,) is (N C,), the
channels of a sample behind those of the sample before; in training, without residual, given statistics or group.

Statistics are (C,) of the dtype float32 (float64 for float64); ``count`` is the number of values behind them. y is the one
output with a gradient. Backward recomputes the activation from x and the statistics: saved are x, per-channel tensors and,
with a residual, ``mask`` (uint8, the sign of z, 1 bit per element in memory order: relu, leaky_relu with ``save``) or the
residual (the others). Running buffers are nobody's business here, so several forwards may precede a backward.

Sources: Ioffe and Szegedy 2015; second order: derived in launch/batch_norm_act.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._activations import check_activation
from .._library import DifferentiableOp, loop_vmap, no_third_order, state_dtype
from ..launch.batch_norm_act import (
    dense,
    folding,
    is_linear,
    is_masked,
    needs_residual,
    number_of_channels,
)
from ..reference import batch_norm_act as reference
from . import _candidates

for _op, _reference in (
    ("batch_norm_act", reference.batch_norm_act_reference),
    ("batch_norm_act_bwd", reference.batch_norm_act_bwd_reference),
    ("batch_norm_act_bwd_bwd", reference.batch_norm_act_bwd_bwd_reference),
):
    dispatch.register(
        _op,
        *_candidates.cpu_batch_norm_act(_op),
        *_candidates.cuda_batch_norm_act(_op),
        *_candidates.triton(_op, "triton_batch_norm_act"),
        _candidates.reference(folding(_reference)),
    )


def check_of_channels(name: str, t: Tensor | None, channels: int, x: Tensor) -> None:
    """Raise ValueError or TypeError unless ``t`` is absent or holds a number for each of the channels of x.

    The shape of a slope is left to `check_activation`.
    """
    if t is None:
        return
    if t.shape != (channels,) and name != "slope":
        raise ValueError(
            f"batch_norm_act: expected {name} of shape ({channels},), got {tuple(t.shape)}: "
            f"x of shape {tuple(x.shape)} has {channels} channels"
        )
    if not t.dtype.is_floating_point:
        raise TypeError(f"batch_norm_act: expected floating point {name}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"batch_norm_act: expected {name} on {x.device}, as x, got {t.device}")


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    activation: str,
    training: bool,
    group: str,
    per_sample: bool = False,
) -> None:
    """Raise ValueError or TypeError when the arguments of ``batch_norm_act`` do not fit together."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"batch_norm_act: expected floating point x, got {getattr(x, 'dtype', type(x))}")
    if x.dim() < 2:
        raise ValueError(f"batch_norm_act: expected x of shape (N, C, ...), got {tuple(x.shape)}")
    channels = number_of_channels(x, per_sample)
    if per_sample and (residual is not None or mean is not None or not training or group):
        raise ValueError(
            "batch_norm_act: expected training without residual, mean, var and group where per_sample is True"
        )
    affine = ("weight", weight), ("bias", bias), ("mean", mean), ("var", var), ("slope", slope)
    for name, t in affine:
        check_of_channels(name, t, channels, x)
    check_activation("batch_norm_act", activation, slope, channels)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"batch_norm_act: expected residual of the shape of x, {tuple(x.shape)}, "
                f"got {tuple(residual.shape)}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(
                f"batch_norm_act: expected residual of the dtype of x, {x.dtype}, got {residual.dtype}"
            )
        if residual.device != x.device:
            raise ValueError(f"batch_norm_act: expected residual on {x.device}, as x, got {residual.device}")
    if (mean is None) != (var is None):
        raise ValueError("batch_norm_act: expected mean and var together, got one of them")
    if not training and mean is None:
        raise ValueError("batch_norm_act: expected mean and var where training is False")
    if training and not group and channels and x.numel() == channels:
        raise ValueError(
            f"batch_norm_act: expected more than 1 value per channel when training, got x of shape {tuple(x.shape)}"
        )


def _complete(args: Any, count: int) -> tuple[Any, ...]:
    """``count`` arguments and ``per_sample``, which PyTorch leaves out where it is False."""
    return (*args, False) if len(args) == count else tuple(args)


def _impl(*args: Any) -> Any:
    args = _complete(args, 13)
    x, weight, bias, residual, slope, mean, var, _, activation, _, training, group, _, per_sample = args
    check(x, weight, bias, residual, slope, mean, var, activation, training, group, per_sample)
    return dispatch.run("batch_norm_act", args)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised memory with the shape, dtype and strides of x, or contiguous where x is not dense."""
    return torch.empty_like(dense(x))


def _fake(
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
) -> tuple[Tensor, ...]:
    check(x, weight, bias, residual, slope, mean, var, activation, training, group, per_sample)
    wide = state_dtype(x.dtype)
    per_channel = [x.new_empty(number_of_channels(x, per_sample), dtype=wide) for _ in range(3)]
    masked = save and residual is not None and is_masked(activation)
    mask = x.new_empty((x.numel() + 7) // 8 if masked else 0, dtype=torch.uint8)
    return empty_like(x), *per_channel, x.new_empty((), dtype=wide), mask


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, weight, bias, residual, slope, _, _, eps, *options, save, per_sample = _complete(inputs, 13)
    activation, negative_slope, training, group = options
    _, mean, var, invstd, count, mask = output
    ctx.mark_non_differentiable(mean, var, invstd, count, mask)
    masked = residual is not None and is_masked(activation)
    if masked and not save:
        raise ValueError("batch_norm_act: expected save=True where a gradient is wanted, got False")
    kept = residual if needs_residual(activation) else None
    ctx.save_for_backward(x, weight, bias, kept, slope, mean, invstd, count, mask if masked else None)
    ctx.options = activation, negative_slope, training, group, eps
    ctx.per_sample = per_sample
    ctx.forced = dispatch.forced()


def _backward(ctx: Any, dy: Tensor | None, *unused: Any) -> Any:
    if dy is None:
        return (None,) * 14
    wanted = ctx.needs_input_grad
    # The gradient of a residual before no activation is dy itself.
    is_identity = ctx.options[0] == "identity"
    wants = wanted[0], wanted[1] or wanted[2] or wanted[4], wanted[3] and not is_identity
    with dispatch.backend(ctx.forced):
        grads = batch_norm_act_bwd(dy, *ctx.saved_tensors, *ctx.options, *wants, ctx.per_sample)
    dx, dweight, dbias, dslope, dresidual = grads
    if is_identity:
        dresidual = dy
    ordered = dx, dweight, dbias, dresidual, dslope
    return *(g if want else None for g, want in zip(ordered, wanted, strict=False)), *(None,) * 9


def _bwd_impl(*args: Any) -> Any:
    return dispatch.run("batch_norm_act_bwd", _complete(args, 18))


def _bwd_fake(
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
) -> tuple[Tensor, ...]:
    empty, absent = x.new_empty(0), mean.new_empty(0)

    def like(t: Tensor | None) -> Tensor:
        return torch.empty_like(absent if t is None or not want_sums else t)

    return (
        empty_like(x) if want_dx else torch.empty_like(empty),
        like(weight),
        like(bias),
        like(slope),
        empty_like(x) if want_dresidual else torch.empty_like(empty),
    )


def _bwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:15]
    *ctx.wants, ctx.per_sample = _complete(inputs, 18)[15:]
    ctx.forced = dispatch.forced()


def _bwd_backward(
    ctx: Any,
    v_dx: Tensor | None,
    v_dweight: Tensor | None,
    v_dbias: Tensor | None,
    v_dslope: Tensor | None,
    v_dresidual: Tensor | None,
) -> Any:
    dy, x, weight, bias, residual, slope, *saved = ctx.saved_tensors
    want_dx, want_sums, want_dresidual = ctx.wants
    v = (
        v_dx if want_dx else None,
        v_dweight if want_sums and weight is not None else None,
        v_dbias if want_sums and bias is not None else None,
        v_dslope if want_sums and slope is not None else None,
        v_dresidual if want_dresidual else None,
    )
    if all(t is None for t in v):
        return (None,) * 19
    with dispatch.backend(ctx.forced):
        saved_and_options = *saved, *ctx.options, ctx.per_sample
        adjoints = batch_norm_act_bwd_bwd(*v, dy, x, weight, bias, residual, slope, *saved_and_options)
    a_dy, a_x, a_weight, a_bias, a_residual, a_slope = adjoints
    curved = not is_linear(ctx.options[0])
    return (
        a_dy,
        a_x,
        a_weight if weight is not None else None,
        a_bias if bias is not None and curved else None,
        a_residual if residual is not None and curved else None,
        a_slope if slope is not None else None,
        *(None,) * 13,
    )


def _bwd_bwd_impl(*args: Any) -> Any:
    return dispatch.run("batch_norm_act_bwd_bwd", _complete(args, 20))


def _bwd_bwd_fake(
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
) -> tuple[Tensor, ...]:
    curved = not is_linear(activation)

    def like(t: Tensor | None, is_there: bool = True) -> Tensor:
        t = mean.new_empty(0) if t is None else t
        return torch.empty_like(t) if is_there else t.new_empty(0)

    return (
        empty_like(x),
        empty_like(x),
        like(weight),
        like(bias, curved),
        empty_like(x) if residual is not None and curved else x.new_empty(0),
        like(slope),
    )


def _autocast(dtype: torch.dtype, args: Any) -> tuple[Any, ...]:
    """Batch norm runs in the dtype of its input; a residual of another one follows, as an addition would make it."""
    del dtype
    x, weight, bias, residual, *others = args
    if residual is not None and residual.dtype != x.dtype:
        common = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(common), residual.to(common)
    return x, weight, bias, residual, *others


_SHARED = (
    "Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, Tensor mean, Tensor invstd,"
    " Tensor count, Tensor? mask, str activation, float negative_slope, bool training, str group, float eps"
)

batch_norm_act: DifferentiableOp = DifferentiableOp(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, Tensor? mean, Tensor? var,"
    " float eps, str activation, float negative_slope, bool training, str group, bool save, bool per_sample=False)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor invstd, Tensor count, Tensor mask)",
    impl=_impl,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=loop_vmap(lambda *args: batch_norm_act(*args)),
    autocast=_autocast,
)
batch_norm_act_bwd: DifferentiableOp = DifferentiableOp(
    f"batch_norm_act_bwd({_SHARED}, bool want_dx, bool want_sums, bool want_dresidual, bool per_sample=False)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dslope, Tensor dresidual)",
    impl=_bwd_impl,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
    vmap=loop_vmap(lambda *args: batch_norm_act_bwd(*args)),
)
_no_setup, _no_backward = no_third_order("batch_norm_act_bwd_bwd")
batch_norm_act_bwd_bwd: DifferentiableOp = DifferentiableOp(
    "batch_norm_act_bwd_bwd(Tensor? v_dx, Tensor? v_dweight, Tensor? v_dbias, Tensor? v_dslope, Tensor? v_dresidual,"
    f" {_SHARED}, bool per_sample=False)"
    " -> (Tensor a_dy, Tensor a_x, Tensor a_weight, Tensor a_bias, Tensor a_residual, Tensor a_slope)",
    impl=_bwd_bwd_impl,
    fake=_bwd_bwd_fake,
    setup_context=_no_setup,
    backward=_no_backward,
    vmap=loop_vmap(lambda *args: batch_norm_act_bwd_bwd(*args)),
)
