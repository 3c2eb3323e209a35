"""Loads the compiled library ``fuseblock/_C.abi3.so`` once, and says why when it cannot."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    if not _LIBRARY.exists():
        return "fuseblock was installed without its compiled library (no C++ compiler at build time?)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {error}"
    return None


#: None when the compiled library is loaded, else the reason why it is not.
why_not: str | None = _load()


def has(namespace: str, op: str) -> bool:
    """Whether the compiled library registered ``namespace::op``."""
    return why_not is None and hasattr(getattr(torch.ops, namespace), op)
