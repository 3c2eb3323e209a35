"""What `benchmarks.tune` measures of norms, activations and filters: the candidates of an operator against each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from benchmarks.parity import Results
from benchmarks.tune_questions import Contest, Question, Rival, able, double, is_named, keyed
from fuseblock import _tables, dispatch
from fuseblock._activations import number
from fuseblock._library import state_dtype

#: Results that are compared, of those that an operator returns: masks say what the others say.
_OUTPUTS = {
    "batch_norm_act": ("y", "mean", "var", "invstd"),
    "batch_norm_act_bwd": ("dx", "dweight", "dbias", "dslope", "dresidual"),
    "batch_norm_act_bwd_bwd": ("a_dy", "a_x", "a_weight", "a_bias", "a_residual"),
    "bias_act": ("y",),
    "bias_act_bwd": ("dx", "dbias"),
    "upfirdn2d": ("y",),
}
OPS = tuple(_OUTPUTS)


@dataclass(frozen=True)
class PassCase:
    """A tensor and what is done to it.

    Attributes:
        op: of `OPS`.
        name: what ``--case`` matches.
        batch, channels, image: (batch, channels, image, image).
        kind: of norms "plain", "residual" or "per_sample"; of filters "up", "down" or "blur"; of the gradient of an
            activation "bias" or "plain", without.
        channels_last: the layout.
    """

    op: str
    name: str
    batch: int
    channels: int
    image: int
    kind: str = "plain"
    channels_last: bool = True

    @property
    def size(self) -> str:
        """The sizes in one line."""
        layout = "channels-last" if self.channels_last else "contiguous"
        return f"{self.kind} {self.batch}x{self.channels}x{self.image}x{self.image} {layout}"

    @property
    def elements(self) -> int:
        """Of the tensor."""
        return self.batch * self.channels * self.image**2


@dataclass(frozen=True)
class OperatorQuestion(Question):
    """The candidates of an operator against each other."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the first results, which are compared."""
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """In the longest chain of sums."""
        raise NotImplementedError

    def args(self, device: str, seed: int) -> tuple[Any, ...]:
        """The operator's arguments, as dispatch sees them."""
        raise NotImplementedError

    def key(self) -> dict[str, Any]:
        """What a table is asked."""
        asked = dispatch.question(self.op)
        assert asked is not None
        with self.settings():
            return _tables.plain_key(asked.key(self.args("meta", 0)))

    def labels(self, device: str) -> list[str]:
        """Who would take part, in the order of the plain rule."""
        with self.settings():
            return [c.label for c in able(self.op, self.fakes(device))]

    def fakes(self, device: str) -> tuple[Any, ...]:
        """The operator's arguments without memory, on a device that need not be there."""

        def fake(a: Any) -> Any:
            is_tensor = isinstance(a, Tensor)
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device) if is_tensor else a

        on_meta = self.args("meta", 0)
        with FakeTensorMode():
            return tree_map(fake, on_meta)  # type: ignore[no-any-return]

    def contest(self, device: str, seed: int) -> Contest:
        """The rivals on tensors of a device."""
        args = self.args(device, seed)
        equations = next(c for c in dispatch.candidates(self.op) if c.name == "reference")
        rivals = {c.label: Rival(partial(self._named, c.run, args)) for c in able(self.op, args)}
        exact = tree_map(double, args)
        reference, stock = self._named(equations.run, exact), self._named(equations.run, args)
        return Contest(rivals, reference, stock, self.dtype, self.terms)

    def _named(self, run: Any, args: tuple[Any, ...]) -> Results:
        outputs = run(*args)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return dict(zip(self.names, outputs, strict=False))


@dataclass(frozen=True)
class PassQuestion(OperatorQuestion):
    """A case in a dtype; ``mode`` is always ``train``: forward saves what backward needs."""

    case: PassCase  # type: ignore[assignment]

    @property
    def names(self) -> tuple[str, ...]:
        """What is compared."""
        return _OUTPUTS[self.op]

    @property
    def terms(self) -> int:
        """In the longest chain of sums."""
        return max(self.case.elements // self.case.channels, 64)

    def args(self, device: str, seed: int) -> tuple[Any, ...]:
        """The operator's arguments."""
        torch.manual_seed(seed)
        case, wide = self.case, state_dtype(self.dtype)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format

        def draw() -> Tensor:
            x = torch.randn(case.batch, case.channels, case.image, case.image, device=device)
            return x.to(self.dtype).contiguous(memory_format=layout)

        x = draw()
        rows = case.channels * (case.batch if case.kind == "per_sample" else 1)
        weight, bias = (torch.randn(rows, device=device, dtype=wide) for _ in range(2))
        constants = number("leaky_relu"), 0.2, 1.0, math.inf
        if self.op == "bias_act":
            return x, bias, None, *constants, True
        if self.op == "bias_act_bwd":
            mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), device=device, dtype=torch.uint8)
            return x, None, None, None, mask, *constants, case.kind == "bias"
        if self.op == "upfirdn2d":
            f = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device, dtype=wide) / 8
            up, down = (2 if case.kind == name else 1 for name in ("up", "down"))
            first, last = {"up": (2, 1), "down": (1, 1), "blur": (2, 1)}[case.kind]
            return x, f[:, None] * f, up, up, down, down, first, last, first, last, False, float(up**2)
        residual, per_sample = case.kind == "residual", case.kind == "per_sample"
        other = draw() if residual else None
        act = "leaky_relu", 0.2, True, ""
        forward = x, weight, bias, other, None, None, None, 1e-5, *act, True, per_sample
        if self.op == "batch_norm_act":
            return forward
        mean, mask = x.new_empty(rows, dtype=wide), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
        saved = mean, mean, x.new_empty((), dtype=wide), mask
        if device != "meta":
            (equations,) = (c.run for c in dispatch.candidates("batch_norm_act") if c.name == "reference")
            assert equations is not None
            _, mean, _, *others = equations(*forward)
            saved = mean, *others
        kept = weight, bias, None, None, *saved[:3], saved[3] if residual else None, *act, 1e-5
        if self.op == "batch_norm_act_bwd":
            return draw(), x, *kept, True, True, residual, per_sample
        v_residual = draw() if residual else None
        return (
            draw(),
            torch.ones_like(weight),
            torch.ones_like(bias),
            None,
            v_residual,
            draw(),
            x,
            *kept,
            per_sample,
        )


#: Evenly spread sizes, near enough to each other for every call between them (`fuseblock._tables.REACH`).
_CHANNELS, _IMAGES, _BATCH = (3, 16, 64, 256, 1024), (4, 16, 64, 256), 16
#: Elements up to which these are combined.
_MOST = 1 << 27
#: Of each operator.
_KINDS = {
    "batch_norm_act": ("plain", "residual", "per_sample"),
    "batch_norm_act_bwd": ("plain", "residual", "per_sample"),
    "batch_norm_act_bwd_bwd": ("plain", "residual", "per_sample"),
    "bias_act": ("plain",),
    "bias_act_bwd": ("plain", "bias"),
    "upfirdn2d": ("up", "down", "blur"),
}


def spread_cases() -> list[PassCase]:
    """Every operator at evenly spread sizes."""
    combined = (
        PassCase(op, f"spread-{op}", _BATCH, channels, image, kind, last)
        for op, kinds in _KINDS.items()
        for kind, channels, image, last in product(kinds, _CHANNELS, _IMAGES, (True, False))
    )
    return [case for case in combined if case.elements <= _MOST]


def questions(
    precisions: Iterable[str], patterns: list[str] | None = None
) -> list[tuple[Question, dict[str, Any]]]:
    """The questions with their keys, no key twice; arguments as in `tune_questions.questions`."""
    cases = [case for case in spread_cases() if is_named(case.name, patterns)]
    # There are no products here that a setting would round.
    plain = [p for p in precisions if p not in ("tf32", "ieee")]
    return keyed(PassQuestion(case.op, case, "train", precision) for precision in plain for case in cases)
