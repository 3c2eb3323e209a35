"""The error bound that every operator's tests use, and outputs poisoned beforehand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Largest error over the allowed one so far, and the test that met it, by dtype; printed when the tests end.
WORST: dict[str, tuple[float, str]] = {}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Memory from torch.empty holds NaN meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    # warn_only: on a GPU, matrix products complain about their workspace.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _largest(want: Tensor) -> float:
    return max(want.abs().max().item(), torch.finfo(torch.float64).tiny)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest value."""
    if want.numel() == 0:
        return 0.0
    return (got.double() - want).abs().max().item() / _largest(want)


def error_ratio(got: Tensor, want: Tensor, stock_error: float, longest_sum: int) -> float:
    """The largest error over the allowed one: 1 is the limit.

    Allowed are twice stock PyTorch's error in the same dtype and one unit in the last place of the largest value; in
    float64, where `want` is itself rounded, `longest_sum` such units. Stock's is its worst over the outputs of a call.
    """
    eps = torch.finfo(got.dtype).eps
    allowed = longest_sum * eps if got.dtype == torch.float64 else 2 * stock_error + eps
    ratio = relative_error(got, want) / allowed
    ratio = ratio if ratio == ratio else float("inf")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]
    if ratio > WORST.get(str(got.dtype), (-1.0, ""))[0]:
        WORST[str(got.dtype)] = ratio, test
    return ratio
