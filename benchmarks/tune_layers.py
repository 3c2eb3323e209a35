"""What `benchmarks.tune` measures of small LSTM layers: the forward pass of one in our engine, its input projection in the
same launch (``fused``) or by a GEMM before the recurrence (``apart``), see `fuseblock._fused_layer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, workloads
from benchmarks.cases import Case
from benchmarks.parity import Results
from benchmarks.tune_questions import PRECISIONS, Contest, Question, Rival, is_named, keyed
from fuseblock import _fused_layer, _stack, _tables
from fuseblock._library import state_dtype
from fuseblock._recompute import LayerWeights
from fuseblock.launch import cuda_lstm_layer
from fuseblock.reference import lstm_recurrence_reference

_OUTPUTS = ("y", "h_n", "c_n", "gates", "c")

#: Evenly spread sizes, near enough to each other for every call between them (`fuseblock._tables.REACH`).
_HIDDEN, _INPUT, _BATCH, _STEPS = (32, 64, 128), 8, (1, 8, 64), (8, 128)


@dataclass(frozen=True)
class LayerQuestion(Question):
    """The first layer of a case: ``forward`` without gradients, or as ``train`` wants it, state saved."""

    @property
    def _saves(self) -> bool:
        return self.mode == "train"

    def _args(self, device: str, seed: int) -> tuple[Any, ...]:
        """x, h0, c0, the weights of each direction, (lengths, None)."""
        case, d, h = self.case, self.case.directions, self.case.hidden
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(self.dtype)

        own: list[LayerWeights] = [
            (
                draw(4 * h, case.input, scale=h**-0.5),
                draw(4 * h, h, scale=h**-0.5),
                draw(4 * h, scale=h**-0.5),
                draw(4 * h, scale=h**-0.5),
                None,
            )
            for _ in range(d)
        ]
        x, h0 = draw(case.time, case.batch, case.input), draw(d, case.batch, h).tanh()
        c0 = draw(d, case.batch, h).to(state_dtype(self.dtype))
        lengths = workloads.draw_lengths(case, generator).to(device) if case.ragged else None
        return x, h0, c0, own, (lengths, None)

    def key(self) -> dict[str, Any]:
        """What a table is asked."""
        x, _, _, own, _ = self._args("meta", 0)
        key = _fused_layer.layer_key(x, own[0], self.case.directions, self.case.ragged, self._saves)
        return _tables.plain_key(key)

    def labels(self, device: str) -> list[str]:
        """Who would take part, in the order of the plain rule."""
        there = device == "cuda" and _fused_layer.why_absent_on_cuda is None
        return [_fused_layer.APART, *([_fused_layer.FUSED] if there else [])]

    def contest(self, device: str, seed: int) -> Contest:
        """The rivals on tensors of a device."""
        x, h0, c0, own, ragged = self._args(device, seed)

        def run(fused: bool) -> Results:
            return _named(_stack.run_layer(x, h0, c0, own, ragged, fused, self._saves))

        def equations(dtype: torch.dtype) -> Results:
            wide = [tuple(None if w is None else w.to(dtype) for w in of_direction) for of_direction in own]
            gx = _stack.input_projection(x.to(dtype), wide)  # type: ignore[arg-type]
            w_hh, _ = _stack.recurrent_weights(wide)  # type: ignore[arg-type]
            state = c0.to(state_dtype(dtype))
            args = gx, h0.to(dtype), state, w_hh, None, *ragged, self._saves
            return _named(lstm_recurrence_reference(*args))

        rivals = {name: Rival(partial(run, name == _fused_layer.FUSED)) for name in self.labels(device)}
        terms = cases.longest_sum(self.case)
        return Contest(rivals, equations(torch.float64), equations(self.dtype), self.dtype, terms)


def _named(outputs: Iterable[Tensor]) -> Results:
    return dict(zip(_OUTPUTS, outputs, strict=True))


def spread_cases() -> Iterator[Case]:
    """Layers with few inputs, at evenly spread sizes."""
    for h, b, t, fill in product(_HIDDEN, _BATCH, _STEPS, (1.0, 0.5)):
        if fill == 1 or b > 1:
            name = f"spread-layer-{'ragged-' if fill < 1 else ''}{h}-b{b}-t{t}"
            yield Case(name, "between real sizes", h, _INPUT, b, t, fill=fill)


def _can_fuse(case: Case, dtype: torch.dtype) -> bool:
    w_hh = torch.empty(4 * case.hidden, case.hidden, dtype=dtype, device="meta")
    w_ih = w_hh.new_empty(4 * case.hidden, case.input)
    return not (case.cell or case.proj) and cuda_lstm_layer.why_not(w_ih, w_hh, None) is None


def questions(
    precisions: Iterable[str], patterns: list[str] | None = None
) -> list[tuple[Question, dict[str, Any]]]:
    """The questions with their keys, no key twice; arguments as in `tune_questions.questions`."""
    named = [
        replace(case, time=min(case.time, _tables.STEADY_STEPS))
        for case in (*cases.CASES, *spread_cases())
        if is_named(case.name, patterns)
    ]
    return keyed(
        LayerQuestion("lstm_layer", case, mode, precision)
        for precision in precisions
        for case in named
        if _can_fuse(case, PRECISIONS[precision][0])
        for mode in ("forward", "train")
    )
