"""Small layers, input projection included: one op per pass on a CPU, one launch forward on a GPU.

On a CPU, for layers that fit into a core's cache:

    fuseblock_cpu::lstm_layer(x, h0, c0, weights, batch_sizes, save_state) -> (y, h_n, c_n, gates, c)
    fuseblock_cpu::lstm_layer_bwd(dy, dh_n, dc_n, x, h0, c0, y, gates, c, weights, batch_sizes, need_dx)
        -> [dx, dh0, dc0, then per direction dw_ih, dw_hh, db]

The results are those of ``lstm_recurrence`` on the input projection; ``weights`` holds per direction w_ih, w_hh and, if
there are biases, b_ih, b_hh. ``db`` is the gradient of either bias.

On a GPU, for few inputs: `launch.cuda_lstm_layer`, which saves the same for the backward pass of the recurrence. It runs
where a table has measured it to be faster (operator ``lstm_layer``, `FUSED` against `APART`), and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ext, _tables, dispatch
from ._library import KERNEL_DTYPES
from ._recompute import LayerWeights
from .launch import cuda_lstm_layer

#: The candidates of ``lstm_layer`` in tables of measurements: one launch; a GEMM, then `lstm_recurrence`.
FUSED, APART = "fused", "apart"

#: None when the CPU's op is there, else the reason why it is not.
why_absent = (
    None
    if _ext.has("fuseblock_cpu", "lstm_layer")
    else _ext.why_not or "the compiled library has no CPU kernels"
)

#: The same of the GPU's.
why_absent_on_cuda = (
    None
    if _ext.has("fuseblock_cuda", "lstm_block_layer_fwd")
    else _ext.why_not or "the compiled library has no such kernel"
)

#: Weights of a layer up to which its rows are not worth sharing out. The op splits rows only, where there are few of them
#: GEMMs over all steps use more threads.
_ONE_THREAD_WEIGHTS = 1 << 16

#: Rows of all steps up to which packing the weights costs more than it gains.
_FEW_ROWS = 4


def fused_layers(
    input: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    training: bool = False,
) -> list[bool]:
    """Which layers of a stack run fused; arguments as in `functional.lstm`, and whether a gradient is wanted."""
    reasons = why_not_fused(input, weights, directions, lengths, batch_sizes, training)
    return [reason is None for reason in reasons]


def why_not_fused(
    input: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    training: bool = False,
) -> list[str | None]:
    """Per layer of a stack the reason why it does not run fused, or None; arguments as in `fused_layers`."""
    layers = weights[::directions]
    if input.is_cuda:
        reason = _why_not_on_cuda(input)
        return [
            reason or _why_not_layer_on_cuda(input, w, directions, lengths is not None, training)
            for w in layers
        ]
    reason = _why_not_input(input, lengths, batch_sizes)
    if reason is not None:
        return [reason] * len(layers)
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    few_rows = batch * directions < torch.get_num_threads()
    return [_why_not_weights(w, few_rows) for w in layers]


def _why_not_input(input: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> str | None:
    if why_absent is not None:
        return why_absent
    if input.device.type != "cpu":
        return f"tensors are on {input.device}"
    if input.dtype not in KERNEL_DTYPES:
        return f"dtype {input.dtype} is not one of float64, float32, float16, bfloat16"
    if lengths is not None:
        return "the batch is not packed: no row ends early, or one is empty"
    if dispatch.forced() not in ("auto", "aten", "cpu"):  # a forced `aten` concerns whole stacks only
        return f"backend {dispatch.forced()!r} is forced"
    if input.dim() != (3 if batch_sizes is None else 2):
        return f"the input has {input.dim()} dimensions"
    if input.numel() <= _FEW_ROWS * input.shape[-1]:
        return f"packing the weights is not worth it for {_FEW_ROWS} rows of all steps or fewer"
    return None


def _why_not_weights(weights: LayerWeights, few_rows: bool) -> str | None:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    if w_hr is not None:
        return "it has no projection"
    if (b_ih is None) != (b_hh is None):
        return "it takes both biases or none"
    if not torch.ops.fuseblock_cpu.lstm_layer_fits(w_ih.shape[1], w_hh.shape[1]):
        return "the weights do not fit into a core's cache"
    if few_rows and w_ih.numel() + w_hh.numel() > _ONE_THREAD_WEIGHTS:
        return "the threads are more than the rows that it could share out"
    return None


def _why_not_on_cuda(input: Tensor) -> str | None:
    if why_absent_on_cuda is not None:
        return why_absent_on_cuda
    if dispatch.forced() not in ("auto", "aten", "cuda"):
        return f"backend {dispatch.forced()!r} is forced"
    if input.dim() != 3:
        return f"the input has {input.dim()} dimensions"
    return None


def _why_not_layer_on_cuda(
    input: Tensor, weights: LayerWeights, directions: int, ragged: bool, training: bool
) -> str | None:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    if (b_ih is None) != (b_hh is None):
        return "it takes both biases or none"
    reason = cuda_lstm_layer.why_not(w_ih, w_hh, w_hr)
    if reason is not None:
        return reason
    table = _tables.in_force(input.get_device())
    key = layer_key(input, weights, directions, ragged, training) if table.entries else ()
    answer = table.answer("lstm_layer", key)
    return None if answer.order[:1] == (FUSED,) else answer.rule(APART)


def layer_key(
    input: Tensor, weights: LayerWeights, directions: int, ragged: bool, training: bool
) -> _tables.Key:
    """What a table is asked about a layer on a GPU, from the first dimensions of the stack's input and its own weights."""
    w_ih, w_hh, b_ih, _, _ = weights
    steps, batch, _ = input.shape
    return (
        ("dtype", w_hh.dtype),
        ("ragged", ragged),
        ("mode", "train" if training else "forward"),
        ("biased", b_ih is not None),
        ("hidden", w_hh.shape[1]),
        ("input", w_ih.shape[1]),
        ("batch", batch),
        ("steps", min(steps, _tables.STEADY_STEPS)),
        ("directions", directions),
    )


def present(own: Sequence[LayerWeights]) -> list[Tensor]:
    """The weights of a layer as the op takes them."""
    return [x for w in own for x in w if x is not None]


def per_layer(state: Tensor, directions: int) -> Sequence[Tensor]:
    """(L*D, ...) as one (D, ...) for each layer."""
    if state.shape[0] == directions:
        return (state,)
    return state.view(-1, directions, *state.shape[1:]).unbind()  # faster than split()


def has_backward(x: Tensor) -> bool:
    """Whether a layer that ran fused forward does so backward; what others save, the recurrence's backward takes."""
    return not x.is_cuda


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    own: Sequence[LayerWeights],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, ...]:
    """(y, h_n, c_n, gates, c) of a layer that runs fused; c0 in the state dtype."""
    if not x.is_cuda:
        op = torch.ops.fuseblock_cpu.lstm_layer.default
        return op(x, h0, c0, present(own), batch_sizes, save_state)  # type: ignore[no-any-return]
    kernel = torch.ops.fuseblock_cuda.lstm_block_layer_fwd.default
    return cuda_lstm_layer.lstm_layer(kernel, x, h0, c0, own, lengths, save_state)
