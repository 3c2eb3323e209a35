"""The error bound that every operator's tests use, and outputs poisoned beforehand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
    return _ratio(relative_error(got, want), stock_error, got.dtype, longest_sum)


def _ratio(error: float, stock_error: float, dtype: torch.dtype, longest_sum: int) -> float:
    eps = torch.finfo(dtype).eps
    ratio = error / (longest_sum * eps if dtype == torch.float64 else 2 * stock_error + eps)
    ratio = ratio if ratio == ratio else float("inf")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]
    if ratio > WORST.get(str(dtype), (-1.0, ""))[0]:
        WORST[str(dtype)] = ratio, test
    return ratio


@dataclass(frozen=True)
class Orders:
    """Results of one draw of random operands, and what they should be: lists of each order of derivative."""

    got: Sequence[Sequence[Tensor]]
    want: Sequence[Sequence[Tensor]]
    stock: Sequence[Sequence[Tensor]]


def check_orders(values: int, dtype: torch.dtype, longest_sum: int, draw: Callable[[int], Orders]) -> None:
    """Hold every result to `error_ratio`'s bound: of tensors of a few values, whose error is mostly luck, on average."""
    draws = 1 if values >= 500 else 4
    errors: dict[tuple[int, int], float] = {}
    stock_errors = [0.0, 0.0, 0.0]
    for n in range(draws):
        drawn = draw(n)
        for order, (got, want, stock) in enumerate(zip(drawn.got, drawn.want, drawn.stock, strict=True)):
            stock_errors[order] += max(map(relative_error, stock, want)) / draws
            for k, (g, w) in enumerate(zip(got, want, strict=True)):
                errors[order, k] = errors.get((order, k), 0.0) + relative_error(g, w) / draws
    for (order, k), error in errors.items():
        ratio = _ratio(error, stock_errors[order], dtype, longest_sum)
        assert ratio <= 1, f"order {order}, output {k}: error {ratio:.3g} times the allowed one"
