"""Cases of batch norm and activation for tests of every size and backend: operands, right results, what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseblock._activations import activate

from .bounds import Orders, check_orders, state_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS, SLOPE = 1e-3, 0.2


def last(x: Tensor) -> Tensor:
    """The same values with the channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    activation: str
    residual: bool = False
    channels_last: bool = False
    training: bool = True
    affine: bool = True
    draw: int = 0  # of random numbers

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.activation]
        words += ["residual"] * self.residual + ["last"] * self.channels_last
        return "-".join(words + ["eval"] * (not self.training) + ["plain"] * (not self.affine))

    def full(self, seed: int, dtype: torch.dtype, shift: float = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 100 * self.draw)
        x = (torch.randn(self.shape, generator=generator, dtype=torch.float64) + shift).to(dtype)
        return last(x) if self.channels_last else x

    def channels(self, seed: int, dtype: torch.dtype, low: float = 0.0) -> Tensor:
        """Values that `dtype` holds exactly, in the dtype of the statistics."""
        generator = torch.Generator().manual_seed(seed + 100 * self.draw)
        values = torch.randn(self.shape[1], generator=generator, dtype=torch.float64)
        return (values.abs() + low if low else values).to(dtype).to(state_dtype(dtype))

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """(x, weight, bias, residual, slope, mean, var)."""
        return (
            self.full(0, dtype, shift=0.5),
            self.channels(1, dtype) if self.affine else None,
            self.channels(2, dtype) if self.affine else None,
            self.full(3, dtype) if self.residual else None,
            self.channels(4, dtype) if self.activation == "prelu" else None,
            None if self.training else self.channels(5, dtype),
            None if self.training else self.channels(6, dtype, low=0.5),
        )

    @property
    def longest_sum(self) -> int:
        return 16 * torch.Size(self.shape).numel() // self.shape[1] + 64


def composite(
    x: Tensor, weight: Any, bias: Any, residual: Any, slope: Any, mean: Any, var: Any, activation: str
) -> Tensor:
    """What PyTorch users write by hand, in the dtype of x."""
    own = [None if t is None else t.to(x.dtype) for t in (weight, bias, mean, var, slope)]
    weight, bias, mean, var, slope = own
    z = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.1, EPS)
    z = z if residual is None else z + residual
    slope = None if slope is None else slope.view(1, -1, *(1,) * (x.dim() - 2))
    return activate(z, activation, SLOPE, slope)


def derivatives(case: Case, inputs: Any, dy: Tensor, v: Any, dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs, first and second derivatives of the composite in one dtype, in the order of the op's."""
    cast = [None if t is None else t.detach().to(dtype) for t in inputs]
    leaves = [None if t is None else t.requires_grad_() for t in cast[:5]]
    dy = dy.detach().to(dtype).requires_grad_()
    y = composite(*leaves, *cast[5:], case.activation)
    x, weight, bias, residual, slope = leaves
    order = [t for t in (x, weight, bias, slope, residual) if t is not None]
    first = torch.autograd.grad(y, order, dy, create_graph=True)
    v = [
        t.to(dtype) for t, leaf in zip(v, (x, weight, bias, slope, residual), strict=True) if leaf is not None
    ]
    order = [t for t in (dy, x, weight, bias, residual, slope) if t is not None]
    second = torch.autograd.grad(first, order, v, allow_unused=True, materialize_grads=True)
    return [[y.detach()], [t.detach() for t in first], list(second)]


def is_curved(case: Case) -> bool:
    return case.activation in ("prelu", "silu", "tanh", "elu")


@dataclass(frozen=True)
class Problem:
    """A case's tensors, and the results of all orders: right ones, and PyTorch's in that dtype."""

    inputs: tuple[Tensor | None, ...]
    dy: Tensor
    v: list[Tensor]
    want: list[list[Tensor]]
    stock: list[list[Tensor]]


def problem(case: Case, dtype: torch.dtype) -> Problem:
    inputs, dy = case.inputs(dtype), case.full(10, dtype)
    v = [case.full(11, dtype), *(case.channels(n, dtype) for n in (12, 13, 14)), case.full(15, dtype)]
    want, stock = (derivatives(case, inputs, dy, v, d) for d in (torch.float64, dtype))
    if not is_curved(case):  # the adjoints of bias and residual are zero: the op leaves them out
        index = [0, 1, 2][: 2 + case.affine]
        want[2], stock[2] = ([order[2][k] for k in index] for order in (want, stock))
    return Problem(inputs, dy, v, want, stock)


def check(case: Case, dtype: torch.dtype, run: Callable[[Case], Orders]) -> None:
    """Hold what `run` returns of a case to the bound."""
    values = torch.Size(case.shape).numel()
    check_orders(values, dtype, case.longest_sum, lambda draw: run(replace(case, draw=draw)))


def present(values: Any) -> list[Tensor]:
    """What is there: absent outputs are empty."""
    return [t for t in values if t.numel() > 0]


def options(case: Case) -> tuple[str, float, bool, str, float]:
    return case.activation, SLOPE, case.training, "", EPS
