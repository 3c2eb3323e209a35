"""One LSTM layer over a whole sequence, in plain PyTorch.

Per direction and step, with activated gates i, f, g, o of the pre-activations ``gx_t + h W_hh^T``:

    c_t = f * c_{t-1} + i * g        m_t = o * tanh(c_t)        h_t = m_t, or W_hr m_t with a projection

Shapes, layouts and the treatment of ragged batches are those of `fuseblock.ops.lstm_recurrence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._library import state_dtype
from ._adjoint import adjoint
from .lstm_gates import activate, step_bwd


@dataclass(frozen=True)
class _Step:
    """One time step: which rows of the (T, B, ...) or packed (N, ...) tensors it owns, and who is active in it."""

    t: int
    rows: slice  # of the tensor flattened to (N, ...)
    active: Tensor | None  # (n, 1) bool; None when all of the rows are


def _steps(batch: int, time: int, lengths: Tensor | None, batch_sizes: Tensor | None) -> list[_Step]:
    if batch_sizes is not None:
        ends = batch_sizes.cumsum(0).tolist()
        return [
            _Step(t, slice(end - n, end), None)
            for t, (end, n) in enumerate(zip(ends, batch_sizes.tolist(), strict=True))
        ]
    masks = [None] * time if lengths is None else [(t < lengths).unsqueeze(1) for t in range(time)]
    return [_Step(t, slice(t * batch, (t + 1) * batch), mask) for t, mask in enumerate(masks)]


def _where(active: Tensor | None, value: Tensor, other: Tensor | float) -> Tensor:
    return value if active is None else torch.where(active, value, other)


def _replace_first(rows: Tensor, head: Tensor) -> Tensor:
    """``rows`` with its first ``len(head)`` rows replaced."""
    return head if head.shape[0] == rows.shape[0] else torch.cat([head, rows[head.shape[0] :]])


def _join(per_direction: Sequence[dict[int, Tensor]], like: Tensor) -> Tensor:
    """Per-step rows of each direction -> one tensor shaped like ``like`` but for its last dimension."""
    columns = [torch.cat([steps[t] for t in sorted(steps)]) for steps in per_direction]
    joined = torch.cat(columns, dim=-1)
    return joined.reshape(*like.shape[:-1], joined.shape[-1])


def _flat(x: Tensor, direction: int, width: int) -> Tensor:
    """(rows, width): the columns of one direction, time and batch merged."""
    return x.reshape(-1, x.shape[-1])[:, direction * width : (direction + 1) * width]


def lstm_recurrence_reference(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    save_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, gates, c); differentiable to any order and in forward mode, no autograd formula of its own."""
    directions, batch, hidden = c0.shape
    wide = state_dtype(gx.dtype)
    steps = _steps(batch, gx.shape[0], lengths, batch_sizes)
    ys, all_gates, cs, h_n, c_n = [], [], [], [], []
    for d in range(directions):
        pre = _flat(gx, d, 4 * hidden).to(wide)
        w_t = w_hh[d].to(wide).t()
        h, c = h0[d].to(wide), c0[d]
        y_steps: dict[int, Tensor] = {}
        gate_steps: dict[int, Tensor] = {}
        c_steps: dict[int, Tensor] = {}
        for step in steps if d == 0 else reversed(steps):
            a = pre[step.rows]
            n = a.shape[0]
            i, f, g, o = activate(a + h[:n] @ w_t)
            c_new = f * c[:n] + i * g
            m = o * torch.tanh(c_new)
            h_new = m if w_hr is None else m @ w_hr[d].to(wide).t()
            h_new = h_new.to(gx.dtype).to(wide)  # the carried h is the one that y shows
            c_new = _where(step.active, c_new, c[:n])
            y_steps[step.t] = _where(step.active, h_new, 0.0)
            gate_steps[step.t] = _where(step.active, torch.cat([i, f, g, o], dim=-1), 0.0)
            c_steps[step.t] = c_new
            h = _replace_first(h, _where(step.active, h_new, h[:n]))
            c = _replace_first(c, c_new)
        ys.append(y_steps)
        all_gates.append(gate_steps)
        cs.append(c_steps)
        h_n.append(h)
        c_n.append(c)
    y = _join(ys, gx).to(gx.dtype)
    h_last, c_last = torch.stack(h_n).to(gx.dtype), torch.stack(c_n)
    if not save_state:
        return y, h_last, c_last, gx.new_empty(0), c0.new_empty(0)
    return y, h_last, c_last, _join(all_gates, gx).to(gx.dtype), _join(cs, gx)


def _backward_order(steps: list[_Step], direction: int) -> Iterator[tuple[_Step, _Step | None]]:
    """(step, the step processed before it in the forward pass), last processed first."""
    processed = steps if direction == 0 else steps[::-1]
    for k in range(len(processed) - 1, -1, -1):
        yield processed[k], processed[k - 1] if k else None


def lstm_recurrence_bwd_reference(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    *,
    dm_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dgx, dh0, dc0, dh): gradients given those of every output of `lstm_recurrence_reference`.

    ``dh`` is the total gradient of h_t, given only with a projection (its weight gradient needs it). ``dm_offset``,
    shaped like c, is added to the gradient of m_t: a zero there lets the second order read off that gradient's adjoint.
    """
    directions, batch, hidden = c0.shape
    proj = w_hh.shape[2]
    wide = state_dtype(gates.dtype)
    steps = _steps(batch, gates.shape[0], lengths, batch_sizes)
    dgx, dh_total, dh0, dc0 = [], [], [], []
    for d in range(directions):
        acts_d, c_d, w = _flat(gates, d, 4 * hidden).to(wide), _flat(c, d, hidden), w_hh[d].to(wide)
        dy_d = None if dy is None else _flat(dy, d, proj).to(wide)
        d_gates_d = None if d_gates is None else _flat(d_gates, d, 4 * hidden).to(wide)
        d_c_d = None if d_c is None else _flat(d_c, d, hidden)
        dh = c0.new_zeros(batch, proj) if dh_n is None else dh_n[d].to(wide)
        dc = torch.zeros_like(c0[d]) if dc_n is None else dc_n[d]
        delta_steps: dict[int, Tensor] = {}
        dh_steps: dict[int, Tensor] = {}
        for step, before in _backward_order(steps, d):
            acts = acts_d[step.rows]
            n = acts.shape[0]
            c_prev = c0[d][:n] if before is None else _replace_first(c0[d][:n], c_d[before.rows][:n])
            dh_t = dh[:n] if dy_d is None else dh[:n] + _where(step.active, dy_d[step.rows], 0.0)
            dm = dh_t if w_hr is None else dh_t @ w_hr[d].to(wide)
            if dm_offset is not None:
                dm = dm + _flat(dm_offset, d, hidden)[step.rows]
            dc_t = dc[:n] if d_c_d is None else dc[:n] + d_c_d[step.rows]
            ext = None if d_gates_d is None else d_gates_d[step.rows].chunk(4, -1)
            delta, dc_prev = step_bwd(acts.chunk(4, -1), c_prev, c_d[step.rows], dm, dc_t, ext)  # type: ignore[arg-type]
            delta = _where(step.active, delta, 0.0)
            dh_prev = delta.to(gates.dtype).to(wide) @ w
            delta_steps[step.t] = delta
            dh_steps[step.t] = _where(step.active, dh_t, 0.0)
            dh = _replace_first(
                dh, dh_prev if step.active is None else torch.where(step.active, dh_prev, dh_t)
            )
            dc = _replace_first(dc, _where(step.active, dc_prev, dc_t))
        dgx.append(delta_steps)
        dh_total.append(dh_steps)
        dh0.append(dh)
        dc0.append(dc)
    total = gates.new_empty(0) if w_hr is None else _join(dh_total, gates).to(gates.dtype)
    return _join(dgx, gates).to(gates.dtype), torch.stack(dh0).to(gates.dtype), torch.stack(dc0), total


def lstm_recurrence_bwd_bwd_reference(
    v_dgx: Tensor | None,
    v_dh0: Tensor | None,
    v_dc0: Tensor | None,
    v_dh: Tensor | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    dgx: Tensor,
) -> tuple[Tensor, ...]:
    """Adjoint of `lstm_recurrence_bwd_reference`: (a_dy, a_dh_n, a_dc_n, a_d_gates, a_d_c, a_gates, a_c, a_c0, m_bar).

    ``m_bar``, the adjoint of the gradient of m_t, is given only with a projection. ``dgx`` is not needed here: this
    reference differentiates the first-order reference, so that it checks the hand-derived sweep independently.
    """
    del dgx
    directions, batch, hidden = c0.shape
    proj = w_hh.shape[2]
    zeros = (
        gates.new_zeros(*gates.shape[:-1], directions * proj),
        gates.new_zeros(directions, batch, proj),
        torch.zeros_like(c0),
        torch.zeros_like(gates),
        torch.zeros_like(c),
    )
    given = (dy, dh_n, dc_n, d_gates, d_c)
    incoming = [zero if x is None else x for zero, x in zip(zeros, given, strict=True)]

    def first_order(*args: Tensor) -> tuple[Tensor, ...]:
        dy, dh_n, dc_n, d_gates, d_c, gates, c, c0, dm_offset = args
        return lstm_recurrence_bwd_reference(
            dy, dh_n, dc_n, d_gates, d_c, gates, c, c0, w_hh, w_hr, lengths, batch_sizes, dm_offset=dm_offset
        )

    cotangents = [v_dgx, v_dh0, v_dc0, None if w_hr is None else v_dh]
    *adjoints, m_bar = adjoint(first_order, (*incoming, gates, c, c0, torch.zeros_like(c)), cotangents)
    return (*adjoints, gates.new_empty(0) if w_hr is None else m_bar.to(gates.dtype))
