"""The engine of an LSTM layer: PyTorch's own or ours, chosen by what is asked and by the sizes.

On a CPU by a formula; on a GPU by what was measured there (`_tables`), and where nothing was, PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from . import _tables, dispatch
from ._fused_layer import fused_layers
from ._library import forward_mode_active, plain_eager, wants_gradient
from ._recompute import LayerWeights

#: An allocation beyond this (the C library's largest threshold) is mapped afresh, page by page, on every call.
_MAPPED_BYTES = 32 << 20

#: Saved gates beyond this cost more to write and read back than the fused backward pass gains.
_HUGE_BYTES = 256 << 20

#: Units and rows from which a step's GEMM takes nearly all of its time.
_LARGE_HIDDEN, _FULL_BATCH = 256, 32

#: cuDNN's small-H algorithm is asked for up to this H, in inference and in training, whose backward has the lower limit.
_CUDNN_SMALL = {"forward": 192, "train": 128}

_ALWAYS_OURS: ContextVar[bool] = ContextVar("fuseblock_always_ours", default=False)


@contextmanager
def always_ours() -> Iterator[None]:
    """Take our engine within a ``with`` block whatever is faster, with the usual choice of backends: to measure it."""
    token = _ALWAYS_OURS.set(True)
    try:
        yield
    finally:
        _ALWAYS_OURS.reset(token)


def why_not_aten(input: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> str | None:
    """None when PyTorch's own layer can do what is asked, else the reason why it cannot."""
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export unroll PyTorch's layer"
    if lengths is not None or batch_sizes is not None:
        return "ragged batches"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_mode_active():
        return "forward mode"
    if input.device.type == "cuda" and input.shape[0] > 65_535:
        return "cuDNN fails beyond 65,535 time steps"
    return None


def choose_engine(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_gates: bool = True,
) -> tuple[str, str]:
    """(engine, reason): ``"aten"`` or ``"ours"`` for a stack of LSTM layers, arguments as in `functional.lstm`.

    Raises:
        BackendError: ``aten`` is forced and cannot do what is asked.
    """
    name = dispatch.forced()
    if name not in ("auto", "aten"):
        return "ours", f"backend {name!r} is forced"
    reason = why_not_aten(input, lengths, batch_sizes)
    if name == "aten":
        if reason is not None:
            raise dispatch.BackendError(f"no backend can run lstm (asked for aten): aten: {reason}")
        return "aten", "backend 'aten' is forced"
    if reason is not None:
        return "ours", f"aten cannot: {reason}"
    if not save_gates and plain_eager([input, h0, c0, *(x for w in weights for x in w)]):
        return "ours", "PyTorch's layer saves the gates"
    if _ALWAYS_OURS.get():
        return "ours", "it is being measured"
    if input.is_cuda:
        return _choose_on_cuda(input, h0, c0, weights, directions)
    return _choose_on_cpu(input, h0, c0, weights, directions)


def layer_dtype(input: Tensor) -> torch.dtype:
    """What a stack on a GPU computes in, autocast considered."""
    if input.dtype is not torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return input.dtype


def layer_key(input: Tensor, weights: Sequence[LayerWeights], directions: int, training: bool) -> _tables.Key:
    """What a table is asked about a stack on a GPU: operator ``lstm``, candidates ``aten`` and ``ours``."""
    four_hidden, proj = weights[0][1].shape
    hidden, (steps, batch, width) = four_hidden // 4, input.shape
    layers, mode = len(weights) // directions, "train" if training else "forward"
    dtype = layer_dtype(input)
    projected = weights[0][4] is not None
    return (
        ("mode", mode),
        ("dtype", dtype),
        ("tf32", _tables.tf32("rnn", "matmul") if dtype is torch.float32 else ""),
        ("cudnn", _cudnn_algorithm(dtype, mode, hidden, width, batch, layers, directions, projected)),
        ("hidden", hidden),
        ("proj", proj if projected else 0),
        ("input", width),
        ("batch", batch),
        ("steps", min(steps, _tables.STEADY_STEPS)),
        ("layers", layers),
        ("directions", directions),
    )


def _cudnn_algorithm(
    dtype: torch.dtype,
    mode: str,
    hidden: int,
    width: int,
    batch: int,
    layers: int,
    directions: int,
    projected: bool,
) -> str:
    """The algorithm that PyTorch asks cuDNN for; a measurement of one says nothing about another's sizes."""
    if projected or dtype is torch.float64:
        return "standard"
    if hidden <= _CUDNN_SMALL[mode]:
        return "small H"
    single = layers == directions == 1 and hidden <= 1024 and hidden % 128 == width % 128 == 0
    return (
        "persistent" if dtype is torch.float16 and single and batch % 8 == 0 and batch <= 128 else "standard"
    )


def _choose_on_cuda(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[LayerWeights], directions: int
) -> tuple[str, str]:
    """The faster by the table of this GPU; where that says nothing PyTorch's own, which users have anyway."""
    table = _tables.in_force(input.get_device())
    key: _tables.Key = ()
    if table.entries:
        training = wants_gradient([input, h0, c0, *(x for w in weights for x in w)])
        key = layer_key(input, weights, directions, training)
    answer = table.answer("lstm", key)
    engine = next((name for name in answer.order if name in ("aten", "ours")), "aten")
    return engine, answer.rule(engine)


def _choose_on_cpu(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[LayerWeights], directions: int
) -> tuple[str, str]:
    """Ours, but for inference where nearly all of the time is in large GEMMs, or much memory would be written for them.

    Training is ours up to much larger sizes: the saved gates are written anyway, and the backward pass gains.
    """
    hidden, batch = weights[0][1].shape[0] // 4, input.shape[1]
    projection = input.shape[0] * batch * directions * 4 * hidden * input.element_size()
    large = hidden >= _LARGE_HIDDEN and batch >= _FULL_BATCH
    if wants_gradient([input, h0, c0, *(x for w in weights for x in w)]):
        if large and projection > _HUGE_BYTES:
            return "aten", f"training with saved gates of {projection >> 20} MiB is bound by memory and GEMMs"
        if large and weights[0][4] is not None:
            return "aten", f"training a projected layer with H = {hidden} and B = {batch} is bound by GEMMs"
        return "ours", "the fused recurrence trains as fast or faster at these sizes"
    if not large and projection <= _MAPPED_BYTES:
        return "ours", "the fused recurrence is as fast or faster at these sizes"
    if weights[0][4] is not None:
        return "ours", "PyTorch runs projected layers step by step"
    if torch._C._get_tracing_state() is None and all(fused_layers(input, weights, directions, None, None)):
        return "ours", "fused layers do not store the input projection"
    if large:
        return "aten", f"inference with H = {hidden} and B = {batch} is bound by GEMMs"
    return "aten", f"ours would store an input projection of {projection >> 20} MiB, and no gradient needs it"
