"""Activations by themselves: those that fuseblock's kernels improve, and those that a module before them has applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional


class LeakyReLU(torch.nn.LeakyReLU):
    """A drop-in replacement of `torch.nn.LeakyReLU` that saves one bit per element for backward, not its input.

    An undefined gradient stays undefined: a gradient penalty that is backpropagated by itself does not run zeros
    through the network. With ``inplace=True`` it is the stock module, which saves nothing of its own either.
    """

    def forward(self, input: Tensor) -> Tensor:
        """max(x, 0) + negative_slope min(x, 0) for any shape."""
        if self.inplace:
            return super().forward(input)
        return functional.bias_act(input, activation="leaky_relu", negative_slope=self.negative_slope)


class _Applied(torch.nn.Module):
    """The module before this one applies the activation: nothing is left to do.

    It stays in its place so that the model's structure, names and ``state_dict`` are what they were.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input itself."""
        return input


class AppliedReLU(_Applied, torch.nn.ReLU):
    """A ReLU that the module before it has applied."""


class AppliedLeakyReLU(_Applied, torch.nn.LeakyReLU):
    """A LeakyReLU that the module before it has applied."""


class AppliedPReLU(_Applied, torch.nn.PReLU):
    """A PReLU that the module before it has applied, with the weight of this one."""


class AppliedSiLU(_Applied, torch.nn.SiLU):
    """A SiLU that the module before it has applied."""


class AppliedTanh(_Applied, torch.nn.Tanh):
    """A Tanh that the module before it has applied."""


class AppliedELU(_Applied, torch.nn.ELU):
    """An ELU that the module before it has applied."""


#: What stands for an activation module once the one before it has applied it.
APPLIED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.ReLU: AppliedReLU,
    torch.nn.LeakyReLU: AppliedLeakyReLU,
    torch.nn.PReLU: AppliedPReLU,
    torch.nn.SiLU: AppliedSiLU,
    torch.nn.Tanh: AppliedTanh,
    torch.nn.ELU: AppliedELU,
}

_NAMES: dict[type[torch.nn.Module], str] = {
    torch.nn.ReLU: "relu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.PReLU: "prelu",
    torch.nn.SiLU: "silu",
    torch.nn.Tanh: "tanh",
    torch.nn.ELU: "elu",
}


def name_of(module: torch.nn.Module) -> str:
    """The name by which kernels know an activation module, applied or not."""
    return next(name for stock, name in _NAMES.items() if isinstance(module, stock))


def activation_module(name: str, negative_slope: float, **factory: Any) -> torch.nn.Module | None:
    """A module that applies the activation itself; None for the identity.

    Raises:
        ValueError: no such activation.
    """
    if name == "identity":
        return None
    if name == "leaky_relu":
        return LeakyReLU(negative_slope)
    if name not in _NAMES.values():
        raise ValueError(f"expected an activation among identity, {', '.join(_NAMES.values())}, got {name!r}")
    stock = next(stock for stock, known in _NAMES.items() if known == name)
    return stock(**factory) if name == "prelu" else stock()


def applied_module(name: str, negative_slope: float, **factory: Any) -> torch.nn.Module | None:
    """The module that stands for an activation which the one before it applies; None for the identity.

    Raises:
        ValueError: no such activation.
    """
    module = activation_module(name, negative_slope, **factory)
    if module is not None:
        module.__class__ = next(applied for stock, applied in APPLIED.items() if isinstance(module, stock))
    return module
