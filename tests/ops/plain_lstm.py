"""The LSTM recurrence written as slow, obvious PyTorch: what the kernels' tests compare with.

Every function is differentiable by autograd, so float64 runs of it give the expected gradients of any order. It shares no
code with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def step(pre: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, c', activated gates) of pre-activations (..., 4H) and a cell state (..., H)."""
    i, f, g, o = pre.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_new = f * c + i * g
    return o * c_new.tanh(), c_new, torch.cat((i, f, g, o), -1)


def step_backward(
    acts: Tensor, c_prev: Tensor, c_new: Tensor, dm: Tensor, dc: Tensor, ext: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(delta, dc_prev, dc_total) of one step on activated gates."""
    i, f, g, o = acts.chunk(4, -1)
    ext_i, ext_f, ext_g, ext_o = ext.chunk(4, -1)
    tanh_c = c_new.tanh()
    dc_total = dc + dm * o * (1 - tanh_c**2)
    delta = torch.cat(
        (
            (dc_total * g + ext_i) * i * (1 - i),
            (dc_total * c_prev + ext_f) * f * (1 - f),
            (dc_total * i + ext_g) * (1 - g**2),
            (dm * tanh_c + ext_o) * o * (1 - o),
        ),
        -1,
    )
    return delta, dc_total * f, dc_total


def tf32(x: Tensor) -> Tensor:
    """X with 10 bits of mantissa, ties away from zero: what tensor cores take of float32 operands."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    return x


def _order(n_steps: int, direction: int) -> list[int]:
    return list(range(n_steps)) if direction == 0 else list(reversed(range(n_steps)))


def _active(lengths: Tensor | None, t: int, batch: int) -> Tensor:
    return torch.ones(batch, 1, dtype=torch.bool) if lengths is None else (lengths > t)[:, None]


def forward(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    operand: Callable[[Tensor], Tensor] = _exact,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, gates, c) of the op `lstm_recurrence`, without rounding to 16 bit between steps.

    operand: what is done to both operands of the recurrent product.
    """
    n_steps, batch, _ = gx.shape
    parts: list[list[Tensor]] = [[], [], [], [], []]
    for d in range(w_hh.shape[0]):
        gx_d = gx.chunk(w_hh.shape[0], -1)[d]
        h, c = h0[d], c0[d]
        y: dict[int, Tensor] = {}
        gates: dict[int, Tensor] = {}
        cells: dict[int, Tensor] = {}
        for t in _order(n_steps, d):
            m, c_new, acts = step(gx_d[t] + operand(h) @ operand(w_hh[d]).T, c)
            if w_hr is not None:
                m = m @ w_hr[d].T
            on = _active(lengths, t, batch)
            h, c = torch.where(on, m, h), torch.where(on, c_new, c)
            y[t], gates[t], cells[t] = m * on, acts * on, c
        for part, value in zip(parts, (y, h, c, gates, cells), strict=True):
            part.append(
                value if isinstance(value, Tensor) else torch.stack([value[t] for t in range(n_steps)])
            )
    y_all, h_n, c_n, gates_all, c_all = parts
    return (
        torch.cat(y_all, -1),
        torch.stack(h_n),
        torch.stack(c_n),
        torch.cat(gates_all, -1),
        torch.cat(c_all, -1),
    )


def backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    d_gates: Tensor,
    d_c: Tensor,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    operand: Callable[[Tensor], Tensor] = _exact,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dgx, dh0, dc0, dh) of the op `lstm_recurrence_bwd`, as a differentiable function of its tensors.

    operand: what is done to both operands of the recurrent product.
    """
    n_steps, batch, _ = gates.shape
    directions = w_hh.shape[0]
    dgx, dh0, dc0, dh = [], [], [], []
    for d in range(directions):
        dy_d, ext, d_c_d, gates_d, c_d = (x.chunk(directions, -1)[d] for x in (dy, d_gates, d_c, gates, c))
        order = _order(n_steps, d)
        carry_h, carry_c = dh_n[d], dc_n[d]
        deltas: dict[int, Tensor] = {}
        totals: dict[int, Tensor] = {}
        for n in reversed(range(n_steps)):
            t = order[n]
            on = _active(lengths, t, batch)
            total = torch.where(on, carry_h + dy_d[t], 0)
            dm = total if w_hr is None else total @ w_hr[d]
            dc = carry_c + d_c_d[t]
            c_prev = c_d[order[n - 1]] if n > 0 else c0[d]
            delta, dc_prev, _ = step_backward(gates_d[t], c_prev, c_d[t], dm, dc, ext[t])
            delta = torch.where(on, delta, 0)
            carry_c = torch.where(on, dc_prev, dc)
            carry_h = torch.where(on, operand(delta) @ operand(w_hh[d]), carry_h)
            deltas[t], totals[t] = delta, total
        dgx.append(torch.stack([deltas[t] for t in range(n_steps)]))
        dh.append(torch.stack([totals[t] for t in range(n_steps)]))
        dh0.append(carry_h)
        dc0.append(carry_c)
    return torch.cat(dgx, -1), torch.stack(dh0), torch.stack(dc0), torch.cat(dh, -1)


class PlainSteps:
    """The step namespace of `fuseblock.launch.per_step` in plain PyTorch."""

    @staticmethod
    def step_fwd(pre, c_prev, h_out, c_out, acts_out, lengths, t, h_state):
        m, c_new, acts = step(pre.to(c_prev.dtype), c_prev)
        on = _active(lengths, t, pre.shape[0])
        h_out.copy_(torch.where(on, m, 0))
        c_out.copy_(torch.where(on, c_new, c_prev))
        if acts_out is not None:
            acts_out.copy_(torch.where(on, acts, 0))
        if h_state is not None:
            h_state.copy_(torch.where(on, m.to(h_state.dtype), h_state))

    @staticmethod
    def step_bwd(
        acts, c_prev, c_new, dm, dc, ext, lengths, t, delta_out, dc_prev_out, dm_keep, dc_total_out, dy, d_c
    ):
        on = _active(lengths, t, acts.shape[0])
        zero, zero4 = torch.zeros_like(c_prev), torch.zeros_like(acts, dtype=c_prev.dtype)
        dm_total = (zero if dm is None else dm) + (zero if dy is None else dy)
        dc_in = (zero if dc is None else dc) + (zero if d_c is None else d_c)
        ext = zero4 if ext is None else ext.to(c_prev.dtype)
        kept = torch.where(on, 0, zero if dm is None else dm)
        delta, dc_prev, dc_total = step_backward(acts.to(c_prev.dtype), c_prev, c_new, dm_total, dc_in, ext)
        if delta_out is not None:
            delta_out.copy_(torch.where(on, delta, 0))
        dc_prev_out.copy_(torch.where(on, dc_prev, dc_in))
        if dm_keep is not None:
            dm_keep.copy_(kept)
        if dc_total_out is not None:
            dc_total_out.copy_(torch.where(on, dc_total, dc_in))

    @staticmethod
    def step_bwd_bwd(
        acts, c_prev, c_new, dm, dc_total, ext, v, v_dc_prev, lengths, t,
        a_dm_out, a_dc_out, a_ext_out, a_acts_out, a_c_prev_out, a_c_new_out, a_dm_state,
    ):  # fmt: skip
        on = _active(lengths, t, acts.shape[0])
        zero, zero4 = torch.zeros_like(c_prev), torch.zeros_like(acts, dtype=c_prev.dtype)
        dm = zero if dm is None else torch.where(on, dm.to(c_prev.dtype), 0)
        tanh_c, o = c_new.tanh(), acts[:, -c_prev.shape[1] :].to(c_prev.dtype)
        dc = dc_total - dm * o * (1 - tanh_c**2)
        ext = zero4 if ext is None else torch.where(on, ext.to(c_prev.dtype), 0)
        inputs = [
            x.detach().clone().requires_grad_() for x in (acts.to(c_prev.dtype), c_prev, c_new, dm, dc, ext)
        ]
        kappa = zero if v_dc_prev is None else v_dc_prev.clone()
        v = zero4 if v is None else torch.where(on, v.to(c_prev.dtype), 0)
        with torch.enable_grad():
            delta, dc_prev, _ = step_backward(*inputs)
        a_acts, a_c_prev, a_c_new, a_dm, a_dc, a_ext = torch.autograd.grad(
            (delta, dc_prev), inputs, (v, kappa)
        )
        a_dm_out.copy_(torch.where(on, a_dm, 0))
        a_dc_out.copy_(torch.where(on, a_dc, kappa))
        if a_ext_out is not None:
            a_ext_out.copy_(torch.where(on, a_ext, 0))
        a_acts_out.copy_(torch.where(on, a_acts, 0))
        a_c_prev_out.add_(torch.where(on, a_c_prev, 0))
        a_c_new_out.copy_(torch.where(on, a_c_new, 0))
        if a_dm_state is not None:
            a_dm_state.copy_(torch.where(on, a_dm.to(a_dm_state.dtype), a_dm_state))
