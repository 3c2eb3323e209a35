"""A `torch.nn.Sequential` that runs neighbours as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._fused_convolution import into_convolution, through
from .activation import LeakyReLU, ReLU, activate_over, shows_output, unusual
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .norm_act import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    InstanceNormAct1d,
    InstanceNormAct2d,
    joins,
)

_NORMS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, InstanceNormAct1d, InstanceNormAct2d)
_CONVOLUTIONS = (Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d)


class Sequential(torch.nn.Sequential):
    """A drop-in replacement of `torch.nn.Sequential` in which a norm applies the activation behind it, in one pass.

    A rectifier of this package behind a convolution of this package is written over the convolution's output. On a GPU,
    where a table that `python -m benchmarks tune` wrote there says so, convolution and batch norm, or convolution and
    activation, are one kernel and what is left of the norm, and a batch norm's backward runs with that of the convolution
    behind it; not where hooks see the convolution; spectral norm's do not. Modules of a sequence in the sequence count as
    its own.

    Which neighbours run as one is decided at every call, by what then stands there. The modules themselves stay what they
    are: called one by one, sliced, replaced, or with hooks, they do what they do in a `torch.nn.Sequential`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The modules, one after the other."""
        return run([*_flat(self)], input)

    def __getitem__(self, idx: Any) -> Any:
        """A module, or a `Sequential` of a slice: subclasses have other arguments, and a forward for the whole."""
        if isinstance(idx, slice):
            return Sequential(OrderedDict([*self._modules.items()][idx]))
        return super().__getitem__(idx)


def _flat(modules: torch.nn.Sequential) -> Iterator[torch.nn.Module]:
    """The modules; of sequences among them theirs, where a call is no more than that."""
    for module in modules._modules.values():
        is_plain = isinstance(module, Sequential) and type(module).forward is Sequential.forward
        if is_plain and not unusual(module):
            yield from _flat(module)  # type: ignore[arg-type]
        else:
            yield module  # type: ignore[misc]


def run(modules: list[Any], input: Tensor, residual: Tensor | None = None) -> Tensor:
    """The modules, one after the other, neighbours as one; the last, a norm, adds the residual. The list is used up."""
    while modules:
        module = modules.pop(0)
        follower = modules[0] if modules else None
        fused = None
        if type(module) in _CONVOLUTIONS:
            fused = through(module, modules, input, residual)
        elif type(module) is BatchNormAct2d:
            fused = into_convolution(module, modules, input, residual)
        if fused is not None:
            input, taken = fused
            del modules[:taken]
            continue
        if type(module) in _NORMS and joins(module, follower):
            input = module.activated(input, follower)
        elif type(module) in _CONVOLUTIONS and type(follower) in (ReLU, LeakyReLU):
            is_kept = len(modules) > 1 and type(modules[1]) in _CONVOLUTIONS
            input = over_convolution(module, follower, input, is_kept)  # type: ignore[arg-type]
        else:
            input = module(input) if modules or residual is None else module(input, residual)
            continue
        modules.pop(0)
    return input


def over_convolution(
    conv: torch.nn.Module, act: torch.nn.Module, input: Tensor, is_kept: bool = False
) -> Tensor:
    """``act(conv(input))``; a rectifier is written over the convolution's output if no hook has seen that.

    ``is_kept``: whoever reads the result next keeps it for backward.
    """
    z: Tensor = conv(input)
    if shows_output(conv):
        activated: Tensor = act(z)
        return activated
    return activate_over(act, z, is_kept)
