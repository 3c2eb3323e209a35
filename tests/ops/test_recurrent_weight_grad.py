"""The weight gradients of the recurrence against sums over single steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuseblock.ops._recurrent_weight_grad import projection_weight_grad, recurrent_weight_grads

TIME, HIDDEN, PROJ = 4, 2, 3


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def summed(delta: list[Tensor], y: list[Tensor], h0: Tensor | None, reverse: bool) -> Tensor:
    """The sum of outer(delta_t, h_{t-1}) over the steps of one row."""
    if reverse:
        delta, y = delta[::-1], y[::-1]
    before = [torch.zeros(PROJ, dtype=torch.float64) if h0 is None else h0, *y]
    total = torch.zeros(4 * HIDDEN, PROJ, dtype=torch.float64)
    return total + sum(torch.outer(d, h) for d, h in zip(delta, before, strict=False))


@pytest.mark.parametrize("with_h0", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", [None, (4, 0, 2), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("time", [1, TIME])
def test_padded(time: int, lengths: tuple[int, ...] | None, directions: int, with_h0: bool) -> None:
    batch = 3
    of = [time] * batch if lengths is None else [min(n, time) for n in lengths]
    inside = torch.arange(time)[:, None, None] < torch.tensor(of)[None, :, None]
    delta = new(time, batch, directions * 4 * HIDDEN) * inside
    y = new(time, batch, directions * PROJ) * inside
    h0 = new(directions, batch, PROJ) if with_h0 else None
    got = recurrent_weight_grads(
        new(directions, batch, HIDDEN), delta, y, h0, None if lengths is None else torch.tensor(of), None
    )
    for d in range(directions):
        delta_d, y_d = delta.chunk(directions, -1)[d], y.chunk(directions, -1)[d]
        want = sum(
            summed(list(delta_d[: of[b], b]), list(y_d[: of[b], b]), None if h0 is None else h0[d, b], d == 1)
            for b in range(batch)
        )
        torch.testing.assert_close(got[d], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_h0", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", [(3, 3, 2, 1), (1,), (4, 1, 1), (2, 2)], ids=str)
def test_packed(sizes: tuple[int, ...], directions: int, with_h0: bool) -> None:
    batch, rows = sizes[0], sum(sizes)
    delta, y = new(rows, directions * 4 * HIDDEN), new(rows, directions * PROJ)
    h0 = new(directions, batch, PROJ) if with_h0 else None
    got = recurrent_weight_grads(new(directions, batch, HIDDEN), delta, y, h0, None, torch.tensor(sizes))
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    for d in range(directions):
        delta_d, y_d = delta.chunk(directions, -1)[d], y.chunk(directions, -1)[d]
        want = torch.zeros(4 * HIDDEN, PROJ, dtype=torch.float64)
        for b in range(batch):
            own = [start + b for start, size in zip(starts, sizes, strict=True) if b < size]
            want += summed(list(delta_d[own]), list(y_d[own]), None if h0 is None else h0[d, b], d == 1)
        torch.testing.assert_close(got[d], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("directions", [1, 2])
def test_projection(directions: int) -> None:
    dh, m = new(TIME, 5, directions * PROJ), new(TIME, 5, directions * HIDDEN)
    got = projection_weight_grad(directions, dh, m)
    for d in range(directions):
        want = torch.einsum("tbp,tbh->ph", dh.chunk(directions, -1)[d], m.chunk(directions, -1)[d])
        torch.testing.assert_close(got[d], want, rtol=1e-12, atol=1e-12)
