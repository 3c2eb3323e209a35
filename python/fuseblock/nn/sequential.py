"""A `torch.nn.Sequential` that runs neighbours as one."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import LeakyReLU, ReLU, activate_over, name_of, shows_output, unusual
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .norm_act import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    InstanceNormAct1d,
    InstanceNormAct2d,
)

_NORMS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, InstanceNormAct1d, InstanceNormAct2d)
_CONVOLUTIONS = (Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d)


class Sequential(torch.nn.Sequential):
    """A drop-in replacement of `torch.nn.Sequential` in which a norm applies the activation behind it, in one pass.

    A rectifier of this package behind a convolution of this package is written over the convolution's output.

    Which neighbours run as one is decided at every call, by what then stands there. The modules themselves stay what they
    are: called one by one, sliced, replaced, or with hooks, they do what they do in a `torch.nn.Sequential`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The modules, one after the other."""
        modules = [*self._modules.values()]
        while modules:
            module = modules.pop(0)
            follower = modules[0] if modules else None
            if type(module) in _NORMS and joins(module, follower):
                input = module.activated(input, follower)  # type: ignore[union-attr, operator]
            elif type(module) in _CONVOLUTIONS and type(follower) in (ReLU, LeakyReLU):
                is_kept = len(modules) > 1 and type(modules[1]) in _CONVOLUTIONS
                input = over_convolution(module, follower, input, is_kept)  # type: ignore[arg-type]
            else:
                input = module(input)  # type: ignore[misc]
                continue
            modules.pop(0)
        return input


def joins(norm: torch.nn.Module | None, act: torch.nn.Module | None) -> bool:
    """Whether the norm may apply the activation module now."""
    return (
        norm is not None
        and act is not None
        and norm.activation == "identity"  # the norm's own one would come first
        and name_of(act) is not None
        and not unusual(norm)
        and not unusual(act)
    )


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
