"""Operator ``lstm_gates``: the LSTM cell's gate math, with first and second derivatives.

    (h, c_new) = lstm_gates(gates, c)       gates (..., 4H) pre-activations i, f, g, o; c (..., H)

Nothing but the inputs is saved: backward recomputes the activations, which costs no memory traffic. ``c`` has the
dtype of ``gates`` or float32; ``h`` has the dtype of ``gates`` and ``c_new`` that of ``c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._library import DifferentiableOp, no_third_order, state_dtype
from ..reference import lstm_gates as reference
from . import _candidates

for _op, _reference in (
    ("lstm_gates", reference.lstm_gates_reference),
    ("lstm_gates_bwd", reference.lstm_gates_bwd_reference),
    ("lstm_gates_bwd_bwd", reference.lstm_gates_bwd_bwd_reference),
):
    dispatch.register(
        _op,
        _candidates.compiled("cpu", _op),
        _candidates.compiled("cuda", _op),
        *_candidates.triton(_op, "triton_lstm_gates"),
        _candidates.reference(_reference),
    )


def check(gates: Tensor, c: Tensor) -> None:
    """Raise ValueError or TypeError when ``gates`` and ``c`` do not fit together."""
    if gates.dim() == 0 or c.dim() == 0 or (*c.shape[:-1], 4 * c.shape[-1]) != tuple(gates.shape):
        raise ValueError(
            "lstm_gates: expected gates of shape (..., 4H) and c of shape (..., H), "
            f"got {tuple(gates.shape)} and {tuple(c.shape)}"
        )
    if not gates.dtype.is_floating_point:
        raise TypeError(f"lstm_gates: expected floating point gates, got {gates.dtype}")
    if c.dtype not in (gates.dtype, state_dtype(gates.dtype)):
        raise TypeError(
            f"lstm_gates: expected c of dtype {gates.dtype} or {state_dtype(gates.dtype)}, got {c.dtype}"
        )
    if c.device != gates.device:
        raise ValueError(f"lstm_gates: expected gates and c on one device, got {gates.device} and {c.device}")


def _fwd_impl(gates: Tensor, c: Tensor) -> Any:
    check(gates, c)
    return dispatch.run("lstm_gates", (gates, c))


def _fwd_fake(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    check(gates, c)
    return gates.new_empty(c.shape), c.new_empty(c.shape)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.forced = dispatch.forced()


def _fwd_backward(ctx: Any, dh: Tensor | None, dc_new: Tensor | None) -> Any:
    if dh is None and dc_new is None:
        return None, None
    with dispatch.backend(ctx.forced):
        return lstm_gates_bwd(dh, dc_new, *ctx.saved_tensors)


def _bwd_impl(dh: Tensor | None, dc_new: Tensor | None, gates: Tensor, c: Tensor) -> Any:
    return dispatch.run("lstm_gates_bwd", (dh, dc_new, gates, c))


def _bwd_fake(dh: Tensor | None, dc_new: Tensor | None, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return gates.new_empty(gates.shape), c.new_empty(c.shape)


def _bwd_backward(ctx: Any, v_dgates: Tensor | None, v_dc: Tensor | None) -> Any:
    if v_dgates is None and v_dc is None:
        return (None,) * 4
    dh, dc_new, gates, c = ctx.saved_tensors
    with dispatch.backend(ctx.forced):
        a_dh, a_dc_new, a_gates, a_c = lstm_gates_bwd_bwd(v_dgates, v_dc, dh, dc_new, gates, c)
    return None if dh is None else a_dh, None if dc_new is None else a_dc_new, a_gates, a_c


def _bwd_bwd_impl(*args: Any) -> Any:
    return dispatch.run("lstm_gates_bwd_bwd", args)


def _bwd_bwd_fake(
    v_dgates: Tensor | None,
    v_dc: Tensor | None,
    dh: Tensor | None,
    dc_new: Tensor | None,
    gates: Tensor,
    c: Tensor,
) -> tuple[Tensor, ...]:
    return gates.new_empty(c.shape), c.new_empty(c.shape), gates.new_empty(gates.shape), c.new_empty(c.shape)


def _vmap(op: Any) -> Any:
    """Gate math does not care about leading dimensions: the mapped one becomes another of them."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        def lead(x: Any, dim: int | None) -> Any:
            if x is None:
                return None
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        outputs = op(*(lead(a, d) for a, d in zip(args, in_dims, strict=True)))
        return outputs, (0,) * len(outputs)

    return rule


def _autocast(dtype: torch.dtype, args: Sequence[Any]) -> tuple[Any, ...]:
    gates, c = args
    if gates.dtype is torch.float64:
        return gates, c
    return gates.to(dtype), c if c.dtype in (dtype, torch.float32) else c.float()


lstm_gates: DifferentiableOp = DifferentiableOp(
    "lstm_gates(Tensor gates, Tensor c) -> (Tensor, Tensor)",
    impl=_fwd_impl,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
    vmap=_vmap(lambda *args: lstm_gates(*args)),
    autocast=_autocast,
)
lstm_gates_bwd: DifferentiableOp = DifferentiableOp(
    "lstm_gates_bwd(Tensor? dh, Tensor? dc_new, Tensor gates, Tensor c) -> (Tensor, Tensor)",
    impl=_bwd_impl,
    fake=_bwd_fake,
    setup_context=_fwd_setup,
    backward=_bwd_backward,
    vmap=_vmap(lambda *args: lstm_gates_bwd(*args)),
)
_no_setup, _no_backward = no_third_order("lstm_gates_bwd_bwd")
lstm_gates_bwd_bwd: DifferentiableOp = DifferentiableOp(
    "lstm_gates_bwd_bwd(Tensor? v_dgates, Tensor? v_dc, Tensor? dh, Tensor? dc_new, Tensor gates, Tensor c)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_bwd_bwd_impl,
    fake=_bwd_bwd_fake,
    setup_context=_no_setup,
    backward=_no_backward,
    vmap=_vmap(lambda *args: lstm_gates_bwd_bwd(*args)),
)
