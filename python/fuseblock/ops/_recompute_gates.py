"""The gates of all steps once more, from the hidden states that they led to: one GEMM over the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ._recurrent_weight_grad import packed_before, padded_pairs


def recompute_gates(
    gx: Tensor,
    y: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> Tensor:
    """Activated gates as ``lstm_recurrence`` returns them, in the place of ``gx``: act(gx_t + W_hh h_{t-1}).

    Every h is known here, so nothing has to go step by step. Inactive steps hold values without a meaning. In 16 bit the
    sum is rounded before it is activated, which the recurrence does not do.

    Args:
        gx: input projection (T, B, D*4H), or (N, D*4H) when packed; contiguous, written over.
        y: hidden states (T, B, D*P) or (N, D*P), zero at inactive steps.
        h0: (D, B, P). w_hh: (D, 4H, P). lengths, batch_sizes: as in ``lstm_recurrence``.
    """
    directions = w_hh.shape[0]
    columns = zip(gx.chunk(directions, -1), y.chunk(directions, -1), strict=True)
    for d, (gx_d, y_d) in enumerate(columns):
        w = w_hh[d].t()
        if batch_sizes is not None:
            gx_d.addmm_(packed_before(y_d, h0[d], d == 1, batch_sizes), w)
            continue
        later, before, _ = padded_pairs(gx_d, y_d, d == 1, None)
        later.addmm_(before, w)
        if d == 0 or lengths is None:
            gx_d[-1 if d else 0].addmm_(h0[d], w)
        else:
            last = lengths.clamp(1, gx.shape[0]) - 1
            gx_d[last, torch.arange(gx.shape[1], device=gx.device)] += h0[d] @ w
    gates = gx.unflatten(-1, (directions, 4, -1))
    gates[..., :2, :].sigmoid_()
    gates[..., 2, :].tanh_()
    gates[..., 3, :].sigmoid_()
    return gx
