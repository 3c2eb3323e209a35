"""Second derivatives by recomputation, for autograd nodes that stand for a whole stack of layers.

Such a node runs its first backward without recording it. When that backward is itself to be differentiated
(``create_graph=True``), the stack is run again on our operators, whose derivatives autograd composes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: (w_ih, w_hh, b_ih, b_hh, w_hr) of one layer and direction; biases and projection may be None.
LayerWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
PER_LAYER = 5

#: Runs a stack: (input, h0, c0, weights) -> (output, h_n, c_n), differentiable to the order that is asked.
Run = Callable[[Tensor, Tensor | None, Tensor | None, Sequence[LayerWeights]], tuple[Tensor, Tensor, Tensor]]


def layer_weights(flat: Sequence[Tensor | None]) -> list[LayerWeights]:
    """Group a flat list of weights by layer and direction."""
    return [tuple(flat[k : k + PER_LAYER]) for k in range(0, len(flat), PER_LAYER)]  # type: ignore[misc]


def recorded_gradients(
    run: Run,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of a stack with respect to its tensors, as differentiable functions of them and of ``grads``.

    Args:
        run: runs the stack.
        tensors: input, h0, c0 and the flat weights.
        needed: which of them want a gradient.
        grads: gradients of output, h_n and c_n; None where there is none.
    """
    # Views: the gradient is taken with respect to what this run reads, not to where it came from.
    recorded = torch.is_grad_enabled()  # else forward mode asks, and nobody for this gradient's own graph
    with torch.enable_grad():
        leaves = [None if x is None else x.view_as(x) for x in tensors]
        outputs = run(leaves[0], leaves[1], leaves[2], layer_weights(leaves[3:]))  # type: ignore[arg-type]
    used = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [x for x, need in zip(leaves, needed, strict=True) if need and x is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in used], wanted, [g for _, g in used], create_graph=recorded, allow_unused=True
        )
    )
    return [next(found) if need and x is not None else None for x, need in zip(leaves, needed, strict=True)]
