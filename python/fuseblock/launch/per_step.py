"""The recurrence as one GEMM and one elementwise kernel per time step: any H, projection, lengths, one or two directions.

The driver is shared by the Triton and the CUDA backend. GEMMs are torch's; the elementwise step comes from a *step
namespace*, any object (a module will do) with the three functions of `StepKernels`. Nothing here waits for the device,
so a whole call can be captured in a CUDA graph.

The drivers have the signatures of the ops `lstm_recurrence`, `lstm_recurrence_bwd` and `lstm_recurrence_bwd_bwd`, after
a first argument `steps`. They are called below autograd and do not check shapes: the op has done so.

Rounding of 16-bit tensors: pre-activations once (GEMM and addition of gx in one addmm), h once per step (y is the
carried h), the carried gradient of h once per step, after the GEMM has accumulated it in float32. c and its gradients
stay in the state dtype.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, cast, overload

import torch
from torch import Tensor

_Optional = TypeVar("_Optional", bound=Tensor | None)


class StepKernels(Protocol):
    """The elementwise step of the recurrence, for one direction and one time step.

    All tensors but `lengths` are two-dimensional, (B, H) or (B, 4H) with gate order i, f, g, o. The last dimension is
    contiguous; every tensor has its own row stride. Outputs are allocated by the caller and written in place, every
    element of them unless said otherwise. `T` is the dtype of gx, `S` the state dtype: float32 where T is 16 bit, else T.

    `lengths` is None (all rows are active) or int64 (B,), contiguous, on the device: row b is active where
    t < lengths[b]. Values in tensors that an inactive row must ignore may be NaN, so rows are selected, never multiplied
    by zero. Mathematics is done in S; equations and names are those of csrc/math/lstm_gates.h.

    Aliasing: an output may be the very same view as an input where the docstring says so; each element is read before
    the element at the same place is written. No other overlaps occur.
    """

    def step_fwd(
        self,
        pre: Tensor,
        c_prev: Tensor,
        h_out: Tensor,
        c_out: Tensor,
        acts_out: Tensor | None,
        lengths: Tensor | None,
        t: int,
        h_state: Tensor | None,
    ) -> None:
        """Activate the gates and update the state.

        pre (B, 4H) T: pre-activations. c_prev (B, H) S.
        h_out (B, H) T: m = o * tanh(c'), 0 in inactive rows.
        c_out (B, H) S: c', c_prev in inactive rows. May be c_prev.
        acts_out (B, 4H) T or None: the activated gates, 0 in inactive rows. May be pre.
        h_state (B, H) T or None (always None without lengths): active rows receive m, inactive rows stay untouched.
        """

    def step_bwd(
        self,
        acts: Tensor,
        c_prev: Tensor,
        c_new: Tensor,
        dm: Tensor | None,
        dc: Tensor | None,
        ext: Tensor | None,
        lengths: Tensor | None,
        t: int,
        delta_out: Tensor | None,
        dc_prev_out: Tensor,
        dm_keep: Tensor | None,
        dc_total_out: Tensor | None,
        dy: Tensor | None,
        d_c: Tensor | None,
    ) -> None:
        """First-order backward of the step. None among the inputs means zeros.

        acts (B, 4H) T: activated gates. c_prev, c_new (B, H) S: the cell state before and after the step.
        dm (B, H) T: gradient of m that the later steps carried here. dy (B, H) T: gradient of this step's own output;
        it counts in active rows only. The step uses dm + dy.
        dc (B, H) S: gradient of c' that the later steps carried here. d_c (B, H) S: gradient of the stored c'; it counts
        in every row. The step uses dc + d_c.
        ext (B, 4H) T: gradient of the activated gates, ignored in inactive rows.

        delta_out (B, 4H) T or None: gradient of the pre-activations; 0 in inactive rows.
        dc_prev_out (B, H) S: dc_total * f; dc + d_c in inactive rows. May be dc.
        dm_keep (B, H) T or None (always None without lengths): 0 in active rows, dm in inactive ones. May be dm.
        dc_total_out (B, H) S or None: dc + d_c + (dm + dy) * o * (1 - tanh(c')^2); dc + d_c in inactive rows. May be d_c.
        """

    def step_bwd_bwd(
        self,
        acts: Tensor,
        c_prev: Tensor,
        c_new: Tensor,
        dm: Tensor | None,
        dc_total: Tensor,
        ext: Tensor | None,
        v: Tensor | None,
        v_dc_prev: Tensor | None,
        lengths: Tensor | None,
        t: int,
        a_dm_out: Tensor,
        a_dc_out: Tensor,
        a_ext_out: Tensor | None,
        a_acts_out: Tensor,
        a_c_prev_out: Tensor,
        a_c_new_out: Tensor,
        a_dm_state: Tensor | None,
    ) -> None:
        """Adjoint of step_bwd. None among the inputs means zeros.

        acts, c_prev, c_new, ext as in step_bwd. dm (B, H) T: the whole gradient of m (dm + dy of step_bwd).
        dc_total (B, H) S: as step_bwd returned it. v (B, 4H) T: cotangent of delta. v_dc_prev (B, H) S: of dc_prev.

        a_dm_out (B, H) T: adjoint of dm; 0 in inactive rows.
        a_dc_out (B, H) S: adjoint of dc; v_dc_prev in inactive rows. May be v_dc_prev.
        a_ext_out (B, 4H) T or None: adjoint of ext; 0 in inactive rows. May be v.
        a_acts_out (B, 4H) T: adjoint of the activated gates; 0 in inactive rows.
        a_c_prev_out (B, H) S: the adjoint of c_prev is ADDED to it (nothing in inactive rows).
        a_c_new_out (B, H) S: adjoint of c_new; 0 in inactive rows.
        a_dm_state (B, H) T or None (always None without lengths): active rows receive a_dm, inactive rows stay untouched.
        """


def why_not(gx_or_gates: Tensor, batch_sizes: Tensor | None) -> str | None:
    """The reason why the driver cannot run these arguments, or None."""
    if batch_sizes is not None:
        return "packed sequences (batch_sizes) are not supported by GPU kernels; give lengths instead"
    if gx_or_gates.dim() != 3:
        return f"expected a tensor of shape (T, B, D*4H), got {tuple(gx_or_gates.shape)}"
    return None


def _check(gx_or_gates: Tensor, batch_sizes: Tensor | None) -> None:
    reason = why_not(gx_or_gates, batch_sizes)
    if reason is not None:
        raise ValueError(reason)


def _processing_order(steps: int, direction: int) -> list[int]:
    return list(range(steps)) if direction == 0 else list(range(steps - 1, -1, -1))


def _part(x: _Optional, direction: int, width: int) -> _Optional:
    """One direction's share of a (T, B, D*width) tensor."""
    return x if x is None else cast(_Optional, x[..., direction * width : (direction + 1) * width])


def _at(x: _Optional, t: int) -> _Optional:
    return x if x is None else cast(_Optional, x[t])


def _active_rows(lengths: Tensor | None, steps: int) -> Tensor | None:
    """(T, B, 1) bool, or None."""
    if lengths is None:
        return None
    t = torch.arange(steps, device=lengths.device)
    return (t[:, None] < lengths[None, :]).unsqueeze(-1)


def lstm_recurrence(
    steps: StepKernels,
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence`: (y, h_n, c_n, gates, c)."""
    _check(gx, batch_sizes)
    n_steps, batch, _ = gx.shape
    directions, four_h, proj = w_hh.shape
    hidden = four_h // 4
    y = gx.new_empty(n_steps, batch, directions * proj)
    h_n, c_n = (
        h0.clone(memory_format=torch.contiguous_format),
        c0.clone(memory_format=torch.contiguous_format),
    )
    lengths = _rows(lengths)
    gates = gx.new_empty((n_steps, batch, directions * four_h) if save_state else (0,))
    c = c0.new_empty((n_steps, batch, directions * hidden) if save_state else (0,))
    scratch = gx.new_empty(0 if save_state else batch, four_h)
    m = gx.new_empty(0 if w_hr is None else batch, hidden)
    active = _active_rows(lengths, n_steps) if w_hr is not None else None

    for d in range(directions):
        gx_d, y_d = _part(gx, d, four_h), _part(y, d, proj)
        gates_d = _part(gates, d, four_h) if save_state else None
        c_d = _part(c, d, hidden) if save_state else None
        w_hh_t = w_hh[d].t()
        h, c_prev = h_n[d], c_n[d]
        for t in _processing_order(n_steps, d):
            # With saved state the GEMM writes where the activated gates will stand, and the step works in place.
            pre = scratch if gates_d is None else gates_d[t]
            torch.addmm(gx_d[t], h, w_hh_t, out=pre)
            acts_out = None if gates_d is None else pre
            c_out = c_prev if c_d is None else c_d[t]
            if w_hr is None:
                h_state = None if lengths is None else h_n[d]
                steps.step_fwd(pre, c_prev, y_d[t], c_out, acts_out, lengths, t, h_state)
            else:
                steps.step_fwd(pre, c_prev, m, c_out, acts_out, lengths, t, None)
                torch.mm(m, w_hr[d].t(), out=y_d[t])
                if active is not None:
                    torch.where(active[t], y_d[t], h_n[d], out=h_n[d])
            h = y_d[t] if lengths is None else h_n[d]
            c_prev = c_out
        if lengths is None:
            h_n[d].copy_(h)
        if save_state:
            c_n[d].copy_(c_prev)
    return y, h_n, c_n, gates, c


def lstm_recurrence_bwd(
    steps: StepKernels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence_bwd`: (dgx, dh0, dc0, dh)."""
    _check(gates, batch_sizes)
    n_steps, batch, _ = gates.shape
    directions, four_h, proj = w_hh.shape
    hidden = four_h // 4
    dy, d_gates, d_c = _rows(dy), _rows(d_gates), _rows(d_c)
    c0, lengths = _rows(c0), _rows(lengths)
    dgx = torch.empty_like(gates, memory_format=torch.contiguous_format)
    # The carried gradients live in the outputs that they become.
    dh0 = gates.new_zeros(directions, batch, proj) if dh_n is None else _fresh(dh_n, gates.dtype)
    dc0 = (
        torch.zeros_like(c0, memory_format=torch.contiguous_format)
        if dc_n is None
        else _fresh(dc_n, c0.dtype)
    )
    dh = gates.new_empty((n_steps, batch, directions * proj) if w_hr is not None else (0,))
    dm = gates.new_empty(0 if w_hr is None else batch, hidden)
    active = _active_rows(lengths, n_steps) if w_hr is not None else None

    for d in range(directions):
        gates_d, c_d, dgx_d = _part(gates, d, four_h), _part(c, d, hidden), _part(dgx, d, four_h)
        dy_d, ext_d, d_c_d = _part(dy, d, proj), _part(d_gates, d, four_h), _part(d_c, d, hidden)
        order = _processing_order(n_steps, d)
        for n in range(n_steps - 1, -1, -1):
            t = order[n]
            c_prev = c_d[order[n - 1]] if n > 0 else c0[d]
            if w_hr is None:
                dm_t, keep, dy_t = dh0[d], (None if lengths is None else dh0[d]), _at(dy_d, t)
            else:
                _project_gradient(dh0[d], _at(dy_d, t), _at(active, t), _part(dh, d, proj)[t])
                torch.mm(_part(dh, d, proj)[t], w_hr[d], out=dm)
                dm_t, keep, dy_t = dm, None, None
            steps.step_bwd(
                gates_d[t], c_prev, c_d[t], dm_t, dc0[d], _at(ext_d, t), lengths, t,
                dgx_d[t], dc0[d], keep, None, dy_t, _at(d_c_d, t),
            )  # fmt: skip
            # Rows that were inactive keep their carry; their delta is zero.
            dh0[d].addmm_(dgx_d[t], w_hh[d], beta=0 if lengths is None else 1)
    return dgx, dh0, dc0, dh


def lstm_recurrence_bwd_bwd(
    steps: StepKernels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence_bwd_bwd`: (a_dy, a_dh_n, a_dc_n, a_d_gates, a_d_c, a_gates, a_c, a_c0, m_bar)."""
    _check(gates, batch_sizes)
    n_steps, batch, _ = gates.shape
    directions, four_h, proj = w_hh.shape
    hidden = four_h // 4
    dy, d_gates, d_c = _rows(dy), _rows(d_gates), _rows(d_c)
    c0, lengths = _rows(c0), _rows(lengths)
    a_dy = gates.new_empty(n_steps, batch, directions * proj)
    a_dh_n = gates.new_zeros(directions, batch, proj) if v_dh0 is None else _fresh(v_dh0, gates.dtype)
    a_dc_n = (
        torch.zeros_like(c0, memory_format=torch.contiguous_format)
        if v_dc0 is None
        else _fresh(v_dc0, c0.dtype)
    )
    a_d_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    a_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    a_d_c = torch.empty_like(c, memory_format=torch.contiguous_format)
    a_c = torch.empty_like(c, memory_format=torch.contiguous_format)
    a_c0 = torch.zeros_like(c0, memory_format=torch.contiguous_format)
    m_bar = gates.new_empty((n_steps, batch, directions * hidden) if w_hr is not None else (0,))
    active = _active_rows(lengths, n_steps) if w_hr is not None else None
    v = gates.new_empty(batch, four_h)

    for d in range(directions):
        gates_d, c_d = _part(gates, d, four_h), _part(c, d, hidden)
        ext_d, v_dgx_d, v_dh_d = _part(d_gates, d, four_h), _part(v_dgx, d, four_h), _part(v_dh, d, proj)
        a_d_c_d, a_c_d, a_dy_d = _part(a_d_c, d, hidden), _part(a_c, d, hidden), _part(a_dy, d, proj)
        a_ext_d, a_acts_d = _part(a_d_gates, d, four_h), _part(a_gates, d, four_h)
        m_bar_d = a_dy_d if w_hr is None else _part(m_bar, d, hidden)
        dm = _all_dm(
            _part(dy, d, proj), _at(dh_n, d), _part(dgx, d, four_h), w_hh[d], _at(w_hr, d), lengths, d
        )
        dc_total = _all_dc_total(
            steps, dm, _at(dc_n, d), _part(d_c, d, hidden), gates_d, c_d, c0[d], lengths, d
        )

        order = _processing_order(n_steps, d)
        w_hh_t = w_hh[d].t()
        hbar, kappa, c_prev, a_c_prev = a_dh_n[d], a_dc_n[d], c0[d], a_c0[d]
        for t in order:
            if v_dgx_d is None:
                torch.mm(hbar, w_hh_t, out=v)
            else:
                torch.addmm(v_dgx_d[t], hbar, w_hh_t, out=v)
            state = None if lengths is None or w_hr is not None else a_dh_n[d]
            steps.step_bwd_bwd(
                gates_d[t], c_prev, c_d[t], dm[t], dc_total[t], _at(ext_d, t), v, kappa, lengths, t,
                m_bar_d[t], a_d_c_d[t], a_ext_d[t], a_acts_d[t], a_c_prev, a_c_d[t], state,
            )  # fmt: skip
            if w_hr is not None:
                _project_adjoint(m_bar_d[t], w_hr[d], _at(v_dh_d, t), _at(active, t), a_dy_d[t], a_dh_n[d])
            hbar = a_dy_d[t] if lengths is None else a_dh_n[d]
            kappa, c_prev, a_c_prev = a_d_c_d[t], c_d[t], a_c_d[t]
        if lengths is None:
            a_dh_n[d].copy_(hbar)
        a_dc_n[d].copy_(kappa)
    return a_dy, a_dh_n, a_dc_n, a_d_gates, a_d_c, a_gates, a_c, a_c0, m_bar


@overload
def _rows(x: Tensor) -> Tensor: ...
@overload
def _rows(x: Tensor | None) -> Tensor | None: ...
def _rows(x: Tensor | None) -> Tensor | None:
    """Give x a contiguous last dimension; a cotangent may be an expanded scalar."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _project_gradient(carry: Tensor, dy: Tensor | None, active: Tensor | None, dh_out: Tensor) -> None:
    """dh_out = carry + dy in active rows, else 0; the carry itself becomes 0 in active rows of ragged batches."""
    if dy is None:
        dh_out.copy_(carry)
    else:
        torch.add(carry, dy, out=dh_out)
    if active is not None:
        dh_out.masked_fill_(~active, 0)
        carry.masked_fill_(active, 0)


def _project_adjoint(
    m_bar: Tensor, w_hr: Tensor, v_dh: Tensor | None, active: Tensor | None, a_dy_out: Tensor, state: Tensor
) -> None:
    """Hbar = W_hr m_bar + v_dh, written to a_dy_out (0 in inactive rows) and to the active rows of state."""
    if v_dh is None:
        torch.mm(m_bar, w_hr.t(), out=a_dy_out)
    else:
        torch.addmm(v_dh, m_bar, w_hr.t(), out=a_dy_out)
    if active is not None:
        a_dy_out.masked_fill_(~active, 0)
        torch.where(active, a_dy_out, state, out=state)


def _all_dm(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dgx: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    direction: int,
) -> Tensor:
    """The gradient of m at every step of one direction, (T, B, H), recomputed from dgx by batched GEMMs.

    Inactive rows hold values without a meaning.
    """
    n_steps, batch, four_h = dgx.shape
    proj = w_hh.shape[1]
    dh = dgx.new_empty(n_steps, batch, proj)
    # `later` are the steps whose delta flows back into the steps `earlier`.
    later, earlier = (
        (slice(1, None), slice(None, -1)) if direction == 0 else (slice(None, -1), slice(1, None))
    )
    final = n_steps - 1 if direction == 0 else 0
    delta, out = dgx[later].reshape(-1, four_h), dh[earlier].view(-1, proj)
    if dy is None:
        torch.mm(delta, w_hh, out=out)
        dh[final].zero_()
    else:
        torch.addmm(dy[earlier].reshape(-1, proj), delta, w_hh, out=out)
        dh[final].copy_(dy[final])
    if dh_n is not None:
        if lengths is None:
            dh[final].add_(dh_n)
        else:
            last = (lengths.clamp(1, n_steps) - 1) if direction == 0 else torch.zeros_like(lengths)
            rows = torch.arange(batch, device=dgx.device)
            dh[last, rows] += dh_n
    if w_hr is None:
        return dh
    dm = dgx.new_empty(n_steps, batch, w_hr.shape[1])
    torch.mm(dh.view(-1, proj), w_hr, out=dm.view(-1, w_hr.shape[1]))
    return dm


def _all_dc_total(
    steps: StepKernels,
    dm: Tensor,
    dc_n: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    direction: int,
) -> Tensor:
    """The gradient of c' at every step of one direction, m's share included, (T, B, H)."""
    n_steps = gates.shape[0]
    dc_total = c.new_empty(c.shape)
    carry = torch.zeros_like(c0) if dc_n is None else _fresh(dc_n, c0.dtype)
    order = _processing_order(n_steps, direction)
    for n in range(n_steps - 1, -1, -1):
        t = order[n]
        c_prev = c[order[n - 1]] if n > 0 else c0
        steps.step_bwd(
            gates[t],
            c_prev,
            c[t],
            None,
            carry,
            None,
            lengths,
            t,
            None,
            carry,
            None,
            dc_total[t],
            dm[t],
            _at(d_c, t),
        )
    return dc_total
