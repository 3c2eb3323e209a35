"""Folding batch norm into the convolution before it, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from typing import TypeAlias, TypeGuard

import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .activation import activation_module
from .blocks import _ConvBlock
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
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
# Exactly these: a subclass may compute something else.
_CONVOLUTIONS = {torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, *_TRANSPOSED}
_CONVOLUTIONS |= {Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d}
_BATCH_NORMS = {torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d}
_BATCH_NORMS |= {BatchNormAct1d, BatchNormAct2d, BatchNormAct3d}
_IN_SEQUENCE = (torch.nn.Sequential.forward, _ConvBlock.forward)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fold_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    r"""A copy of ``model`` for inference whose batch norms are folded into the convolutions before them.

    .. math:: W' = W \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
              b' = \beta + (b - \mu) \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    Folded is a batch norm that follows a convolution in a `torch.nn.Sequential` (so also in every `Conv2dBlock` and its
    kin), stock or fuseblock's; of a fused one the activation remains. Others stay as they are: subclasses (a Sequential
    may be one that keeps its ``forward``), convolutions in several places of the model, norms in training mode or without
    running statistics, modules with hooks, with parametrizations or without a parameter ``weight``, such as those under
    spectral norm (`remove_spectral_norm` first). A Sequential is taken to be called as a whole.

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
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    for parent in model.modules():
        if not isinstance(parent, torch.nn.Sequential) or "forward" in parent.__dict__:
            continue
        if type(parent).forward not in _IN_SEQUENCE:
            continue
        for (_, conv), (name, norm) in pairwise(list(parent._modules.items())):
            if places[conv] == 1 and _is_convolution(conv) and _is_batch_norm(norm, conv.out_channels):
                parent.register_module(name, _fold(conv, norm))
    return model


def _is_convolution(module: torch.nn.Module | None) -> TypeGuard[_Convolution]:
    if module is None or type(module) not in _CONVOLUTIONS:
        return False
    return _is_plain(module) and module._parameters.get("weight") is not None


def _is_batch_norm(module: torch.nn.Module | None, channels: int) -> TypeGuard[_Norm]:
    """Whether it is a batch norm of so many channels whose statistics are constants."""
    if module is None or type(module) not in _BATCH_NORMS or module.training:
        return False
    return _is_plain(module) and module.running_mean is not None and bool(module.num_features == channels)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs its class' ``forward`` and nothing else."""
    replaced = module.__dict__.keys() & {"forward", "_conv_forward"}
    return not replaced and not any(getattr(module, hooks) for hooks in _HOOKS)


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
    remaining = activation_module(norm.activation, norm.negative_slope)
    if isinstance(remaining, torch.nn.PReLU):
        remaining.weight = norm.slope
    return torch.nn.Identity() if remaining is None else remaining


def _swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(in, out / groups, ...) of a transposed convolution as (out, in / groups, ...), and back."""
    grouped: torch.Tensor = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)
