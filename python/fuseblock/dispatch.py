"""Who runs an operator: candidates per operator, the choice among them, and its explanation.

Every operator has an ordered list of candidates. The first that can run the given tensors is taken; a candidate that
cannot says why. On a GPU with a table of measurements (`_tables`), those that were measured at such sizes come first, the
fastest of them at the head. ``backend(name)`` (or the environment variable ``FUSEBLOCK_BACKEND``) forces one: if it
cannot run, `BackendError` is raised and nothing is swapped silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from . import _tables
from ._library import forward_mode_active

#: Names that ``backend()`` accepts. ``aten`` is PyTorch's own layer, an engine of the whole LSTM layer, or PyTorch's own
#: operations where they are a candidate. Other operators are chosen as usual then.
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


@dataclass(frozen=True)
class Question:
    """How a table of measurements is asked about calls of an operator.

    Attributes:
        like: position of the argument whose device counts, a tensor or several on one device.
        key: the sizes and kinds of a call, from its arguments.
    """

    like: int
    key: Callable[[Sequence[Any]], _tables.Key]


_CANDIDATES: dict[str, tuple[Candidate, ...]] = {}
_QUESTIONS: dict[str, Question] = {}
#: Candidates in a measured order: (the list that was ordered, in that order).
_ORDERED: dict[tuple[str, tuple[str, ...]], tuple[Sequence[Candidate], Sequence[Candidate]]] = {}


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
        name: ``"auto"`` (the default choice), ``"aten"`` (PyTorch's own LSTM layer, convolutions and spectral norm),
            ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` (plain PyTorch equations: exports, any order of
            derivative).

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


def measured(op: str, question: Question) -> None:
    """Let tables of measurements decide among the candidates of an operator, on GPUs that have one."""
    _QUESTIONS[op] = question


def question(op: str) -> Question | None:
    """How tables are asked about an operator; None where they are not."""
    return _QUESTIONS.get(op)


def _answer(op: str, args: Sequence[Any]) -> _tables.Answer | None:
    """What the table of the GPU says; None for operators without a question and on CPUs."""
    question = _QUESTIONS.get(op)
    if question is None:
        return None
    like = args[question.like]
    x = like if isinstance(like, torch.Tensor) else like[0]
    if not x.is_cuda:
        return None
    table = _tables.in_force(x.get_device())
    return table.answer(op, question.key(args) if table.entries else ())


def preference(op: str, args: Sequence[Any]) -> Sequence[Candidate]:
    """The candidates of ``op(*args)`` in order of preference: the measured ones, then the others."""
    listed = _CANDIDATES[op]
    answer = _answer(op, args)
    if answer is None or not answer.order:
        return listed
    known = _ORDERED.get((op, answer.order))
    if known is None or known[0] is not listed:
        rank = {label: number for number, label in enumerate(answer.order)}
        known = listed, sorted(listed, key=lambda c: rank.get(c.label, len(rank)))
        _ORDERED[op, answer.order] = known
    return known[1]


def _name_for(op: str) -> str:
    """The backend that is asked of an operator."""
    name = _FORCED.get()
    return "auto" if name == "aten" and all(c.name != "aten" for c in _CANDIDATES[op]) else name


def eligible(op: str, candidate: Candidate) -> bool:
    """Whether the backend in force leaves a candidate of an operator in the choice."""
    return _name_for(op) in ("auto", candidate.name)


def choose(op: str, args: tuple[Any, ...]) -> Candidate:
    """The candidate that runs ``op(*args)``: the first in order of preference that can.

    Raises:
        BackendError: the forced backend cannot run the call (every reason is in the message).
    """
    name = _FORCED.get()
    if name == "aten":
        name = _name_for(op)
    reasons = []
    for candidate in preference(op, args):
        if name == "auto" or candidate.name == name:  # `eligible`, without calls on a path of a microsecond
            reason = candidate.why_not(*args)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
    raise BackendError(
        f"no backend can run {op} (asked for {name}): " + ("; ".join(reasons) or "not implemented")
    )


def rule(op: str, args: tuple[Any, ...], chosen: Candidate) -> str:
    """Why `choose` took ``chosen`` and no other that can run."""
    answer, name = _answer(op, args), _name_for(op)
    is_forced = name != "auto"
    if answer is None or (is_forced and chosen.label not in answer.order):
        first = "the first that can run"
    else:
        first = answer.rule(chosen.label)
    return f"backend {name!r} is forced; {first}" if is_forced else first


def run(op: str, args: tuple[Any, ...]) -> Any:
    """Choose a candidate for ``op(*args)`` and run it."""
    function = choose(op, args).run
    assert function is not None
    return function(*args)
