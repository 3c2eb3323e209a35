"""What `run` decides of a block, without running it: for `fuseblock.explain`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from .._library import faking, wants_gradient
from ._fused_convolution import Decision, before, behind
from .activation import name_of, unusual
from .blocks import ResidualBlock2d
from .norm_act import BatchNormAct2d, _WithActivation
from .sequential import Sequential, _flat


def modules_of(block: Sequential | ResidualBlock2d) -> list[torch.nn.Module]:
    """What a call of the block runs one after the other; of a residual block, beside the shortcut."""
    if isinstance(block, Sequential):
        return [*_flat(block)]
    if block.mode == "up":
        return [block.norm1, torch.nn.Upsample(scale_factor=2), *block._sequence()]
    return block._sequence()


def decisions(
    modules: list[torch.nn.Module], x: Tensor
) -> Iterator[tuple[torch.nn.Module, str, Decision | None]]:
    """(module, what is decided there, decision) of each convolution, and of each batch norm with one somewhere behind it.

    No hook runs, and nothing is computed. A module whose result only a call can tell ends it, with None for a decision if
    there are convolutions behind it.

    Raises:
        What the modules would raise of the shapes and dtypes that they get.
    """
    for place, module in enumerate(modules):
        rest = modules[place + 1 :]
        more = any(isinstance(m, _ConvNd) for m in rest)
        if isinstance(module, _ConvNd):
            y = _result(module, x)
            yield module, "convolution", behind(module, rest, x)
            x = y
        elif isinstance(module, _WithActivation) or name_of(module) is not None:
            if more and type(module) is BatchNormAct2d:
                yield module, "norm_act_conv", before(module, rest, x)
            x = x.detach().requires_grad_(_differentiable(module, x))
        elif _is_plain(module):
            x = _result(module, x)
        else:
            if more:
                yield module, type(module).__name__, None
            return


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call does what the class's forward does, and that calls no other module."""
    is_known = type(module).__module__.startswith(("torch.nn.", "fuseblock.nn."))
    return is_known and not module._modules and not unusual(module)


def _differentiable(module: torch.nn.Module, x: Tensor) -> bool:
    return wants_gradient((x, *module.parameters()))


def _result(module: torch.nn.Module, x: Tensor) -> Tensor:
    """A tensor like what the module makes of x, of any values; raises what the module raises."""
    if hasattr(module, "weight_orig"):  # of which a hook makes the weight, at a call
        module = copy.copy(module)
        vars(module)["weight"] = module.weight_orig
    with torch.no_grad(), faking((x,)):
        y: Tensor = type(module).forward(module, x)
    like = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)
    return like.requires_grad_(_differentiable(module, x))
