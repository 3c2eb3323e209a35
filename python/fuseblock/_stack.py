"""A whole stack of LSTM layers on our kernels as one autograd node, for eager mode.

The operators compose anywhere, but each of them costs tens of microseconds of Python and autograd per layer and pass,
which is most of the time of a small layer. Here forward and first backward call the backends directly; a second
backward recomputes the stack on the operators (`_recompute`). The mathematics is that of `functional._lstm._ours`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _fused_layer, dispatch
from ._fused_layer import fused_layers, per_layer, present
from ._library import backward_is_seen, state_dtype
from ._ragged import Packing
from ._recompute import PER_LAYER, LayerWeights, Run, layer_weights, recorded_gradients
from .ops._recompute_gates import recompute_gates
from .ops._recurrent_weight_grad import (
    hidden_before_projection,
    projection_weight_grad,
    recurrent_weight_grads,
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


def run_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    own: Sequence[LayerWeights],
    ragged: tuple[Tensor | None, Tensor | None],
    fused: bool,
    save_state: bool,
) -> Any:
    """(y, h_n, c_n, gates, c) of one layer."""
    if fused:
        return _fused_layer.forward(x, h0, c0, own, *ragged, save_state)
    w_hh, w_hr = recurrent_weights(own)
    args = (input_projection(x, own), h0, c0, w_hh, w_hr, *ragged, save_state)
    return dispatch.run("lstm_recurrence", args)


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
        packing: Packing | None,
        save_gates: bool,
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.ours, ctx.directions, ctx.packing, ctx.forced = ours, directions, packing, dispatch.forced()
        weights = layer_weights(flat)
        y, hs, cs, kept = input if packing is None else packing.pack(input), [], [], []
        fused_forward = fused_layers(y, weights, directions, *ragged, training=True)
        ctx.fused = [fused and _fused_layer.has_backward(y) for fused in fused_forward]
        h0s, c0s = _initial_states(h0, c0, directions, packing)
        for layer, (h, c, fused) in enumerate(zip(h0s, c0s, fused_forward, strict=True)):
            own = weights[layer * directions : (layer + 1) * directions]
            y, h_n, c_n, gates, cells = run_layer(y, h, c, own, ragged, fused, True)
            hs.append(h_n)
            cs.append(c_n)
            kept += [y, gates if save_gates else None, cells]
        h_n, c_n = join_rows(hs), join_rows(cs).to(c0.dtype)
        if packing is not None:
            # Of the outermost input and output the padded one is kept: it is alive anyway.
            y, h_n, c_n = packing.unpack(y), packing.unpack_state(h_n), packing.unpack_state(c_n)
            kept[-3] = y
        ctx.save_for_backward(input, h0, c0, *flat, *ragged, *kept)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        count = len(needed)
        tensors, ragged, kept = saved[:count], saved[count : count + 2], saved[count + 2 :]
        # The forward pass ran without autocast, or it would not have come here.
        device = tensors[0].device.type
        with dispatch.backend(ctx.forced), torch.autocast(device, enabled=False):
            if backward_is_seen():
                found = recorded_gradients(ctx.ours, tensors, needed, grads)
            else:
                # `is_grads_batched`: PyTorch loops over an op by itself, but not over one that returns a list.
                batched = any(g is not None and _is_batched(g) for g in grads)
                fused = [False] * len(ctx.fused) if batched else ctx.fused
                # A trace of gates that nobody will read again is free to be written over.
                freed = not (batched or torch._C._autograd._get_current_graph_task_keep_graph())
                found = _first_order(
                    ctx.directions, ctx.packing, fused, freed, tensors, ragged, kept, needed, grads
                )
        return None, None, None, None, None, *found


def _initial_states(
    h0: Tensor, c0: Tensor, directions: int, packing: Packing | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(h0, c0) of every layer, in the order of the rows that run and in the dtype of the state."""
    c0 = c0.to(state_dtype(c0.dtype))
    if packing is not None:
        h0, c0 = packing.pack_state(h0), packing.pack_state(c0)
    return per_layer(h0, directions), per_layer(c0, directions)


def _first_order(
    directions: int,
    packing: Packing | None,
    fused: Sequence[bool],
    freed: bool,
    tensors: Sequence[Tensor | None],
    ragged: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    input, h0, c0, *flat = tensors
    assert input is not None  # for the type checker: only weights may be absent
    assert h0 is not None
    assert c0 is not None
    weights = layer_weights(flat)
    dy, dh_n, dc_n = grads
    if packing is not None:
        dy = None if dy is None else packing.pack(dy)
        dh_n = None if dh_n is None else packing.pack_state(dh_n)
        dc_n = None if dc_n is None else packing.pack_state(dc_n)
    found: list[Tensor | None] = [None] * len(tensors)
    dh0: list[Tensor] = []
    dc0: list[Tensor] = []
    h0s, c0s = _initial_states(h0, c0, directions, packing)
    dh_ns = [None] * len(h0s) if dh_n is None else per_layer(dh_n, directions)
    dc_ns = [None] * len(h0s) if dc_n is None else per_layer(dc_n.to(c0s[0].dtype), directions)
    last = len(h0s) - 1

    def read(layer: int) -> Tensor:
        """The input of a layer, of the one after the last the output; packed as late as possible."""
        x = input if layer == 0 else kept[3 * layer - 3]
        assert x is not None  # for the type checker: only gates may be absent
        return x if packing is None or 0 < layer <= last else packing.pack(x)

    for layer in reversed(range(len(h0s))):
        first = layer * directions
        own = weights[first : first + directions]
        gates, cells = kept[3 * layer + 1 : 3 * layer + 3]
        h, c = h0s[layer], c0s[layer]
        dh, dc = dh_ns[layer], dc_ns[layer]
        assert cells is not None
        if gates is None:
            gx = input_projection(read(layer), own).contiguous()
            gates = recompute_gates(gx, read(layer + 1), h, recurrent_weights(own)[0], *ragged)
        first_weight = 3 + first * PER_LAYER
        of_layer = needed[first_weight : first_weight + directions * PER_LAYER]
        need_dx = layer > 0 or needed[0]
        if fused[layer] and any(of_layer):
            dy, dh, dc, *of_weights = torch.ops.fuseblock_cpu.lstm_layer_bwd.default(
                dy, dh, dc, read(layer), h, c, read(layer + 1), gates, cells, present(own), ragged[1], need_dx
            )
            dh0.append(dh)
            dc0.append(dc)
            for d in range(directions):
                dw_ih, dw_hh, db = of_weights[3 * d : 3 * d + 3]
                at = first_weight + d * PER_LAYER
                # A gradient of its own for each bias: users scale gradients in place.
                found[at : at + 4] = dw_ih, dw_hh, *((None, None) if own[d][2] is None else (db, db.clone()))
            continue
        dgx, dh, dc, total = _recurrence_bwd((dy, dh, dc), gates, cells, c, own, ragged, freed)
        dy = None  # released, like the recurrence's gradients below: memory is at its peak here
        wants = [any(of_layer[k::PER_LAYER]) for k in range(PER_LAYER)]
        reads = partial(read, layer), partial(read, layer + 1)
        dy, parts = _through_gemms(dgx, total, gates, cells, h, c, own, ragged, reads, wants, need_dx)
        del dgx
        dh0.append(dh)
        dc0.append(dc)
        for d in range(directions):
            for k, part in enumerate(parts):
                at = first_weight + d * PER_LAYER + k
                if part is not None and needed[at]:
                    found[at] = part[d]
    if packing is not None:
        dy = packing.unpack(dy) if needed[0] and dy is not None else None
        dh0, dc0 = [packing.unpack_state(x) for x in dh0], [packing.unpack_state(x) for x in dc0]
    found[0] = dy if needed[0] else None
    found[1] = join_rows(dh0[::-1]) if needed[1] else None
    found[2] = join_rows(dc0[::-1]).to(c0.dtype) if needed[2] else None
    return found


def _recurrence_bwd(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    own: Sequence[LayerWeights],
    ragged: Sequence[Tensor | None],
    freed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dgx, dh0, dc0, dh) of one layer's recurrence; dgx takes the place of ``gates`` where they are freed."""
    w_hh, w_hr = recurrent_weights(own)
    args = (*grads, None, None, gates, cells, c0, w_hh, w_hr, *ragged)
    chosen = dispatch.choose("lstm_recurrence_bwd", args)
    if (
        freed and chosen.name == "cpu" and w_hr is None and gates.is_contiguous()
    ):  # w_hr's gradient reads gates
        over_gates = torch.ops.fuseblock_cpu.lstm_recurrence_bwd_.default
        return gates, *over_gates(*grads, gates, cells, c0, w_hh, w_hr, *ragged)
    assert chosen.run is not None
    return chosen.run(*args)  # type: ignore[no-any-return]


def _through_gemms(
    dgx: Tensor,
    total: Tensor,
    gates: Tensor,
    cells: Tensor,
    h0: Tensor,
    c0: Tensor,
    own: Sequence[LayerWeights],
    ragged: Sequence[Tensor | None],
    reads: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    wants: Sequence[bool],
    need_dx: bool,
) -> tuple[Tensor | None, list[Sequence[Tensor] | None]]:
    """(dx, gradients of each kind of weight by direction) of one layer, from what the recurrence's backward gave.

    ``reads`` give the layer's input and output: packed copies of them are made late and die early, since memory is at
    its peak here.
    """
    directions = len(own)
    delta = dgx.reshape(-1, dgx.shape[-1])  # not flatten(), which has no rule for batched gradients
    parts: list[Sequence[Tensor] | None] = [None] * PER_LAYER
    if wants[1]:
        parts[1] = recurrent_weight_grads(c0, dgx, reads[1](), h0, *ragged)
    if wants[0]:
        parts[0] = (delta.t() @ reads[0]().flatten(0, -2)).chunk(directions)
    if wants[2] or wants[3]:
        db = delta.sum(0)
        parts[2], parts[3] = db.chunk(directions), db.clone().chunk(directions)
    if wants[4] and own[0][4] is not None:
        m = hidden_before_projection(gates, cells, directions)
        parts[4] = projection_weight_grad(directions, total, m).unbind()
    if not need_dx:
        return None, parts
    columns = delta.chunk(directions, 1)
    dx = columns[0] @ own[0][0]
    for column, w in zip(columns[1:], own[1:], strict=True):
        dx.addmm_(column, w[0])
    return dx.view(*dgx.shape[:-1], -1), parts


def fused_stack(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    ragged: tuple[Tensor | None, Tensor | None],
    packing: Packing | None,
    ours: Run,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of a stack without dropout, as one autograd node; arguments as in `functional.lstm`.

    Args:
        ragged: lengths and batch_sizes.
        packing: how the padded input, states and output lie in the packed rows that ``batch_sizes`` describes.
        ours: runs the same stack on the operators.
        save_gates: keep the gates for backward, or compute them again there.
    """
    flat = [x for w in weights for x in w]
    return _Stack.apply(ours, directions, ragged, packing, save_gates, input, h0, c0, *flat)  # type: ignore[no-any-return]


def infer_stack(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    ragged: tuple[Tensor | None, Tensor | None],
    fused: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where nothing wants a gradient; ``fused``: which layers run so."""
    y, hs, cs = input, [], []
    states = zip(*_initial_states(h0, c0, directions, None), fused, strict=True)
    for layer, (h, c, is_fused) in enumerate(states):
        own = weights[layer * directions : (layer + 1) * directions]
        y, h_n, c_n, _, _ = run_layer(y, h, c, own, ragged, is_fused, False)
        hs.append(h_n)
        cs.append(c_n)
    return y, join_rows(hs), join_rows(cs).to(y.dtype)
