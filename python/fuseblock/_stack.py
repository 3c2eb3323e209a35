"""A whole stack of LSTM layers on our kernels as one autograd node, for eager mode.

The operators compose anywhere, but each of them costs tens of microseconds of Python and autograd per layer and pass,
which is most of the time of a small layer. Here forward and first backward call the backends directly; a second
backward recomputes the stack on the operators (`_recompute`). The mathematics is that of `functional._ours`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from ._fused_layer import fused_layers, per_layer, present
from ._library import state_dtype
from ._recompute import PER_LAYER, LayerWeights, Run, layer_weights, recorded_gradients
from .ops._recurrent_weight_grad import (
    hidden_before_projection,
    projection_weight_grad,
    recurrent_weight_grad,
)


def join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenated along the first dimension; the tensor itself where there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def stack_directions(tensors: Sequence[Tensor]) -> Tensor:
    """(D, ...): a view where there is one direction."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def input_projection(input: Tensor, own: Sequence[LayerWeights]) -> Tensor:
    """Return gx (..., D*4H) = W_ih x + b_ih + b_hh for the directions of one layer."""
    biases = [b for b in (_bias(w) for w in own) if b is not None]
    return F.linear(input, join_rows([w[0] for w in own]), join_rows(biases) if biases else None)


def _bias(w: LayerWeights) -> Tensor | None:
    _, _, b_ih, b_hh, _ = w
    if b_ih is None or b_hh is None:
        return b_hh if b_ih is None else b_ih
    return b_ih + b_hh


def recurrent_weights(own: Sequence[LayerWeights]) -> tuple[Tensor, Tensor | None]:
    """(w_hh (D, 4H, P), w_hr (D, P, H) or None) of one layer."""
    w_hr = None if own[0][4] is None else stack_directions([w[4] for w in own if w[4] is not None])
    return stack_directions([w[1] for w in own]), w_hr


def _is_batched(x: Tensor) -> bool:
    batched = torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)
    return bool(batched)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ours: Run,
        directions: int,
        ragged: tuple[Tensor | None, Tensor | None],
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.ours, ctx.directions, ctx.forced = ours, directions, dispatch.forced()
        weights = layer_weights(flat)
        ctx.fused = fused_layers(input, weights, directions, *ragged)
        y, hs, cs, kept = input, [], [], []
        h0s = per_layer(h0, directions)
        c0s = per_layer(c0.to(state_dtype(c0.dtype)), directions)
        for layer, (h, c, fused) in enumerate(zip(h0s, c0s, ctx.fused, strict=True)):
            own = weights[layer * directions : (layer + 1) * directions]
            if fused:
                y, h_n, c_n, gates, cells = torch.ops.fuseblock_cpu.lstm_layer.default(
                    y, h, c, present(own), ragged[1], True
                )
            else:
                w_hh, w_hr = recurrent_weights(own)
                gx = input_projection(y, own)
                y, h_n, c_n, gates, cells = dispatch.run(
                    "lstm_recurrence", (gx, h, c, w_hh, w_hr, *ragged, True)
                )
            hs.append(h_n)
            cs.append(c_n)
            kept += [y, gates, cells]
        ctx.save_for_backward(input, h0, c0, *flat, *ragged, *kept)
        return y, join_rows(hs), join_rows(cs).to(c0.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        count = len(needed)
        tensors, ragged, kept = saved[:count], saved[count : count + 2], saved[count + 2 :]
        # The forward pass ran without autocast, or it would not have come here.
        device = tensors[0].device.type
        with dispatch.backend(ctx.forced), torch.autocast(device, enabled=False):
            if torch.is_grad_enabled():
                found = recorded_gradients(ctx.ours, tensors, needed, grads)
            else:
                # `is_grads_batched`: PyTorch loops over an op by itself, but not over one that returns a list.
                batched = any(g is not None and _is_batched(g) for g in grads)
                fused = [False] * len(ctx.fused) if batched else ctx.fused
                found = _first_order(ctx.directions, fused, tensors, ragged, kept, needed, grads)
        return None, None, None, *found


def _first_order(
    directions: int,
    fused: Sequence[bool],
    tensors: Sequence[Tensor | None],
    ragged: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    input, h0, c0, *flat = tensors
    assert input is not None  # for the type checker: only weights may be absent
    assert h0 is not None
    assert c0 is not None
    weights = layer_weights(flat)
    dy, dh_n, dc_n = grads
    found: list[Tensor | None] = [None] * len(tensors)
    dh0, dc0 = [], []
    h0s = per_layer(h0, directions)
    c0s = per_layer(c0.to(state_dtype(c0.dtype)), directions)
    dh_ns = [None] * len(h0s) if dh_n is None else per_layer(dh_n, directions)
    dc_ns = [None] * len(h0s) if dc_n is None else per_layer(dc_n.to(c0s[0].dtype), directions)
    for layer in reversed(range(len(h0s))):
        first = layer * directions
        own = weights[first : first + directions]
        y, gates, cells = kept[3 * layer : 3 * layer + 3]
        x = input if layer == 0 else kept[3 * layer - 3]
        h, c = h0s[layer], c0s[layer]
        incoming = (dy, dh_ns[layer], dc_ns[layer])
        first_weight = 3 + first * PER_LAYER
        need_dx = layer > 0 or needed[0]
        if fused[layer] and any(needed[first_weight : first_weight + directions * PER_LAYER]):
            dy, dh, dc, *of_weights = torch.ops.fuseblock_cpu.lstm_layer_bwd.default(
                *incoming, x, h, c, y, gates, cells, present(own), ragged[1], need_dx
            )
            dh0.append(dh)
            dc0.append(dc)
            for d in range(directions):
                dw_ih, dw_hh, db = of_weights[3 * d : 3 * d + 3]
                at = first_weight + d * PER_LAYER
                # A gradient of its own for each bias: users scale gradients in place.
                found[at : at + 4] = dw_ih, dw_hh, *((None, None) if own[d][2] is None else (db, db.clone()))
            continue
        w_hh, w_hr = recurrent_weights(own)
        dgx, dh, dc, total = dispatch.run(
            "lstm_recurrence_bwd", (*incoming, None, None, gates, cells, c, w_hh, w_hr, *ragged)
        )
        dh0.append(dh)
        dc0.append(dc)

        delta = dgx.reshape(-1, dgx.shape[-1])  # not flatten(), which has no rule for batched gradients
        of_layer = needed[first_weight : first_weight + directions * PER_LAYER]
        wants = [any(of_layer[k::PER_LAYER]) for k in range(PER_LAYER)]
        parts: list[Sequence[Tensor] | None] = [None] * PER_LAYER
        if wants[0]:
            parts[0] = (delta.t() @ x.flatten(0, -2)).chunk(directions)
        if wants[1]:
            parts[1] = recurrent_weight_grad(c, dgx, y, h, ragged[0], ragged[1]).unbind()
        if wants[2] or wants[3]:
            db = delta.sum(0)
            parts[2], parts[3] = db.chunk(directions), db.clone().chunk(directions)
        if w_hr is not None and wants[4]:
            m = hidden_before_projection(gates, cells, directions)
            parts[4] = projection_weight_grad(directions, total, m).unbind()
        for d in range(directions):
            for k, part in enumerate(parts):
                at = first_weight + d * PER_LAYER + k
                if part is not None and needed[at]:
                    found[at] = part[d]
        if need_dx:
            dy = (delta @ join_rows([w[0] for w in own])).view(x.shape)
    found[0] = dy if needed[0] else None
    found[1] = join_rows(dh0[::-1]) if needed[1] else None
    found[2] = join_rows(dc0[::-1]).to(c0.dtype) if needed[2] else None
    return found


def fused_stack(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    ours: Run,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of a stack without dropout, as one autograd node; arguments as in `functional.lstm`."""
    flat = [x for w in weights for x in w]
    return _Stack.apply(ours, directions, (lengths, batch_sizes), input, h0, c0, *flat)  # type: ignore[no-any-return]
