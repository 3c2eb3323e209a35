"""Normalisation with its activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _batch_norm_node, dispatch, ops
from ..ops.batch_norm_act import check_of_channels
from ..reference.batch_norm_act import batch_norm_act_reference


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    slope: Tensor | None = None,
    process_group: Any = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Batch normalisation, an optional residual and an activation, differentiable twice.

        y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and (biased) var are the batch's, over all dimensions but the channels'; ``running_mean`` and
    ``running_var``, where given, move towards them in place (var unbiased) as in `torch.nn.functional.batch_norm`. Else
    they take the place of the batch's. Statistics are float32 (float64 for float64). Saved for backward: x, per-channel
    tensors and, with a residual, one bit per element (relu, leaky_relu) or the residual (prelu, silu, tanh, elu).

    Args:
        x: (N, C, ...) float64, float32, float16 or bfloat16, contiguous or channels-last; y keeps its layout.
        weight, bias: (C,).
        residual: of the shape and dtype of x.
        running_mean, running_var: (C,).
        training: normalise with the batch's statistics.
        momentum: how far the running ones move, 0 to 1.
        eps: added to the variance.
        activation: identity, relu, leaky_relu, prelu, silu, tanh or elu.
        negative_slope: of leaky_relu.
        slope: (C,) or (1,), learned, of prelu.
        process_group: a `torch.distributed` process group whose ranks share their statistics, in the gradients of first
            and second order too; None: this rank's batch alone.
        statistics: the batch's mean and biased variance (C,), where the producer of x has them (`conv2d_stats`): x is then
            not read for them. float32 (float64 for float64), as they are computed here; other floating point dtypes are
            converted. Gradients are those of statistics computed here. In training, without process_group.

    Returns:
        y, of the shape, dtype and layout of x.

    Raises:
        ValueError: shapes, devices or activation do not fit; one value per channel in training; running statistics
            missing where training is False. TypeError: dtypes do not fit.
        fuseblock.BackendError: the forced backend cannot run these tensors.

    Source: Ioffe and Szegedy 2015.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm_act: expected running_mean and running_var together, got one of them")
    if not training and running_mean is None:
        raise ValueError("batch_norm_act: expected running_mean and running_var where training is False")
    if statistics is not None:
        if not training or process_group is not None:
            raise ValueError(
                "batch_norm_act: expected training without process_group where statistics are given"
            )
        _check_statistics(x, statistics)
    alone = process_group is None and statistics is None
    if alone and _batch_norm_node.can_run(x, (weight, bias, residual, slope), (running_mean, running_var)):
        given = (None, None) if training else (running_mean, running_var)
        values = x.numel()
        # Like PyTorch, an empty batch leaves the running statistics as they are.
        moved = (running_mean, running_var) if training and values > 0 else (None, None)
        options = momentum, eps, activation, negative_slope, training
        try:
            if x.dim() < 2 or (training and values == x.shape[1] > 0):
                raise ValueError(f"batch_norm_act: x of shape {tuple(x.shape)} has too few values")
            return _batch_norm_node.run(x, weight, bias, residual, slope, given, moved, *options)
        except (RuntimeError, ValueError) as error:
            failed = error
        # The kernel checks as well; here it is said in the terms of this function.
        check_running(x, running_mean, running_var)
        ops.check_batch_norm_act(x, weight, bias, residual, slope, *given, activation, training, "")
        raise failed
    check_running(x, running_mean, running_var)
    group = "" if process_group is None else process_group.group_name
    mean, var = (
        (running_mean, running_var) if not training else (None, None) if statistics is None else statistics
    )
    tensors = x, weight, bias, residual, slope
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        save = True  # a wrapped tensor does not tell whether an outer transform will differentiate it
    args = (*tensors, mean, var, eps, activation, negative_slope, training, group, save)
    if dispatch.plain_pytorch():
        args = ops.batch_norm_act.cast_for_autocast(args)
        ops.check_batch_norm_act(*args[:7], activation, training, group)
        outputs = batch_norm_act_reference(*args)
    else:
        outputs = ops.batch_norm_act(*args)
    y, mean, var, _, count, _ = outputs
    # Like PyTorch, an empty batch leaves them as they are; with a group another rank may have values.
    updates = training and (x.numel() > 0 or group != "")
    if updates and running_mean is not None and running_var is not None:
        move_running(running_mean, running_var, mean, var, count, momentum)
    return y


def check_running(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise ValueError or TypeError where running statistics are not such of x."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return  # the operator's check says so
    check_of_channels("running_mean", running_mean, x.shape[1], x)
    check_of_channels("running_var", running_var, x.shape[1], x)


def _check_statistics(x: Tensor, statistics: Any) -> None:
    """Raise ValueError or TypeError where these are no mean and variance of the channels of x."""
    given = statistics if isinstance(statistics, (tuple, list)) else [statistics]
    if len(given) != 2 or not all(isinstance(t, Tensor) for t in given):
        got = ", ".join(type(t).__name__ for t in given)
        raise TypeError(f"batch_norm_act: expected statistics as two tensors, mean and variance, got {got}")
    if isinstance(x, Tensor) and x.dim() >= 2:
        for name, t in zip(("mean", "variance"), given, strict=True):
            check_of_channels(f"{name} of statistics", t, x.shape[1], x)


@torch.no_grad()
def move_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum: float
) -> None:
    """Move running statistics towards those of a batch (var biased) of ``count`` values, in place."""
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    unbiased = var.detach() * (count / (count - 1))
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
