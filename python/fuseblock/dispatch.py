"""Who runs an operator: candidates per operator, the choice among them, and its explanation.

Every operator has an ordered list of candidates. The first that can run the given tensors is taken; a candidate that
cannot says why. ``backend(name)`` (or the environment variable ``FUSEBLOCK_BACKEND``) forces one: if it cannot run,
`BackendError` is raised and nothing is swapped silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from ._library import forward_mode_active

#: Names that ``backend()`` accepts. ``aten`` is PyTorch's own layer, an engine of the whole LSTM layer.
NAMES = ("auto", "aten", "cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """A forced backend cannot run the call, or no backend can."""


@dataclass(frozen=True)
class Candidate:
    """One way to run an operator.

    Attributes:
        name: backend name, one of `NAMES`.
        run: the function, with the operator's signature; None when it is missing from this installation.
        why_not: returns None when ``run`` can take the arguments, else the reason in words.
        devices: device types whose tensors it takes.
        variant: tells two candidates of one backend apart in explanations, e.g. ``persistent``.
    """

    name: str
    run: Callable[..., Any] | None
    why_not: Callable[..., str | None]
    devices: tuple[str, ...] = ("cpu", "cuda")
    variant: str = ""

    @property
    def label(self) -> str:
        """The name with the variant."""
        return f"{self.name} ({self.variant})" if self.variant else self.name


def absent(name: str, reason: str) -> Candidate:
    """A candidate that this installation lacks, with the reason."""
    return Candidate(name, None, lambda *args: reason, devices=())


_CANDIDATES: dict[str, tuple[Candidate, ...]] = {}


def _checked(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


_DEFAULT = _checked(os.environ.get("FUSEBLOCK_BACKEND", "auto"), "FUSEBLOCK_BACKEND")
_FORCED: ContextVar[str] = ContextVar("fuseblock_backend", default=_DEFAULT)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def forced() -> str:
    """The backend in force: ``"auto"`` or a name from `NAMES`."""
    return _FORCED.get()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a ``with`` block (this thread or task, and backward passes of what ran in it).

    Args:
        name: ``"auto"`` (the default choice), ``"aten"`` (PyTorch's own LSTM layer), ``"cpu"``, ``"cuda"``,
            ``"triton"`` or ``"reference"`` (plain PyTorch equations: exports, any order of derivative).

    Raises:
        ValueError: unknown name.
        BackendError: later, by a call that the forced backend cannot run.
    """
    token = _FORCED.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _FORCED.reset(token)


def plain_pytorch() -> bool:
    """Whether the reference equations run in place of an operator, so that PyTorch sees and differentiates them.

    So it is where they are forced, and by itself in forward mode, of which operators know nothing.
    """
    name = forced()
    return name == "reference" or (name == "auto" and not is_compiling() and forward_mode_active())


def register(op: str, *candidates: Candidate) -> None:
    """Set the candidates of an operator, in order of preference."""
    _CANDIDATES[op] = candidates


def candidates(op: str) -> tuple[Candidate, ...]:
    """The candidates of an operator, in order of preference."""
    return _CANDIDATES[op]


def operators() -> tuple[str, ...]:
    """The operators that have candidates."""
    return tuple(_CANDIDATES)


def choose(op: str, args: tuple[Any, ...]) -> Candidate:
    """The candidate that runs ``op(*args)``.

    Raises:
        BackendError: the forced backend cannot run the call (every reason is in the message).
    """
    name = _FORCED.get()
    reasons = []
    for candidate in _CANDIDATES[op]:
        # A forced `aten` concerns layers; operators called on their own are chosen as usual.
        if name in ("auto", "aten") or candidate.name == name:
            reason = candidate.why_not(*args)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
    raise BackendError(
        f"no backend can run {op} (asked for {name}): " + ("; ".join(reasons) or "not implemented")
    )


def run(op: str, args: tuple[Any, ...]) -> Any:
    """Choose a candidate for ``op(*args)`` and run it."""
    function = choose(op, args).run
    assert function is not None
    return function(*args)
