"""Weight gradients of the recurrence: GEMMs over all time steps at once, differentiable by PyTorch itself."""

from __future__ import annotations

import torch
from torch import Tensor


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum over rows of outer(left, right): (M, N) from (..., M) and (..., N)."""
    return left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])


def recurrent_weight_grads(
    c0: Tensor,
    delta: Tensor,
    y: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    """d(w_hh) (4H, P) of every direction: the sum over steps of outer(delta_t, h_{t-1}).

    Args:
        c0: (D, B, H), for its shape.
        delta: gradients of the pre-activations, (T, B, D*4H), or (N, D*4H) when packed.
        y: hidden states, (T, B, D*P) or (N, D*P), zero at inactive steps.
        h0: initial hidden states (D, B, P); None means zero.
        lengths, batch_sizes: as in ``lstm_recurrence``.
    """
    directions, batch, _ = c0.shape
    grads = []
    columns = zip(delta.chunk(directions, -1), y.chunk(directions, -1), strict=True)
    for d, (delta_d, y_d) in enumerate(columns):
        first = y_d.new_zeros(batch, y_d.shape[-1]) if h0 is None else h0[d]
        if batch_sizes is not None:
            grads.append(_outer_sum(delta_d, packed_before(y_d, first, d == 1, batch_sizes)))
            continue
        later, before, at_first = padded_pairs(delta_d, y_d, d == 1, lengths)
        grad = _outer_sum(later, before)
        grads.append(grad if h0 is None else grad + _outer_sum(at_first, first))
    return grads


def padded_pairs(
    delta: Tensor, y: Tensor, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(delta of the later steps, h that each of them read, delta (B, 4H) of the steps that read h0)."""
    # Rows are sliced, not steps: a size T - 1 would make compiled code special at T = 2.
    batch, steps = delta.shape[1], delta.shape[0]
    # `reshape`, not `flatten`, which has no rule for batched gradients (``is_grads_batched``).
    delta_rows, y_rows = delta.reshape(-1, delta.shape[-1]), y.reshape(-1, y.shape[-1])
    if not reverse:
        return delta_rows[batch:], y_rows[:-batch], delta[0]
    if lengths is None:
        return delta_rows[:-batch], y_rows[batch:], delta[-1]
    # A row's first step is its last time step; the pair made of it and the zero beyond its end adds nothing.
    last = (lengths.clamp(1, steps) - 1).view(1, -1, 1).expand(1, -1, delta.shape[-1])
    return delta_rows[:-batch], y_rows[batch:], delta.gather(0, last)[0]


def packed_before(y: Tensor, h0: Tensor, reverse: bool, batch_sizes: Tensor) -> Tensor:
    """h_{t-1} of every packed row: h0 (B, P) at a sequence's first step."""
    rows, batch = y.shape[0], h0.shape[0]
    # The row of the same sequence one time step earlier, for every row but those of step 0.
    step_back = batch_sizes[:-1].repeat_interleave(batch_sizes[1:], output_size=rows - batch)
    earlier = torch.arange(batch, rows) - step_back
    if not reverse:
        return torch.cat([h0, y.index_select(0, earlier)])
    steps = (batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    last = (batch_sizes.cumsum(0) - batch_sizes).index_select(0, steps - 1) + torch.arange(batch)
    return torch.cat([y[batch:], h0]).index_select(0, torch.cat([earlier, last]).argsort())


def hidden_before_projection(gates: Tensor, c: Tensor, directions: int) -> Tensor:
    """Hidden states before the projection: m = o * tanh(c), (..., D*H), from activated gates (..., D*4H)."""
    o = gates.unflatten(-1, (directions, 4, -1))[..., 3, :].flatten(-2)
    m: Tensor = o * torch.tanh(c)
    return m.to(gates.dtype)


def projection_weight_grad(directions: int, dh: Tensor, m: Tensor) -> Tensor:
    """d(w_hr) (D, P, H): the sum over steps of outer(dh_t, m_t), from (..., D*P) and (..., D*H)."""
    columns = zip(dh.chunk(directions, -1), m.chunk(directions, -1), strict=True)
    return torch.stack([_outer_sum(dh_d, m_d) for dh_d, m_d in columns])
