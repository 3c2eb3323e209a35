"""Process groups by name: what an operator's schema can carry of a process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def process_group(name: str) -> Any:
    """The process group of that name.

    Raises:
        RuntimeError: there is none.
    """
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
