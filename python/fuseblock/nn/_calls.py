"""Which calls the fused modules take; every other call is left to the torch.nn module's own code.

Most of those are mistakes, and so they raise what torch.nn raises. The few that torch.nn accepts (no rows, complex
numbers, mixed dtypes that promote) give torch.nn's results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuseblock.dispatch import BackendError, forced

State = tuple[Tensor, Tensor]

_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_AUTOCAST_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def is_pair(hx: object) -> bool:
    """Whether hx is a tuple or list of two tensors."""
    return (
        isinstance(hx, (tuple, list))
        and len(hx) == 2
        and isinstance(hx[0], Tensor)
        and isinstance(hx[1], Tensor)
    )


def same_kind(input: Tensor, weight: Tensor, h: Tensor, c: Tensor) -> bool:
    """Equal devices and floating dtypes; under autocast any mix of the dtypes that it casts."""
    device, dtype = input.device, input.dtype
    if not device == weight.device == h.device == c.device:
        return False
    if dtype is weight.dtype is h.dtype is c.dtype:
        return dtype in _DTYPES
    return (
        torch.is_autocast_enabled(device.type) and {dtype, weight.dtype, h.dtype, c.dtype} <= _AUTOCAST_DTYPES
    )


def check_not_forced(module: str, input: Tensor) -> None:
    """Raise if a backend was forced: it does not run the call that torch.nn has just run."""
    if input.numel() != 0 and forced() not in ("auto", "aten"):
        raise BackendError(
            f"{module}: only torch.nn runs this mix of dtypes (input {input.dtype}), asked for {forced()}"
        )
