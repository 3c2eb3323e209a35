"""What is run: a case's tensors, and the step of each mode as a function without arguments.

Providers differ only in the layer that they bring; inputs, parameters and the step around the layer are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case

#: ``layer(x) -> (y, h_n, c_n)``; ``y`` is ``(T, B, D*P)``, padded with zeros where ragged. A cell gives ``(h, h, c)``.
Layer = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Step = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A case with its values.

    Attributes:
        case: the sizes.
        state: parameters by their names in `torch.nn.LSTM` (or ``LSTMCell``).
        x: input ``(T, B, I)``, or ``(B, I)`` for a cell.
        hx: initial state for cells and single steps, which carry it from call to call; else None (zeros).
        lengths: int64 ``(B,)`` on x's device, or None.
        grad_y: cotangent of ``y``.
    """

    case: Case
    state: dict[str, Tensor]
    x: Tensor
    hx: tuple[Tensor, Tensor] | None
    lengths: Tensor | None
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype."""
        return Problem(
            self.case,
            {name: value.to(dtype) for name, value in self.state.items()},
            self.x.to(dtype),
            None if self.hx is None else (self.hx[0].to(dtype), self.hx[1].to(dtype)),
            self.lengths,
            self.grad_y.to(dtype),
        )


def stock_module(
    case: Case, kinds: tuple[type, type] = (torch.nn.LSTM, torch.nn.LSTMCell)
) -> torch.nn.Module:
    """A case's module. ``kinds`` is the pair of classes, layer and cell."""
    if case.cell:
        cell: torch.nn.Module = kinds[1](case.input, case.hidden)
        return cell
    layer: torch.nn.Module = kinds[0](
        case.input, case.hidden, case.layers, bidirectional=case.bidirectional, proj_size=case.proj
    )
    return layer


def draw_lengths(case: Case, generator: torch.Generator) -> Tensor:
    """Evenly spread lengths (B,) with the wanted mean and the longest equal to T, in random order: nobody sorts data."""
    shortest = max(1, round(case.time * (2 * case.fill - 1)))
    spread = torch.linspace(case.time, shortest, case.batch).round().long()
    return spread[torch.randperm(case.batch, generator=generator)]


def make_problem(case: Case, *, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """Draw a case's parameters (with the module's own initialisation) and inputs.

    Everything is rounded to ``dtype`` here, so that a float64 run of the same problem starts from equal values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = stock_module(case).state_dict()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    out = case.proj or case.hidden
    lead = (case.batch,) if case.cell else (case.time, case.batch)
    lengths = draw_lengths(case, generator).to(device) if case.ragged else None
    hx = None
    if case.time == 1:
        rows = lead if case.cell else (case.layers * case.directions, case.batch)
        hx = (draw(*rows, out), draw(*rows, case.hidden))
    return Problem(
        case,
        {name: value.to(device=device, dtype=dtype) for name, value in state.items()},
        draw(*lead, case.input),
        hx,
        lengths,
        draw(*lead, out * case.directions),
    )


def make_step(layer: Layer, parameters: dict[str, Tensor], problem: Problem, mode: str) -> Step:
    """The function that a benchmark times: one step of ``mode``; returns every result, by name.

    Gradients are returned rather than accumulated into ``.grad``, which costs all providers the same.
    """
    x = problem.x
    if mode == "forward":

        def forward() -> dict[str, Tensor]:
            y, h, c = layer(x)
            return {"y": y, "h_n": h, "c_n": c}

        return forward

    wanted = dict(parameters)
    if mode == "double" or problem.case.input_grad:
        x = x.detach().requires_grad_()
    if mode == "train":
        if x.requires_grad:
            wanted["x"] = x
        names, sources = ["d_" + name for name in wanted], list(wanted.values())
        grad_y = problem.grad_y

        def train() -> dict[str, Tensor]:
            y, h, c = layer(x)
            grads = torch.autograd.grad(y, sources, grad_y)
            return {"y": y, "h_n": h, "c_n": c, **dict(zip(names, grads, strict=True))}

        return train

    names, sources = ["dd_" + name for name in wanted], list(wanted.values())

    def double() -> dict[str, Tensor]:
        y, _, _ = layer(x)
        (gradient,) = torch.autograd.grad(y.norm(), x, create_graph=True)
        penalty = (gradient.square().sum(-1) + 1e-12).sqrt().sub(1).square().mean()
        grads = torch.autograd.grad(penalty, sources, materialize_grads=True)
        return {"y": y, "penalty": penalty, "d_x": gradient, **dict(zip(names, grads, strict=True))}

    return double
