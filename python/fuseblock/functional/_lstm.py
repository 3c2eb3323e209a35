"""What users call: argument checks, shapes, and the choice of engine.

An LSTM layer can be run by two engines: ``aten``, PyTorch's own layer (oneDNN on a CPU, cuDNN on a GPU), or ``ours``,
an input projection by one GEMM followed by the operator ``lstm_recurrence``, whose backend is chosen by the operator.
`choose_engine` takes the faster that can do what is asked; `fuseblock.explain` prints its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, ops
from .._engine import choose_engine
from .._fused_layer import fused_layers
from .._library import plain_eager, state_dtype, wants_gradient
from .._ragged import Packing, packing, pad_rows
from .._recompute import LayerWeights, Run
from .._stack import fused_stack, infer_stack, input_projection, join_rows, recurrent_weights
from ..aten import aten_lstm
from ..reference import lstm_gates_reference, lstm_recurrence_reference

__all__ = ["lstm", "lstm_cell", "lstm_gates", "lstm_recurrence"]


def lstm_gates(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gate math of an LSTM cell.

        i, f, g, o = gates.chunk(4, -1)
        c_new = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c_new)

    Args:
        gates: pre-activations (..., 4H), any of float64, float32, float16, bfloat16.
        c: cell state (..., H), of the dtype of ``gates`` or float32.

    Returns:
        h (..., H) in the dtype of ``gates`` and c_new (..., H) in the dtype of ``c``. Differentiable twice.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: dtypes do not fit.
        fuseblock.BackendError: the forced backend cannot run these tensors.
    """
    if dispatch.plain_pytorch():
        gates, c = ops.lstm_gates.cast_for_autocast((gates, c))
        ops.check_lstm_gates(gates, c)
        return lstm_gates_reference(gates, c)
    h, c_new = ops.lstm_gates(gates, c)
    return h, c_new


def lstm_recurrence(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer over a whole sequence, given its input projection.

    For every direction d and step t, with gx_t = W_ih x_t + b_ih + b_hh:

        i, f, g, o = gx_t + W_hh[d] h_{t-1}     c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        m_t = sigmoid(o) * tanh(c_t)            h_t = m_t, or W_hr[d] m_t with a projection

    Args:
        gx: (T, B, D*4H), or (N, D*4H) packed. Direction 1 runs from the end of every sequence to its beginning.
        h0: (D, B, P) in the dtype of gx. c0: (D, B, H), float32 when gx is 16 bit, else in the dtype of gx.
        w_hh: (D, 4H, P). w_hr: (D, P, H), or None and then P = H.
        lengths: int64 (B,) on the device of gx; row b ends after lengths[b] steps. On a CPU values outside [0, T]
            raise; on a GPU they are clamped (``FUSEBLOCK_CHECK_LENGTHS=1`` checks them at the price of a sync).
        batch_sizes: int64 (T,) on the CPU, as in ``torch.nn.utils.rnn.PackedSequence``; excludes ``lengths``.

    Returns:
        y (T, B, D*P) or (N, D*P), zero beyond a row's end; h_n (D, B, P) and c_n (D, B, H) at every row's end.

    Raises:
        ValueError, TypeError: an argument does not fit, with its name, what was expected and what came.
        fuseblock.BackendError: the forced backend cannot run these tensors.
    """
    tensors = (gx, h0, c0, w_hh, w_hr)
    if dispatch.plain_pytorch():
        args = ops.lstm_recurrence.cast_for_autocast((*tensors, lengths, batch_sizes, False))
        ops.check_lstm_recurrence(*args[:-1])
        y, h_n, c_n, _, _ = lstm_recurrence_reference(*args)
        return y, h_n, c_n
    save_state = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        save_state = True  # a wrapped tensor does not tell whether an outer transform will differentiate it
    y, h_n, c_n, _, _ = ops.lstm_recurrence(*tensors, lengths, batch_sizes, save_state)
    return y, h_n, c_n


def lstm_cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: gates = W_ih x + b_ih + W_hh h + b_hh, then `lstm_gates`.

    Args:
        input: (B, I). h, c: (B, H). w_ih: (4H, I). w_hh: (4H, H). b_ih, b_hh: (4H,) or None.

    Returns:
        (h, c) of the next step, (B, H) each.
    """
    gates = F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    return lstm_gates(gates, c)


def lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers, the mathematics of ``torch.nn.LSTM``.

    Args:
        input: (T, B, I), or (N, I) packed with ``batch_sizes``.
        h0: (L*D, B, P), c0: (L*D, B, H); None for zeros.
        weights: per layer and direction (layer 0 forward, layer 0 reverse, ...) a tuple (w_ih (4H, I), w_hh (4H, P),
            b_ih (4H,) or None, b_hh (4H,) or None, w_hr (P, H) or None).
        bidirectional: whether a layer has two directions.
        dropout: probability of zeroing an element of every layer's output but the last's, where ``training``.
        lengths, batch_sizes: ragged batches, as in `lstm_recurrence`.
        save_gates: False keeps less for backward, half or less of it: the gates (4H of the 6H numbers per row, step and
            direction that are kept beside the input) are computed again from y, by two GEMMs over all steps. In eager mode,
            where the stack is one autograd node: compiled code, function transforms, autocast and dropout between layers
            keep what their operators keep.

    Returns:
        output (T, B, D*P) or (N, D*P), h_n (L*D, B, P), c_n (L*D, B, H), in the dtype of ``input`` (under autocast, in
        the autocast dtype).

    Raises:
        ValueError: the numbers of weights and of states do not fit, or both ``lengths`` and ``batch_sizes`` are given.
    """
    directions = 2 if bidirectional else 1
    check(h0, c0, weights, directions, lengths, batch_sizes)
    dropout = dropout if training and len(weights) > directions else 0.0
    engine, _ = choose_engine(input, h0, c0, weights, directions, lengths, batch_sizes, save_gates)
    if engine == "aten":
        ours = partial(_ours, directions=directions)
        h0, c0 = _states(input, h0, c0, weights, input.shape[1])
        return aten_lstm(input, h0, c0, weights, directions, dropout, training, ours)
    if lengths is not None and _can_pack(input, lengths):
        packed = packing(input, lengths)
        if packed is not None:
            return _ours_or_one_node(
                input, h0, c0, weights, directions, dropout, packing=packed, save_gates=save_gates
            )
    if batch_sizes is not None and input.device.type != "cpu" and not dispatch.plain_pytorch():
        padded, lengths, positions = pad_rows(input, batch_sizes)
        output, h_n, c_n = _ours_or_one_node(
            padded, h0, c0, weights, directions, dropout, lengths, save_gates=save_gates
        )
        return output.flatten(0, 1).index_select(0, positions), h_n, c_n
    return _ours_or_one_node(
        input, h0, c0, weights, directions, dropout, lengths, batch_sizes, save_gates=save_gates
    )


def check(
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    """Raise ValueError where the numbers of weights and states do not fit, or both ways to be ragged are given."""
    count = len(weights)
    if count == 0 or count % directions:
        raise ValueError(f"lstm: expected weights for every layer and direction ({directions}), got {count}")
    if h0 is not None and h0.shape[0] != count:
        raise ValueError(f"lstm: expected h0 of shape ({count}, B, P), got {tuple(h0.shape)}")
    if c0 is not None and c0.shape[0] != count:
        raise ValueError(f"lstm: expected c0 of shape ({count}, B, H), got {tuple(c0.shape)}")
    if lengths is not None and batch_sizes is not None:
        raise ValueError("lstm: expected lengths or batch_sizes, got both")


def _can_pack(input: Tensor, lengths: Tensor) -> bool:
    """Whether dropping the rows beyond their ends is possible without a device sync or a data-dependent trace."""
    return (
        input.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and type(lengths) is Tensor
        and type(input) is Tensor
    )


def _ours_or_one_node(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[LayerWeights],
    directions: int,
    dropout: float,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    packing: Packing | None = None,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack on our kernels: as one autograd node where that is possible, else operator by operator.

    With ``packing`` the padded input is run in packed layout.
    """
    tensors = [input, h0, c0, *(x for w in weights for x in w)]
    if packing is not None:
        batch_sizes = packing.batch_sizes
    direct = not dropout and not dispatch.plain_pytorch() and plain_eager(tensors)
    if direct and wants_gradient(tensors):
        ours: Run = partial(_ours, directions=directions, lengths=lengths, batch_sizes=batch_sizes)
        if packing is not None:
            ours = packing.around(ours)
        h0, c0 = _states(input, h0, c0, weights, _batch(input, batch_sizes))
        ragged = lengths, batch_sizes
        return fused_stack(input, h0, c0, weights, directions, ragged, packing, ours, save_gates)
    if packing is not None:
        run = partial(_ours_or_one_node, directions=directions, dropout=dropout, batch_sizes=batch_sizes)
        return packing.around(run)(input, h0, c0, weights)
    fused = fused_layers(input, weights, directions, lengths, batch_sizes) if direct else []
    if any(fused) and (input.is_cuda or all(fused)):
        h0, c0 = _states(input, h0, c0, weights, _batch(input, batch_sizes))
        return infer_stack(input, h0, c0, weights, directions, (lengths, batch_sizes), fused)
    return _ours(input, h0, c0, weights, directions, dropout, lengths, batch_sizes)


def _batch(input: Tensor, batch_sizes: Tensor | None) -> int:
    return input.shape[1] if batch_sizes is None else int(batch_sizes[0])


def _states(
    like: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[LayerWeights], batch: int
) -> tuple[Tensor, Tensor]:
    """The initial states, zeros if absent."""
    four_hidden, proj = weights[0][1].shape
    return (
        like.new_zeros(len(weights), batch, proj) if h0 is None else h0,
        like.new_zeros(len(weights), batch, four_hidden // 4) if c0 is None else c0,
    )


def _ours(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[LayerWeights],
    directions: int,
    dropout: float = 0.0,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stack on `lstm_recurrence`, layer after layer."""
    batch = _batch(input, batch_sizes)
    hs, cs = [], []
    y = input
    for first in range(0, len(weights), directions):
        rows = slice(first, first + directions)
        gx = input_projection(y, weights[rows])
        w_hh, w_hr = recurrent_weights(weights[rows])
        h, c = _states(
            gx, None if h0 is None else h0[rows], None if c0 is None else c0[rows], weights[rows], batch
        )
        y, h_n, c_n = lstm_recurrence(gx, h, c.to(state_dtype(c.dtype)), w_hh, w_hr, lengths, batch_sizes)
        hs.append(h_n)
        cs.append(c_n.to(y.dtype))
        if dropout and first + directions < len(weights):
            y = F.dropout(y, dropout)
    return y, join_rows(hs), join_rows(cs)
