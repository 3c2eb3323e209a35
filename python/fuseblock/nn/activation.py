"""Activations: those that fuseblock's kernels improve, and those that a norm before them usually applies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from .. import dispatch, functional
from .._rectifier import can_rectify, rectify, rectify_over
from ._weight_hooks import see_calls


class ReLU(torch.nn.ReLU):
    """A drop-in replacement of `torch.nn.ReLU` whose undefined gradients stay undefined.

    A gradient penalty that is backpropagated by itself then does not run zeros through the network.
    """

    def forward(self, input: Tensor) -> Tensor:
        """max(x, 0) for any shape."""
        return rectify(input, None, self.inplace) if can_rectify(input, 0) else super().forward(input)


class LeakyReLU(torch.nn.LeakyReLU):
    """A drop-in replacement of `torch.nn.LeakyReLU` that saves one bit per element for backward, not its input.

    So from 32,768 elements on, below which the input is saved. An undefined gradient stays undefined: a gradient penalty
    that is backpropagated by itself does not run zeros through the network.
    """

    def forward(self, input: Tensor) -> Tensor:
        """max(x, 0) + negative_slope min(x, 0) for any shape."""
        if not self.inplace and input.dim() > 1:
            return functional.bias_act(input, activation="leaky_relu", negative_slope=self.negative_slope)
        if can_rectify(input, self.negative_slope):
            return rectify(input, self.negative_slope, self.inplace)
        return super().forward(input)


def activate_over(act: torch.nn.Module, x: Tensor, is_kept: bool = False) -> Tensor:
    """``act(x)`` for an x that nobody else reads; a rectifier of this package is written over it where that is faster.

    ``is_kept``: whoever reads the result next keeps it for backward.
    """
    # A forced backend runs the activation itself, or says why it cannot.
    plain = x.is_cpu and not is_compiling() and dispatch.forced() == "auto"
    if plain and not x._is_view() and not unusual(act):
        if type(act) is ReLU and can_rectify(x, 0):
            return rectify_over(x, None, is_kept)
        if type(act) is LeakyReLU and not act.inplace and can_rectify(x, act.negative_slope):
            return rectify_over(x, act.negative_slope, is_kept)
    activated: Tensor = act(x)
    return activated


def unusual(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward: hooks, a forward of its own, or a compiled one."""
    return bool(module._forward_pre_hooks) or shows_output(module)


def shows_output(module: torch.nn.Module) -> bool:
    """Whether others may see, or make, what a call of the module returns."""
    return bool(
        (module._forward_hooks and see_calls(module._forward_hooks.values()))
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    )


class _Applied(torch.nn.Module):
    """The activation behind a norm that usually has applied it: then the input, marked by the norm, is returned.

    The norm decides anew at every call. A norm that was replaced meanwhile marks nothing, and the activation is applied.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input itself, or what the stock activation makes of it."""
        if not is_compiling() and getattr(input, _MARK, None) is self:
            return input
        activated: Tensor = super().forward(input)
        return activated


_MARK = "_fuseblock_applied"


def mark(y: Tensor, act: torch.nn.Module) -> Tensor:
    """y, known to ``act``, an applied module, as its own result."""
    setattr(y, _MARK, act)
    return y


class AppliedReLU(_Applied, torch.nn.ReLU):
    """A ReLU that the norm before it applies."""


class AppliedLeakyReLU(_Applied, torch.nn.LeakyReLU):
    """A LeakyReLU that the norm before it applies."""


class AppliedPReLU(_Applied, torch.nn.PReLU):
    """A PReLU that the norm before it applies."""


class AppliedSiLU(_Applied, torch.nn.SiLU):
    """A SiLU that the norm before it applies."""


class AppliedTanh(_Applied, torch.nn.Tanh):
    """A Tanh that the norm before it applies."""


class AppliedELU(_Applied, torch.nn.ELU):
    """An ELU that the norm before it applies."""


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
_NAME_OF = {
    **_NAMES,
    **{applied: _NAMES[stock] for stock, applied in APPLIED.items()},
    ReLU: "relu",
    LeakyReLU: "leaky_relu",
}


def name_of(act: torch.nn.Module) -> str | None:
    """The name by which kernels know an activation module of an exact class; None if they do not know it."""
    if isinstance(act, torch.nn.ELU) and act.alpha != 1:
        return None
    return _NAME_OF.get(type(act))


def activation_module(name: str, negative_slope: float, **factory: Any) -> torch.nn.Module | None:
    """A module that applies the activation itself; None for the identity.

    Raises:
        ValueError: no such activation.
    """
    if name == "identity":
        return None
    if name == "relu":
        return ReLU()
    if name == "leaky_relu":
        return LeakyReLU(negative_slope)
    if name not in _NAMES.values():
        raise ValueError(f"expected an activation among identity, {', '.join(_NAMES.values())}, got {name!r}")
    stock = next(stock for stock, known in _NAMES.items() if known == name)
    return stock(**factory) if name == "prelu" else stock()
