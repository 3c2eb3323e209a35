"""What `benchmarks.tune` measures: calls at real and at evenly spread sizes, and who can run them.

A question is an operator at certain sizes, with the key that dispatch asks tables with; its `Contest` has the rivals, and
what their results are checked against. The operator ``lstm`` is a whole stack: PyTorch's engine (``aten``) against ours.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, parity, workloads
from benchmarks.cases import Case
from benchmarks.parity import Results
from benchmarks.providers import Context, Ours, Stock
from benchmarks.workloads import Step
from fuseblock import _engine, _tables, dispatch
from fuseblock._library import state_dtype

#: By the names of the command line: the dtype, and whether cuDNN's and other float32 products may be rounded to TF32. The
#: second is PyTorch's own setting.
PRECISIONS: dict[str, tuple[torch.dtype, bool, bool]] = {
    "bfloat16": (torch.bfloat16, True, False),
    "float32": (torch.float32, True, False),
    "float16": (torch.float16, True, False),
    "tf32": (torch.float32, True, True),
    "ieee": (torch.float32, False, False),
}
#: Stacks come last: within them, the measured backends of the recurrence are in force.
OPS = ("lstm_recurrence", "lstm_recurrence_bwd", "lstm")

#: Evenly spread sizes, near enough to each other for every call between them (`fuseblock._tables.REACH`).
_HIDDEN, _BATCH, _STEPS = (16, 32, 64, 128, 256, 512, 1024, 2048), (1, 8, 32, 128, 512), 128
_RAGGED_BATCH = (4, 32, 256)
#: Cells of a step up to which these sizes are combined.
_CELLS = 1 << 17


@dataclass(frozen=True)
class Rival:
    """One way to answer a question: a step, and the context to enter around it."""

    step: Step
    context: Callable[[], Context] = contextlib.nullcontext

    def results(self) -> Results:
        """What the step gives."""
        with self.context():
            return {name: x.detach() for name, x in self.step().items()}


@dataclass(frozen=True)
class Contest:
    """Rivals, and what is right.

    Attributes:
        rivals: by the labels that tables know them by, in the order of the plain rule.
        reference: results in float64.
        stock: results of PyTorch's own operations in the measured dtype.
        resolution: the dtype whose unit in the last place an error may have.
        terms: in the longest chain of sums.
    """

    rivals: dict[str, Rival]
    reference: Results
    stock: Results
    resolution: torch.dtype
    terms: int

    def check(self, results: Results) -> parity.Verdict:
        """Whether results are right."""
        return parity.check(results, self.reference, self.stock, dtype=self.resolution, terms=self.terms)


@dataclass(frozen=True)
class Question:
    """One operator at the sizes of a case.

    Attributes:
        op: of `OPS`.
        case: the sizes.
        mode: ``forward`` or ``train``.
        precision: of `PRECISIONS`.
    """

    op: str
    case: Case
    mode: str
    precision: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.op} {self.mode}, {self.precision}, {self.case.size}"

    @property
    def dtype(self) -> torch.dtype:
        """The measured dtype."""
        return PRECISIONS[self.precision][0]

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """PyTorch's switches for TF32, meanwhile."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        _, of_cudnn, of_matmul = PRECISIONS[self.precision]
        others = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        before = matmul.allow_tf32
        with cudnn.flags(**others, allow_tf32=of_cudnn):
            matmul.allow_tf32 = of_matmul
            try:
                yield
            finally:
                matmul.allow_tf32 = before

    def key(self) -> dict[str, Any]:
        """What a table is asked; made by the functions that dispatch calls."""
        with self.settings():
            if self.op == "lstm":
                shape = (self.case.time, self.case.batch, self.case.input)
                x = torch.empty(shape, dtype=self.dtype, device="meta")
                w = x.new_empty(4 * self.case.hidden, self.case.proj or self.case.hidden)
                weights = [(w, w, None, None, w if self.case.proj else None)]
                weights *= self.case.layers * self.case.directions
                key = _engine.layer_key(x, weights, self.case.directions, self.mode == "train")
            else:
                args = self._forward_args("meta", seed=0)
                if self.op == "lstm_recurrence_bwd":
                    args = self._backward_args(args, args[0], args[2])
                question = dispatch.question(self.op)
                assert question is not None
                key = question.key(args)
            return _tables.plain_key(key)

    def labels(self, device: str) -> list[str]:
        """Who would take part, in the order of the plain rule."""
        if self.op == "lstm":
            return ["aten", "ours"]
        with self.settings():
            args = self._forward_args(device, seed=None)
            if self.op == "lstm_recurrence_bwd":
                args = self._backward_args(args, args[0], args[2])
            return [c.label for c in able(self.op, args)]

    def within(self) -> list[Question]:
        """Of a stack: what the choice of its backends asks."""
        inner = OPS[:2] if self.op == "lstm" else ()
        return [replace(self, op=op) for op in inner if _asked(op, self.case, self.mode)]

    def contest(self, device: str, seed: int) -> Contest:
        """The rivals on tensors of a device."""
        prepare = self._stacks if self.op == "lstm" else self._candidates
        rivals, reference, stock = prepare(device, seed)
        # TF32 has float16's mantissa.
        resolution = torch.float16 if self.precision == "tf32" else self.dtype
        return Contest(rivals, reference, stock, resolution, cases.longest_sum(self.case))

    def _stacks(self, device: str, seed: int) -> tuple[dict[str, Rival], Results, Results]:
        problem = workloads.make_problem(self.case, dtype=self.dtype, device=device, seed=seed)
        # Without cuDNN the reference is independent of what is measured.
        with torch.backends.cudnn.flags(enabled=False):
            reference = Rival(*Stock().step(problem.to(torch.float64), self.mode)).results()
        stock = Rival(*Stock().step(problem, self.mode)).results()
        aten, (ours, context) = Ours("aten").step(problem, self.mode), Ours().step(problem, self.mode)

        def always_ours() -> Context:
            stack = contextlib.ExitStack()
            stack.enter_context(context())
            stack.enter_context(_engine.always_ours())
            return stack

        return {"aten": Rival(*aten), "ours": Rival(ours, always_ours)}, reference, stock

    def _candidates(self, device: str, seed: int) -> tuple[dict[str, Rival], Results, Results]:
        args = self._forward_args(device, seed)
        if self.op == "lstm_recurrence_bwd":
            *_, gates, c = _equations("lstm_recurrence")(*args)
            args = self._backward_args(args, gates, c)
        runs = {c.label: c.run for c in able(self.op, args) if c.run is not None}
        rivals = {label: Rival(partial(_named, self.op, run, args)) for label, run in runs.items()}
        exact = [double(x) for x in args]
        equations = _equations(self.op)
        return rivals, _named(self.op, equations, exact), _named(self.op, equations, args)

    def _forward_args(self, device: str, seed: int | None) -> tuple[Any, ...]:
        """seed: of random values; None: they are undefined."""
        case, state = self.case, state_dtype(self.dtype)
        generator = torch.Generator().manual_seed(seed or 0)
        torch.manual_seed(seed or 0)
        d, h, p = case.directions, case.hidden, case.proj or case.hidden

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            if seed is None:
                return torch.empty(shape, dtype=self.dtype, device=device)
            return (torch.randn(shape, device=device) * scale).to(self.dtype)

        return (
            draw(case.time, case.batch, d * 4 * h),
            draw(d, case.batch, p).tanh(),
            draw(d, case.batch, h).to(state),
            draw(d, 4 * h, p, scale=h**-0.5),
            draw(d, p, h, scale=h**-0.5) if case.proj else None,
            workloads.draw_lengths(case, generator).to(device) if case.ragged else None,
            None,
            self.mode == "train",
        )

    def _backward_args(self, forward: tuple[Any, ...], gates: Tensor, c: Tensor) -> tuple[Any, ...]:
        _, h0, c0, w_hh, w_hr, lengths, batch_sizes, _ = forward
        dy = torch.randn(*gates.shape[:2], h0.shape[0] * h0.shape[2], device=gates.device).to(gates.dtype)
        return dy, None, None, None, None, gates, c, c0, w_hh, w_hr, lengths, batch_sizes


_OUTPUTS = {
    "lstm_recurrence": ("y", "h_n", "c_n", "gates", "c"),
    "lstm_recurrence_bwd": ("dgx", "dh0", "dc0", "dh"),
}


def double(x: Any) -> Any:
    """An argument of an operator in float64, where it is of floating point."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _equations(op: str) -> Callable[..., Any]:
    """The plain equations of an operator."""
    (run,) = (c.run for c in dispatch.candidates(op) if c.name == "reference")
    assert run is not None
    return run


def able(op: str, args: tuple[Any, ...]) -> list[dispatch.Candidate]:
    """Who can run it; the equations, which are slow, where nobody else can."""
    able = [c for c in dispatch.candidates(op) if c.why_not(*args) is None]
    return [c for c in able if c.name != "reference"] or able


def _named(op: str, run: Callable[..., Any], args: Iterable[Any]) -> Results:
    """An operator's outputs by their names."""
    return dict(zip(_OUTPUTS[op], run(*args), strict=True))


def spread_cases() -> list[Case]:
    """Layers of evenly spread sizes, all rows of the batch full, or, for fewer batches, half of them."""

    def layer(both: bool, h: int, b: int, fill: float) -> Case:
        name = f"spread-{'bi-' if both else ''}{'ragged-' if fill < 1 else ''}{h}-b{b}"
        return Case(name, "between real sizes", h, h, b, _STEPS, bidirectional=both, fill=fill)

    return [
        layer(both, h, b, fill)
        for fill, batches in ((1.0, _BATCH), (0.5, _RAGGED_BATCH))
        for both in (False, True)
        for h in _HIDDEN
        for b in batches
        if h * b <= _CELLS
    ]


def questions(
    precisions: Iterable[str],
    patterns: list[str] | None = None,
    available: tuple[tuple[Case, ...], ...] = (cases.CASES, tuple(spread_cases())),
) -> list[tuple[Question, dict[str, Any]]]:
    """The questions with their keys, no key twice: group by group of cases, in a group by precision and operator.

    Args:
        precisions: of `PRECISIONS`.
        patterns: globs over the names of cases; None means all.
        available: groups of cases.
    """
    return keyed(_questions(list(precisions), patterns, available))


def _questions(
    precisions: list[str], patterns: list[str] | None, available: tuple[tuple[Case, ...], ...]
) -> Iterator[Question]:
    for group in available:
        chosen = [
            # Beyond this, time is proportional to steps.
            replace(case, time=min(case.time, _tables.STEADY_STEPS))
            for case in group
            if not case.cell and is_named(case.name, patterns)
        ]
        for precision in precisions:
            for op in OPS:
                for case in chosen:
                    for mode in ("forward", "train"):
                        if _asked(op, case, mode):
                            yield Question(op, case, mode, precision)


def is_named(name: str, patterns: list[str] | None) -> bool:
    """Whether one of the globs, if there are any, is for that case."""
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def keyed(asked: Iterable[Question]) -> list[tuple[Question, dict[str, Any]]]:
    """Questions with their keys: of those of an operator with the same key, the first."""
    found: dict[tuple[str, frozenset[tuple[str, Any]]], tuple[Question, dict[str, Any]]] = {}
    for question in asked:
        key = question.key()
        found.setdefault((question.op, frozenset(key.items())), (question, key))
    return list(found.values())


def _asked(op: str, case: Case, mode: str) -> bool:
    """Whether dispatch ever asks this; ragged stacks are always ours."""
    if op == "lstm":
        return not case.ragged and mode in case.modes
    return mode == "train" or op == "lstm_recurrence"
