"""The LSTM cell's gate math.

    i, f, g, o = gates.chunk(4, -1)
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h  = sigmoid(o) * tanh(c')

Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, in PyTorch's gate order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import state_dtype
from ._adjoint import adjoint


def activate(gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activated i, f, g, o, each (..., H), of pre-activations (..., 4H)."""
    i, f, g, o = gates.chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm_gates_reference(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c_new) of pre-activations ``gates`` (..., 4H) and cell state ``c`` (..., H)."""
    wide = state_dtype(gates.dtype)
    i, f, g, o = activate(gates.to(wide))
    c_new = f * c.to(wide) + i * g
    h = o * torch.tanh(c_new)
    return h.to(gates.dtype), c_new.to(c.dtype)


def step_bwd(
    acts: tuple[Tensor, Tensor, Tensor, Tensor],
    c_prev: Tensor,
    c_new: Tensor,
    dm: Tensor | None,
    dc: Tensor | None,
    ext: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(delta (..., 4H), dc_prev (..., H)): gradients of the pre-activations and of the previous cell state.

    Args:
        acts: activated i, f, g, o. c_prev, c_new: cell states before and after. All (..., H).
        dm: gradient of m = o * tanh(c_new). dc: gradient of c_new without m's share. None means zero.
        ext: gradients of the activated gates themselves, where these are outputs.
    """
    i, f, g, o = acts
    tanh_c = torch.tanh(c_new)
    dm = torch.zeros_like(c_new) if dm is None else dm
    dc_total = dm * o * (1 - tanh_c * tanh_c)
    if dc is not None:
        dc_total = dc_total + dc
    di, df, dg, do = dc_total * g, dc_total * c_prev, dc_total * i, dm * tanh_c
    if ext is not None:
        di, df, dg, do = di + ext[0], df + ext[1], dg + ext[2], do + ext[3]
    delta = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], dim=-1)
    return delta, dc_total * f


def lstm_gates_bwd_reference(
    dh: Tensor | None, dc_new: Tensor | None, gates: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """(dgates, dc): gradients of the inputs of `lstm_gates_reference`, given those of its outputs."""
    wide = state_dtype(gates.dtype)
    acts = activate(gates.to(wide))
    i, f, g, _ = acts
    c_prev = c.to(wide)
    delta, dc = step_bwd(
        acts,
        c_prev,
        f * c_prev + i * g,
        None if dh is None else dh.to(wide),
        None if dc_new is None else dc_new.to(wide),
    )
    return delta.to(gates.dtype), dc.to(c.dtype)


def lstm_gates_bwd_bwd_reference(
    v_dgates: Tensor | None,
    v_dc: Tensor | None,
    dh: Tensor | None,
    dc_new: Tensor | None,
    gates: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a_dh, a_dc_new, a_gates, a_c): adjoint of `lstm_gates_bwd_reference` at cotangents v_dgates, v_dc."""
    dh = torch.zeros_like(c, dtype=gates.dtype) if dh is None else dh
    dc_new = torch.zeros_like(c) if dc_new is None else dc_new
    a_dh, a_dc_new, a_gates, a_c = adjoint(lstm_gates_bwd_reference, (dh, dc_new, gates, c), (v_dgates, v_dc))
    return a_dh, a_dc_new, a_gates, a_c
