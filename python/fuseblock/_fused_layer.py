"""Layers small enough for a core's cache, on a CPU: one op per pass does the whole layer, projection included.

    fuseblock_cpu::lstm_layer(x, h0, c0, weights, batch_sizes, save_state) -> (y, h_n, c_n, gates, c)
    fuseblock_cpu::lstm_layer_bwd(dy, dh_n, dc_n, x, h0, c0, y, gates, c, weights, batch_sizes, need_dx)
        -> [dx, dh0, dc0, then per direction dw_ih, dw_hh, db]

The results are those of ``lstm_recurrence`` on the input projection; ``weights`` holds per direction w_ih, w_hh and, if
there are biases, b_ih, b_hh. ``db`` is the gradient of either bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _ext, dispatch
from ._library import KERNEL_DTYPES, state_dtype
from ._recompute import LayerWeights

#: None when the op is there, else the reason why it is not.
why_absent = (
    None
    if _ext.has("fuseblock_cpu", "lstm_layer")
    else _ext.why_not or "the compiled library has no CPU kernels"
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
) -> list[bool]:
    """Which layers of a stack the op takes; arguments as in `functional.lstm`."""
    return [reason is None for reason in why_not_fused(input, weights, directions, lengths, batch_sizes)]


def why_not_fused(
    input: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> list[str | None]:
    """Per layer of a stack the reason why the op does not take it, or None; arguments as in `functional.lstm`."""
    layers = weights[::directions]
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


def present(own: Sequence[LayerWeights]) -> list[Tensor]:
    """The weights of a layer as the op takes them."""
    return [x for w in own for x in w if x is not None]


def per_layer(state: Tensor, directions: int) -> Sequence[Tensor]:
    """(L*D, ...) as one (D, ...) for each layer."""
    if state.shape[0] == directions:
        return (state,)
    return state.view(-1, directions, *state.shape[1:]).unbind()  # faster than split()


def infer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of a stack whose layers the op takes, where nothing wants a gradient."""
    hs, cs = [], []
    y, forward = input, torch.ops.fuseblock_cpu.lstm_layer.default
    states = zip(per_layer(h0, directions), per_layer(c0.to(state_dtype(c0.dtype)), directions), strict=True)
    for layer, (h, c) in enumerate(states):
        own = weights[layer * directions : (layer + 1) * directions]
        y, h_n, c_n, _, _ = forward(y, h, c, present(own), batch_sizes, False)
        hs.append(h_n)
        cs.append(c_n)
    if len(hs) == 1:
        return y, hs[0], cs[0].to(y.dtype)
    return y, torch.cat(hs), torch.cat(cs).to(y.dtype)
