"""A whole small layer in one launch on a GPU, its input projection included: host side of `LstmLayerFwd` in csrc/cuda.

The block tier's forward kernel makes gx = W_ih x + b itself. Backward is that of the recurrence, on the same saved tensors.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._recompute import LayerWeights
from .resident_recurrence import TIERS, contiguous, gpu_of, padded_rows, with_near_rows

#: Columns of x at most, as in csrc/cuda/lstm_recurrence_block.h.
LARGEST_INPUT = 32

_DTYPES = (torch.float16, torch.bfloat16)


class LayerKernel(Protocol):
    """The launch. Tensors as in `resident_recurrence.ResidentKernels`, but for the first three."""

    def __call__(
        self,
        x: Tensor,
        w_ih: Sequence[Tensor],
        biases: Sequence[Tensor],
        h0: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        lengths: Tensor | None,
        y: Tensor,
        h_n: Tensor,
        c_n: Tensor,
        gates: Tensor | None,
        c: Tensor | None,
    ) -> None:
        """All steps. x (T, B, I): contiguous columns. Of each direction w_ih (4H, I), and b_ih and b_hh (4H,) or neither."""


def why_not(w_ih: Tensor, w_hh: Tensor, w_hr: Tensor | None) -> str | None:
    """The reason why the kernel cannot run a layer with these weights, or None."""
    inputs = w_ih.shape[1]
    if w_hh.dtype not in _DTYPES:
        return f"the input projection is fused in float16 and bfloat16, not in {w_hh.dtype}"
    if not 1 <= inputs <= LARGEST_INPUT:
        return f"w_ih of I = {inputs} is not kept beside w_hh (limit {LARGEST_INPUT})"
    return TIERS["block"].why_not(w_hh, w_hr, None, gpu_of(w_hh))


def lstm_layer(
    kernel: LayerKernel,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    own: Sequence[LayerWeights],
    lengths: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, ...]:
    """(y, h_n, c_n, gates, c) as of op `lstm_recurrence`, from x (T, B, I) and the weights of each direction."""
    (steps, batch, _), (directions, _, hidden) = x.shape, c0.shape
    y = x.new_empty(steps, batch, directions * hidden)
    h_n, c_n = x.new_empty(h0.shape), c0.new_empty(c0.shape)
    gates = x.new_empty((steps, batch, directions * 4 * hidden) if save_state else (0,))
    c = c0.new_empty(y.shape if save_state else (0,))
    w_hh = own[0][1].unsqueeze(0) if directions == 1 else torch.stack([w[1] for w in own])
    kernel(
        with_near_rows(x),
        [w[0].contiguous() for w in own],
        [b.contiguous() for w in own for b in w[2:4] if b is not None],
        h0.contiguous(),
        c0.contiguous(),
        padded_rows(w_hh),
        contiguous(lengths),
        y,
        h_n,
        c_n,
        gates if save_state else None,
        c if save_state else None,
    )
    return y, h_n, c_n, gates, c
