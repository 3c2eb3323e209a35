"""Inputs for tests of kernels that do a whole layer, input projection included, and their bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fuseblock._recompute import LayerWeights
from fuseblock.launch.cuda_lstm_layer import LayerKernel, lstm_layer

from . import plain_lstm
from .bounds import poisoned_outputs, state_dtype
from .lstm_cases import Draw, LstmCase, assert_outputs
from .resident_cases import case

#: x, h0, c0, the weights of each direction, lengths.
Arguments = tuple[Tensor, Tensor, Tensor, list[LayerWeights], Tensor | None]


@dataclass(frozen=True)
class LayerCase:
    """A layer with I columns of x, and how x lies in memory."""

    problem: LstmCase
    inputs: int
    biased: bool = True

    def arguments(self, draw: LstmCase, dtype: torch.dtype) -> Arguments:
        """In `dtype`, h0 and weights that it can hold."""
        _, h0, c0, w_hh, _, lengths = draw.inputs(dtype)
        d, rows = draw.directions, 4 * draw.hidden
        x = draw.normal(5, draw.n_steps, draw.batch, self.inputs).to(dtype)
        w_ih = (draw.normal(6, d, rows, self.inputs) * self.inputs**-0.5).to(dtype)
        b = draw.normal(7, 2, d, rows).to(dtype) if self.biased else [[None] * d] * 2
        own: list[LayerWeights] = [(w_ih[n], w_hh[n], b[0][n], b[1][n], None) for n in range(d)]
        return x, h0, c0, own, lengths


def plain(arguments: Arguments, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(y, h_n, c_n, gates, c) of PyTorch's operations in `dtype`."""
    x, h0, c0, own, lengths = arguments

    def cast(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.to(dtype)

    gx = []
    for w_ih, _, b_ih, b_hh, _ in own:
        b = None if b_ih is None or b_hh is None else b_ih.to(dtype) + b_hh.to(dtype)
        gx.append(linear(x.to(dtype), w_ih.to(dtype), b))
    w_hh = torch.stack([w[1] for w in own])
    return plain_lstm.forward(torch.cat(gx, -1), cast(h0), cast(c0), cast(w_hh), None, lengths)


def layer_case(
    steps: int, batch: int, hidden: int, inputs: int, directions: int, ragged: bool, biased: bool
) -> LayerCase:
    """With lengths as in `resident_cases.case`."""
    return LayerCase(case(steps, batch, hidden, directions, ragged), inputs, biased)


def run(
    kernel: LayerKernel, arguments: Arguments, save_state: bool = True, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """(y, h_n, c_n, gates, c) of a launch on a device."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) and device != "cpu" else x

    *states, own, lengths = arguments
    weights: Any = [tuple(map(moved, w)) for w in own]
    outputs = lstm_layer(kernel, *map(moved, states), weights, moved(lengths), save_state)
    return tuple(x.cpu() for x in outputs)


def check(kernel: LayerKernel, layer: LayerCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Check a launch with and without saved state against float64."""
    full: list[Draw] = []
    short: list[Draw] = []
    for draw in layer.problem.draws:
        arguments = layer.arguments(draw, dtype)
        want, stock = plain(arguments, torch.float64), plain(arguments, dtype)
        with poisoned_outputs():
            full.append((run(kernel, arguments, device=device), want, stock))
            *states, gates, c = run(kernel, arguments, False, device)
        assert gates.shape == c.shape == (0,)
        short.append((states, want[:3], stock[:3]))
    dtypes = (dtype, dtype, state_dtype(dtype), dtype, state_dtype(dtype))
    assert_outputs("y h_n c_n gates c", full, dtypes, layer.problem.longest_sum)
    assert_outputs("y h_n c_n", short, dtypes[:3], layer.problem.longest_sum)
