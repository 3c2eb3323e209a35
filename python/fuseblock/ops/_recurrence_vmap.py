"""The batching rule of the recurrence family: the mapped dimension joins the batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._library import loop_vmap


def fold_into_batch(
    op: Callable[..., Any], inputs: Sequence[int | None], outputs: Sequence[int], batch_sizes: int
) -> Callable[..., Any]:
    """A vmap rule for an operator whose arguments and outputs have one batch dimension each.

    Args:
        op: the operator.
        inputs: position of the batch dimension of every argument, None for those that have none (weights, flags).
        batch_sizes: position of the argument that says that rows are packed.
        outputs: the same for every output; empty one-dimensional outputs are placeholders and stay as they are.

    Where the mapped dimension is that of a weight, or rows are packed, the examples are run one after the other.
    """
    one_by_one = loop_vmap(op)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        size = info.batch_size
        unfoldable = any(d is not None and b is None for d, b in zip(in_dims, inputs, strict=True))
        if unfoldable or args[batch_sizes] is not None:
            return one_by_one(info, in_dims, *args)

        def fold(x: Any, mapped: int | None, batch: int | None) -> Any:
            if x is None or batch is None:
                return x
            x = (
                x.unsqueeze(batch).expand(*x.shape[:batch], size, *x.shape[batch:])
                if mapped is None
                else x.movedim(mapped, batch)
            )
            return x.flatten(batch, batch + 1)

        results = op(*(fold(*triple) for triple in zip(args, in_dims, inputs, strict=True)))
        placeholders = [r.dim() == 1 for r in results]
        unfolded = tuple(
            r if empty else r.unflatten(batch, (size, -1))
            for r, batch, empty in zip(results, outputs, placeholders, strict=True)
        )
        return unfolded, tuple(
            None if empty else batch for batch, empty in zip(outputs, placeholders, strict=True)
        )

    return rule
