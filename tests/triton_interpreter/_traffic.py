"""Bytes that interpreted kernels load and store, by launch and tensor: what tests/traffic.py shows."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Launches in order, each a kernel's name and (loaded, stored, loaded once, stored once) of every view that it was given;
#: None: nobody counts.
launches: list[tuple[str, list[list[int]]]] | None = None
# Address range of each view of the running launch, and where elements were loaded (1) and stored (2).
_seen: list[tuple[int, int, Any]] = []


def begin(name: str, views: list[tuple[int, int]]) -> None:
    """A launch of kernel ``name``, which may touch these address ranges."""
    if launches is not None:
        _seen[:] = [(low, high, np.zeros(high - low, np.uint8)) for low, high in sorted(set(views))]
        launches.append((name, [[0, 0, 0, 0] for _ in _seen]))


def count(addresses: Any, size: int, store: bool) -> None:
    """Accesses of ``size`` bytes each."""
    if launches is None:
        return
    left = addresses.ravel()
    for (low, high, seen), figures in zip(_seen, launches[-1][1], strict=True):
        inside = (left >= low) & (left + size <= high)
        if inside.any():
            bit = 2 if store else 1
            offsets = (left[inside] - low).astype(np.int64)
            fresh = offsets[seen[offsets] & bit == 0]
            seen[fresh] |= bit
            figures[store] += size * offsets.size
            figures[2 + store] += size * np.unique(fresh).size
        left = left[~inside]
