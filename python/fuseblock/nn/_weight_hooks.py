"""Hooks that make a layer's weight before it runs, spectral norm's: of this package, and `torch.nn.utils.spectral_norm`.

They see nothing of a call, so that a layer may run together with its neighbours under them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.spectral_norm import SpectralNorm

from .spectral_norm import BatchedSpectralNorm


def see_calls(hooks: Iterable[Callable[..., Any]]) -> bool:
    """Whether hooks do more than make the parameter ``weight_orig`` a weight."""
    owners = (getattr(hook, "__self__", hook) for hook in hooks)
    return not all(
        isinstance(owner, (SpectralNorm, BatchedSpectralNorm)) and owner.name == "weight" for owner in owners
    )


def parameter_of(layer: torch.nn.Module) -> Tensor:
    """What the weight is made of, of its shape, dtype and layout; the weight itself where no hook makes it."""
    weight: Tensor | None = getattr(layer, "weight_orig", None)  # no parameter in replicas of DataParallel
    return layer.weight if weight is None else weight  # type: ignore[return-value]


@contextmanager
def weight_of(layer: torch.nn.Module, input: Tensor) -> Iterator[Tensor]:
    """The weight within a call of the layer that its hooks see and its class's forward does not."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, (input,))
    try:
        yield layer.weight  # type: ignore[misc]
    finally:
        for after in layer._forward_hooks.values():
            after(layer, (input,), None)
