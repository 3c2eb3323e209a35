"""The gate that every row passes before its speed is shown.

A result is compared with a float64 run of PyTorch's own layer on equal values. For each tensor

    bound = 2 * (error of PyTorch's layer in the tested dtype) + 1 ulp of the largest float64 value

PyTorch's error is its worst over the result's tensors, each relative to its largest value: in a single tensor it may be
small by luck of one draw. Where PyTorch cannot run in that dtype, or the dtype is float64 itself, the bound is
``n * eps * largest value`` with n the number of terms in the longest chain of sums. There are no other tolerances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """How a provider's results compare with the bound.

    Attributes:
        ratio: the largest ratio of error to bound over all tensors; at most 1 is green.
        tensor: the tensor with that ratio.
        error, bound: its error and bound.
    """

    ratio: float
    tensor: str
    error: float
    bound: float

    @property
    def green(self) -> bool:
        """Whether the results are right."""
        return self.ratio <= 1


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between ``value`` and the next larger number of ``dtype`` (a power of two; 0 counts as tiny)."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(value), info.tiny))[1] - 1
    return info.eps * 2.0**exponent


def largest_error(got: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite for a wrong shape or where only one of the two is finite."""
    if got.shape != reference.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    difference = float((got.detach().to(reference) - reference).abs().max())
    return difference if math.isfinite(difference) else math.inf


def largest_value(x: Tensor) -> float:
    """Largest absolute value; 0 for an empty tensor."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def check(
    got: Results, reference: Results, stock: Results | None, *, dtype: torch.dtype, terms: int
) -> Verdict:
    """Compare results with the bound.

    Args:
        got: the provider's results.
        reference: the float64 results; a tensor of it that ``got`` lacks makes the verdict red.
        stock: results of PyTorch's layer in ``dtype``, or None where it cannot run.
        dtype: the tested dtype.
        terms: number of terms in the longest chain of sums (used without ``stock`` and in float64).
    """
    worst = Verdict(-1.0, "", 0.0, 0.0)
    largest_values = {name: largest_value(expected) for name, expected in reference.items()}
    relative = 0.0
    if stock is not None:
        errors = {name: largest_error(stock[name], expected) for name, expected in reference.items()}
        relative = max(errors[name] / largest for name, largest in largest_values.items() if largest > 0)
    for name, expected in reference.items():
        largest = largest_values[name]
        if stock is None or dtype == torch.float64:
            bound = terms * torch.finfo(dtype).eps * largest
        else:
            bound = 2 * relative * largest + ulp(largest, dtype)
        error = largest_error(got[name], expected) if name in got else math.inf
        ratio = error / bound if bound > 0 else (0.0 if error == 0 else math.inf)
        if ratio > worst.ratio or math.isnan(ratio):
            worst = Verdict(math.inf if math.isnan(ratio) else ratio, name, error, bound)
    return worst
