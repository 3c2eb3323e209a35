"""``fuseblock.explain``: who would run a call, who cannot, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import dispatch
from ._engine import choose_engine


@dataclass(frozen=True)
class Explanation:
    """Outcome of `explain`.

    Attributes:
        op: what was asked about.
        chosen: name of the engine or backend that would run.
        reasons: (name, reason) of every candidate in order of preference; reason None means that it can run.
    """

    op: str
    chosen: str
    reasons: tuple[tuple[str, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        lines += [f"  {name:<22} {reason or 'can run'}" for name, reason in self.reasons]
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Explain who would run ``op`` on these arguments under the backend now in force.

    Args:
        op: ``"lstm"`` (arguments of `functional.lstm`: the engine of the layer), or an operator's name, e.g.
            ``"lstm_gates"`` or ``"lstm_recurrence_bwd"`` with the operator's arguments.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError: no such operator.
    """
    if op == "lstm":
        return _explain_layer(*args, **kwargs)
    if op not in dispatch.operators():
        raise ValueError(f"explain: expected one of lstm, {', '.join(dispatch.operators())}, got {op!r}")
    name = dispatch.forced()
    reasons, chosen = [], "nobody"
    for candidate in dispatch.candidates(op):
        reason = candidate.why_not(*args)
        if reason is None and name not in ("auto", "aten", candidate.name):
            reason = f"backend {name!r} is forced"
        if reason is None and chosen == "nobody":
            chosen = candidate.label
        reasons.append((candidate.label, reason))
    return Explanation(op, chosen, tuple(reasons))


def _explain_layer(
    input: Any,
    h0: Any,
    c0: Any,
    weights: Any,
    *,
    bidirectional: bool = False,
    lengths: Any = None,
    batch_sizes: Any = None,
    **_: Any,
) -> Explanation:
    engine, reason = choose_engine(input, h0, c0, weights, 2 if bidirectional else 1, lengths, batch_sizes)
    other = "aten" if engine == "ours" else "ours"
    return Explanation("lstm", engine, ((engine, f"chosen: {reason}"), (other, "not chosen")))
