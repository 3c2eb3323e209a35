"""Activations by themselves: those that fuseblock's kernels improve, and those that a module before them has applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._rectifier import can_rectify, rectify


class _Rectifier:
    #: Whether the input is an output that nothing else reads, as a convolution's is: then the result is written over it.
    overwrites = False

    def _rectified(self, input: Tensor, negative_slope: float | None, inplace: bool) -> Tensor:
        # A view's base would have to follow it through autograd.
        return rectify(input, negative_slope, inplace or (self.overwrites and not input._is_view()))


class ReLU(_Rectifier, torch.nn.ReLU):
    """A drop-in replacement of `torch.nn.ReLU` whose undefined gradients stay undefined.

    A gradient penalty that is backpropagated by itself then does not run zeros through the network.
    """

    def forward(self, input: Tensor) -> Tensor:
        """max(x, 0) for any shape."""
        if can_rectify(input, 0):
            return self._rectified(input, None, self.inplace)
        return super().forward(input)


class LeakyReLU(_Rectifier, torch.nn.LeakyReLU):
    """A drop-in replacement of `torch.nn.LeakyReLU` that does not save its input for backward.

    After a convolution, as `fuseblock.fuse` and the blocks of this package know it, the result is written over the
    convolution's output, and so it is with ``inplace=True``; elsewhere one bit per element is saved. An undefined gradient
    stays undefined: a gradient penalty that is backpropagated by itself does not run zeros through the network.
    """

    def forward(self, input: Tensor) -> Tensor:
        """max(x, 0) + negative_slope min(x, 0) for any shape."""
        without_bits = input.dim() < 2 or ((self.overwrites or self.inplace) and input.is_cpu)
        if without_bits and can_rectify(input, self.negative_slope):
            return self._rectified(input, self.negative_slope, self.inplace)
        if self.inplace or input.dim() < 2:
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


def activation_module(
    name: str, negative_slope: float, overwrites: bool = False, **factory: Any
) -> torch.nn.Module | None:
    """A module that applies the activation itself; None for the identity.

    Args:
        name: of the activation.
        negative_slope: of leaky_relu.
        overwrites: nothing else reads its input, so that a rectifier may write its result there.

    Raises:
        ValueError: no such activation.
    """
    if name == "identity":
        return None
    if name not in _NAMES.values():
        raise ValueError(f"expected an activation among identity, {', '.join(_NAMES.values())}, got {name!r}")
    if name in ("relu", "leaky_relu"):
        rectifier = ReLU() if name == "relu" else LeakyReLU(negative_slope)
        if overwrites:
            rectifier.overwrites = True
        return rectifier
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
