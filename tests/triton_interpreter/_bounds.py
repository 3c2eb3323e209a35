"""Bounds of every access: a pointer must lie in one of the tensor views that the launch was given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.runtime.interpreter as interpreter

from . import _traffic
from ._errors import OutOfBoundsError

_Builder = interpreter.InterpreterBuilder

# Address ranges [low, high) of the views of the running launch.
_views: list[tuple[int, int]] = []


@contextmanager
def only_within(arguments: Iterable[Any], kernel: str) -> Iterator[None]:
    """Allow accesses to the views among the arguments of a launch of ``kernel``, and to nothing else."""
    _views[:] = _ranges(arguments)
    _traffic.begin(kernel, _views)
    try:
        yield
    finally:
        _views.clear()


def _ranges(arguments: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _ranges(argument)
        elif hasattr(argument, "base") and hasattr(argument, "block_shape"):  # a tensor descriptor
            yield from _ranges([argument.base])
        elif hasattr(argument, "data_ptr"):
            tensor = interpreter._unwrap_tensor(argument)
            if tensor.numel():
                last = sum(
                    (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
                )
                start = tensor.data_ptr()
                yield start, start + (last + 1) * tensor.element_size()


def _check(pointers: Any, mask: Any, what: str) -> None:
    addresses = pointers.data.ravel()
    if mask is not None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    inside = np.zeros(addresses.shape, bool)
    for low, high in _views:
        inside |= (addresses >= low) & (addresses + size <= high)
    if not inside.all():
        raise OutOfBoundsError(f"{what}: {int((~inside).sum())} of {inside.size} elements out of bounds")
    if what != "atomic":
        _traffic.count(addresses, size, what == "store")


def install() -> None:
    """Check loads, stores and atomics."""
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    rmw, cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **options)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        _check(ptr, mask, "atomic")
        return rmw(self, op, ptr, val, mask, *rest)

    def create_atomic_cas(self: Any, ptr: Any, *rest: Any) -> Any:
        _check(ptr, None, "atomic")
        return cas(self, ptr, *rest)

    _Builder.create_masked_load = create_masked_load
    _Builder.create_masked_store = create_masked_store
    _Builder.create_atomic_rmw = create_atomic_rmw
    _Builder.create_atomic_cas = create_atomic_cas
