"""The engine ``aten``: PyTorch's own LSTM layer, with a second derivative by recomputation through ours.

PyTorch's layer (oneDNN, cuDNN) is hard to beat where the GEMMs dominate, but cuDNN has no second derivative at all and
the CPU's is an unrolled composite. `aten_lstm` therefore runs it inside an autograd Function: a first backward is the
layer's own; a backward that is itself differentiated (``create_graph=True``) recomputes the layer by ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import wants_gradient
from ._recompute import PER_LAYER, LayerWeights, Run, recorded_gradients


def _call(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    flat: Sequence[Tensor | None],
    directions: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layers = len(flat) // PER_LAYER // directions
    present = [w for w in flat if w is not None]
    has_biases = flat[2] is not None
    return torch._VF.lstm(  # type: ignore[attr-defined, no-any-return]
        input, (h0, c0), present, has_biases, layers, dropout, training, directions == 2, False
    )


class _AtenLSTM(torch.autograd.Function):
    """PyTorch's layer; backward of the first order its own, of the second through ours."""

    @staticmethod
    def forward(
        ctx: Any,
        ours: Run,
        directions: int,
        training: bool,
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.ours, ctx.directions = ours, directions
        tensors = (input, h0, c0, *flat)
        with torch.enable_grad():
            inner = [
                None if x is None else x.detach().requires_grad_(needed)
                for x, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True)
            ]
            outputs = _call(inner[0], inner[1], inner[2], inner[3:], directions, 0.0, training)  # type: ignore[arg-type]
        ctx.inner = inner, outputs
        ctx.save_for_backward(*tensors)
        return tuple(out.detach() for out in outputs)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises PyTorch's own error after the graph was freed
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *recorded_gradients(ctx.ours, saved, needed, grads)
        leaves, outputs = ctx.inner
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.inner = None
        used = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in used], wanted, [g for _, g in used], retain_graph=keep, allow_unused=True
            )
        )
        return None, None, None, *(next(found) if need else None for need in needed)


def aten_lstm(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    dropout: float,
    training: bool,
    ours: Run,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) by PyTorch's layer; arguments as in `fuseblock.functional.lstm`.

    Args:
        ours: runs the same stack on our operators; called for second derivatives.

    ``dropout`` is what is to be applied: zero outside of training. With it the layers are run one by one, so that a
    recomputation meets the same dropout mask.
    """
    flat = [x for w in weights for x in w]
    if not wants_gradient((input, h0, c0, *flat)):
        return _call(input, h0, c0, flat, directions, dropout, training)
    if not dropout:
        return _AtenLSTM.apply(ours, directions, training, input, h0, c0, *flat)  # type: ignore[no-any-return]
    hs, cs = [], []
    y = input
    for first in range(0, len(weights), directions):
        rows = slice(first, first + directions)
        layer = [x for w in weights[rows] for x in w]
        y, h_n, c_n = _AtenLSTM.apply(ours, directions, training, y, h0[rows], c0[rows], *layer)
        hs.append(h_n)
        cs.append(c_n)
        if first + directions < len(weights):
            y = torch.nn.functional.dropout(y, dropout)
    return y, torch.cat(hs), torch.cat(cs)
