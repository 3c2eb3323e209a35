"""Folding batch norm into the convolution before it, for inference."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeAlias

import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .activation import activation_module
from .norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

_Convolution: TypeAlias = (
    torch.nn.Conv1d
    | torch.nn.Conv2d
    | torch.nn.Conv3d
    | torch.nn.ConvTranspose1d
    | torch.nn.ConvTranspose2d
    | torch.nn.ConvTranspose3d
)
_Norm: TypeAlias = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d
_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, *_TRANSPOSED)
_BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def fold_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    r"""A copy of ``model`` for inference whose batch norms are folded into the convolutions before them.

    .. math:: W' = W \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
              b' = \beta + (b - \mu) \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    Folded is a batch norm that follows a convolution in a `torch.nn.Sequential` (so also in every `Conv2dBlock` and its
    kin), stock or fuseblock's; of a fused one the activation remains. Others stay as they are.

    Args:
        model: any module in eval mode.

    Returns:
        A deep copy in eval mode; ``model`` is not changed. The copy's convolutions have a bias, and its ``state_dict``
        lacks the norms.

    Raises:
        ValueError: the model is in training mode, where a batch norm depends on the batch.
    """
    if model.training:
        raise ValueError("fold_batch_norm: expected a model in eval mode, got one in training mode")
    model = copy.deepcopy(model)
    for parent in model.modules():
        if not isinstance(parent, torch.nn.Sequential):
            continue
        for (_, conv), (name, norm) in pairwise(list(parent._modules.items())):
            if (
                isinstance(conv, _CONVOLUTIONS)
                and isinstance(norm, _BATCH_NORMS)
                and norm.running_mean is not None
            ):
                parent.register_module(name, _fold(conv, norm))
    return model


def _fold(conv: _Convolution, norm: _Norm) -> torch.nn.Module:
    """Fold ``norm`` into ``conv``; what remains of it."""
    transposed = isinstance(conv, _TRANSPOSED)
    weight, mean, var = conv.weight, norm.running_mean, norm.running_var
    assert mean is not None  # for the type checker: the caller looked
    assert var is not None
    scaled, bias = fuse_conv_bn_weights(
        _swapped(weight, conv.groups) if transposed else weight,
        conv.bias,
        mean,
        var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    folded = _swapped(scaled, conv.groups) if transposed else scaled
    conv.weight = torch.nn.Parameter(folded.detach(), weight.requires_grad)
    conv.bias = torch.nn.Parameter(bias.detach(), weight.requires_grad)
    if not isinstance(norm, (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)):
        return torch.nn.Identity()
    act = norm.activation_arguments()
    remaining = activation_module(act["activation"], act["negative_slope"])
    if isinstance(remaining, torch.nn.PReLU):
        remaining.weight = act["slope"]
    return torch.nn.Identity() if remaining is None else remaining


def _swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(in, out / groups, ...) of a transposed convolution as (out, in / groups, ...), and back."""
    grouped: torch.Tensor = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)
