"""Operator ``lstm_recurrence``: one LSTM layer over a whole sequence, one or two directions, two derivatives.

    (y, h_n, c_n, gates, c) = lstm_recurrence(gx, h0, c0, w_hh, w_hr, lengths, batch_sizes, save_state)

    gx (T, B, D*4H)   input projection, biases included        w_hh (D, 4H, P)    w_hr (D, P, H) or None (then P = H)
    h0 (D, B, P)      c0 (D, B, H), in the state dtype         y (T, B, D*P)      h_n, c_n shaped like h0, c0
    gates (T, B, D*4H) activated i, f, g, o                    c (T, B, D*H) in the state dtype

``gates`` and ``c`` are what the derivatives need; as real outputs they let the second order be the adjoint of
``_bwd`` alone. Without ``save_state`` both are empty. Ragged batches come in one of two layouts: ``lengths`` (B,),
int64 on the device of gx (row b is active at t < lengths[b] in both directions; beyond, y = 0 and the state is
carried), or packed, ``batch_sizes`` (T,), int64 on the CPU, non-increasing, with gx, y, gates, c of shape (N, ...),
N = sum(batch_sizes). Weight gradients are GEMMs of PyTorch over all steps at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._library import DifferentiableOp, no_third_order, state_dtype
from .._tables import STEADY_STEPS, Key, tf32
from ..launch import resident_recurrence
from ..reference import lstm_recurrence as reference
from . import _candidates
from ._recurrence_vmap import fold_into_batch
from ._recurrent_weight_grad import hidden_before_projection, projection_weight_grad, recurrent_weight_grads

for _op, _reference in (
    ("lstm_recurrence", reference.lstm_recurrence_reference),
    ("lstm_recurrence_bwd", reference.lstm_recurrence_bwd_reference),
    ("lstm_recurrence_bwd_bwd", reference.lstm_recurrence_bwd_bwd_reference),
):
    _triton, _cuda = _candidates.triton(_op, "triton_lstm_recurrence"), _candidates.cuda_recurrence(_op)
    dispatch.register(
        _op,
        _candidates.compiled("cpu", _op),
        *(c for c in _cuda if c.variant in resident_recurrence.TIERS),
        *(c for c in _triton if c.variant == "persistent"),
        *(c for c in _cuda if c.variant not in resident_recurrence.TIERS),
        *(c for c in _triton if c.variant != "persistent"),
        _candidates.reference(_reference),
    )


def _key(first: int, args: Sequence[Any]) -> Key:
    """What tables of measurements are asked; ``first`` is the place of gx, or of the gates that stand for it."""
    x, c0, w_hr, lengths = (args[first + n] for n in (0, 2, 4, 5))
    directions, batch, hidden = c0.shape
    return (
        ("dtype", x.dtype),
        ("tf32", tf32("matmul") if x.dtype is torch.float32 else ""),
        ("ragged", lengths is not None),
        # The last argument of the forward operator.
        ("mode", "forward" if args[-1] is False else "train"),
        ("hidden", hidden),
        ("proj", 0 if w_hr is None else w_hr.shape[1]),
        ("batch", batch),
        ("steps", min(x.shape[0], STEADY_STEPS)),
        ("directions", directions),
    )


for _op, _first in (("lstm_recurrence", 0), ("lstm_recurrence_bwd", 5), ("lstm_recurrence_bwd_bwd", 9)):
    dispatch.measured(_op, dispatch.Question(_first, partial(_key, _first)))

#: Whether lengths on a GPU are checked too, at the price of a host synchronisation.
CHECK_LENGTHS = os.environ.get("FUSEBLOCK_CHECK_LENGTHS", "0") == "1"


def _require(condition: bool, argument: str, expected: object, got: object) -> None:
    if not condition:
        raise ValueError(f"lstm_recurrence: expected {argument} {expected}, got {got}")


def check(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, when shapes, dtypes or devices do not fit together."""
    _require(
        c0.dim() == 3 and c0.shape[0] in (1, 2), "c0 of shape (D, B, H) with D = 1 or 2", "", tuple(c0.shape)
    )
    directions, batch, hidden = c0.shape
    _require(
        h0.dim() == 3 and h0.shape[:2] == c0.shape[:2],
        f"h0 of shape ({directions}, {batch}, P)",
        "",
        tuple(h0.shape),
    )
    proj = h0.shape[2]
    if w_hr is None:
        _require(proj == hidden, f"h0 of shape ({directions}, {batch}, {hidden})", "", tuple(h0.shape))
    else:
        shape = (directions, proj, hidden)
        _require(tuple(w_hr.shape) == shape, "w_hr of shape", shape, tuple(w_hr.shape))
    shape = (directions, 4 * hidden, proj)
    _require(tuple(w_hh.shape) == shape, "w_hh of shape", shape, tuple(w_hh.shape))
    width = directions * 4 * hidden
    if batch_sizes is None:
        _require(
            gx.dim() == 3 and gx.shape[1] == batch and gx.shape[2] == width,
            f"gx of shape (T, {batch}, {width})",
            "",
            tuple(gx.shape),
        )
    else:
        _require(lengths is None, "lengths or batch_sizes", "but not both", "both")
        _require(
            gx.dim() == 2 and gx.shape[1] == width,
            f"gx of shape (N, {width}) with batch_sizes",
            "",
            tuple(gx.shape),
        )
        _require(
            batch_sizes.dim() == 1 and batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu",
            "batch_sizes to be one-dimensional int64 on the CPU",
            "",
            f"{batch_sizes.dtype} {tuple(batch_sizes.shape)} on {batch_sizes.device}",
        )
    _require(gx.shape[0] > 0, "at least one time step in gx,", "T > 0", f"T = {gx.shape[0]}")
    if lengths is not None:
        _require(
            lengths.dtype == torch.int64 and tuple(lengths.shape) == (batch,),
            "lengths",
            f"int64 of shape ({batch},)",
            f"{lengths.dtype} {tuple(lengths.shape)}",
        )
        _require(lengths.device == gx.device, "lengths on", gx.device, lengths.device)
    if not gx.dtype.is_floating_point:
        raise TypeError(f"lstm_recurrence: expected gx of a floating point dtype, got {gx.dtype}")
    for name, x, dtype in (
        ("h0", h0, gx.dtype),
        ("c0", c0, state_dtype(gx.dtype)),
        ("w_hh", w_hh, gx.dtype),
        ("w_hr", w_hr, gx.dtype),
    ):
        if x is not None and x.dtype != dtype:
            raise TypeError(
                f"lstm_recurrence: expected {name} of dtype {dtype} for gx of {gx.dtype}, got {x.dtype}"
            )
        if x is not None and x.device != gx.device:
            raise ValueError(f"lstm_recurrence: expected {name} on {gx.device}, got {x.device}")


def _check_saved(
    gates: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    """`check` of what a derivative gets; gates are like gx."""
    _require(w_hh.dim() == 3, "w_hh", "of shape (D, 4H, P)", tuple(w_hh.shape))
    h0 = gates.new_empty(*c0.shape[:2], w_hh.shape[2])
    check(gates, h0, c0, w_hh, w_hr, lengths, batch_sizes)


def _check_values(gx: Tensor, c0: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> None:
    """Checks that must read tensors, so only where that costs no device synchronisation (or the debug flag is set)."""
    if lengths is not None and lengths.numel() and (lengths.device.type == "cpu" or CHECK_LENGTHS):
        low, high = int(lengths.min()), int(lengths.max())
        _require(
            low >= 0 and high <= gx.shape[0], "lengths within", f"[0, T = {gx.shape[0]}]", f"[{low}, {high}]"
        )
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        falling = all(a >= b for a, b in pairwise(sizes)) and sizes[-1] > 0
        _require(falling, "batch_sizes", "positive and non-increasing", sizes)
        _require(
            sizes[0] == c0.shape[1], f"batch_sizes[0] equal to the batch of c0, {c0.shape[1]},", "", sizes[0]
        )
        _require(
            sum(sizes) == gx.shape[0],
            f"sum(batch_sizes) equal to the rows of gx, {gx.shape[0]},",
            "",
            sum(sizes),
        )


def _fwd_impl(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> Any:
    check(gx, h0, c0, w_hh, w_hr, lengths, batch_sizes)
    _check_values(gx, c0, lengths, batch_sizes)
    return dispatch.run("lstm_recurrence", (gx, h0, c0, w_hh, w_hr, lengths, batch_sizes, save_state))


def _fwd_fake(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, ...]:
    check(gx, h0, c0, w_hh, w_hr, lengths, batch_sizes)
    directions, _, hidden = c0.shape
    lead = gx.shape[:-1]
    y = gx.new_empty(*lead, directions * h0.shape[2])
    if not save_state:
        return y, h0.new_empty(h0.shape), c0.new_empty(c0.shape), gx.new_empty(0), c0.new_empty(0)
    gates, c = gx.new_empty(gx.shape), c0.new_empty(*lead, directions * hidden)
    return y, h0.new_empty(h0.shape), c0.new_empty(c0.shape), gates, c


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, h0, c0, w_hh, w_hr, lengths, batch_sizes, save_state = inputs
    y, _, _, gates, c = output
    ctx.set_materialize_grads(False)
    ctx.saved_state = save_state
    ctx.forced = dispatch.forced()
    ctx.save_for_backward(y, gates, c, h0, c0, w_hh, w_hr, lengths, batch_sizes)


def _fwd_backward(
    ctx: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_c: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if not ctx.saved_state:
        raise RuntimeError("lstm_recurrence: backward needs save_state=True in the forward call")
    if all(g is None for g in (dy, dh_n, dc_n, d_gates, d_c)):
        return (None,) * 8
    y, gates, c, h0, c0, w_hh, w_hr, lengths, batch_sizes = ctx.saved_tensors
    with dispatch.backend(ctx.forced):
        dgx, dh0, dc0, dh = lstm_recurrence_bwd(
            dy, dh_n, dc_n, d_gates, d_c, gates, c, c0, w_hh, w_hr, lengths, batch_sizes
        )
    dw_hh = dw_hr = None
    if ctx.needs_input_grad[3]:
        dw_hh = torch.stack(recurrent_weight_grads(c0, dgx, y, h0, lengths, batch_sizes))
    if w_hr is not None and ctx.needs_input_grad[4]:
        m = hidden_before_projection(gates, c, w_hr.shape[0])
        dw_hr = projection_weight_grad(w_hr.shape[0], dh, m)
    return dgx, dh0, dc0, dw_hh, dw_hr, None, None, None


def _bwd_impl(*args: Any) -> Any:
    return dispatch.run("lstm_recurrence_bwd", args)


def _bwd_fake(
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
) -> tuple[Tensor, ...]:
    _check_saved(gates, c0, w_hh, w_hr, lengths, batch_sizes)
    directions, batch, _ = c0.shape
    proj = w_hh.shape[2]
    dh = gates.new_empty(0) if w_hr is None else gates.new_empty(*gates.shape[:-1], directions * proj)
    return gates.new_empty(gates.shape), gates.new_empty(directions, batch, proj), c0.new_empty(c0.shape), dh


def _bwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.forced = dispatch.forced()
    dgx, _, _, dh = output
    ctx.save_for_backward(*inputs, dgx, dh)


def _bwd_backward(
    ctx: Any, v_dgx: Tensor | None, v_dh0: Tensor | None, v_dc0: Tensor | None, v_dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    if all(v is None for v in (v_dgx, v_dh0, v_dc0, v_dh)):
        return (None,) * 12
    *inputs, dgx, dh = ctx.saved_tensors
    gates, c, c0, w_hh, w_hr, lengths, batch_sizes = inputs[5:]
    with dispatch.backend(ctx.forced):
        *adjoints, m_bar = lstm_recurrence_bwd_bwd(v_dgx, v_dh0, v_dc0, v_dh, *inputs, dgx)
    # Where dy (dh_n, ...) was absent there is nothing to hand its adjoint to.
    of_cotangents = [None if x is None else a for x, a in zip(inputs[:5], adjoints[:5], strict=True)]
    a_w_hh = a_w_hr = None
    if ctx.needs_input_grad[8]:
        # dh_{t-1} takes delta_t W_hh, so W_hh's adjoint pairs delta with the adjoint of dh as dW_hh pairs it with h.
        a_w_hh = torch.stack(recurrent_weight_grads(c0, dgx, adjoints[0], v_dh0, lengths, batch_sizes))
    if w_hr is not None and ctx.needs_input_grad[9]:
        a_w_hr = projection_weight_grad(w_hr.shape[0], dh, m_bar)
    return *of_cotangents, *adjoints[5:], a_w_hh, a_w_hr, None, None


def _bwd_bwd_impl(*args: Any) -> Any:
    return dispatch.run("lstm_recurrence_bwd_bwd", args)


def _bwd_bwd_fake(
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
    _check_saved(gates, c0, w_hh, w_hr, lengths, batch_sizes)
    directions, batch, hidden = c0.shape
    proj, lead = w_hh.shape[2], gates.shape[:-1]
    m_bar = gates.new_empty(0) if w_hr is None else gates.new_empty(*lead, directions * hidden)
    return (
        gates.new_empty(*lead, directions * proj),
        gates.new_empty(directions, batch, proj),
        c0.new_empty(c0.shape),
        gates.new_empty(gates.shape),
        c.new_empty(c.shape),
        gates.new_empty(gates.shape),
        c.new_empty(c.shape),
        c0.new_empty(c0.shape),
        m_bar,
    )


def _autocast(dtype: torch.dtype, args: Any) -> tuple[Any, ...]:
    gx, h0, c0, w_hh, w_hr, lengths, batch_sizes, save_state = args
    if gx.dtype is torch.float64:
        return tuple(args)
    w_hr = None if w_hr is None else w_hr.to(dtype)
    return gx.to(dtype), h0.to(dtype), c0.float(), w_hh.to(dtype), w_hr, lengths, batch_sizes, save_state


# Where the batch dimension of every argument and output lies (None: the argument has none).
_SEQ, _STATE, _NONE, _ROW = 1, 1, None, 0

lstm_recurrence: DifferentiableOp = DifferentiableOp(
    "lstm_recurrence(Tensor gx, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr, Tensor? lengths, "
    "Tensor? batch_sizes, bool save_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_fwd_impl,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
    vmap=fold_into_batch(
        lambda *args: lstm_recurrence(*args),
        inputs=(_SEQ, _STATE, _STATE, _NONE, _NONE, _ROW, _NONE, _NONE),
        outputs=(_SEQ, _STATE, _STATE, _SEQ, _SEQ),
        batch_sizes=6,
    ),
    autocast=_autocast,
)
_BWD_INPUTS = (_SEQ, _STATE, _STATE, _SEQ, _SEQ, _SEQ, _SEQ, _STATE, _NONE, _NONE, _ROW, _NONE)
lstm_recurrence_bwd: DifferentiableOp = DifferentiableOp(
    "lstm_recurrence_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? d_gates, Tensor? d_c, Tensor gates, Tensor c, "
    "Tensor c0, Tensor w_hh, Tensor? w_hr, Tensor? lengths, Tensor? batch_sizes) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_bwd_impl,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
    vmap=fold_into_batch(
        lambda *args: lstm_recurrence_bwd(*args),
        inputs=_BWD_INPUTS,
        outputs=(_SEQ, _STATE, _STATE, _SEQ),
        batch_sizes=11,
    ),
)
_no_setup, _no_backward = no_third_order("lstm_recurrence_bwd_bwd")
lstm_recurrence_bwd_bwd: DifferentiableOp = DifferentiableOp(
    "lstm_recurrence_bwd_bwd(Tensor? v_dgx, Tensor? v_dh0, Tensor? v_dc0, Tensor? v_dh, Tensor? dy, Tensor? dh_n, "
    "Tensor? dc_n, Tensor? d_gates, Tensor? d_c, Tensor gates, Tensor c, Tensor c0, Tensor w_hh, Tensor? w_hr, "
    "Tensor? lengths, Tensor? batch_sizes, Tensor dgx) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_bwd_bwd_impl,
    fake=_bwd_bwd_fake,
    setup_context=_no_setup,
    backward=_no_backward,
    vmap=fold_into_batch(
        lambda *args: lstm_recurrence_bwd_bwd(*args),
        inputs=(_SEQ, _STATE, _STATE, _SEQ, *_BWD_INPUTS, _SEQ),
        outputs=(_SEQ, _STATE, _STATE, _SEQ, _SEQ, _SEQ, _SEQ, _STATE, _SEQ),
        batch_sizes=15,
    ),
)
