"""The registry of cases: the shapes that real users of LSTMs run, and what each costs at least.

Sizes are named as in `torch.nn.LSTM`. Every case says who runs such a layer. ``modes`` are those that make sense for it:

* ``forward``: inference, ``torch.no_grad`` and ``eval``;
* ``train``: forward and the gradients of all parameters, and of the input where a layer in front needs it;
* ``double``: a gradient penalty: the input gradient of the output's norm, and the gradient of the penalty on it
  with respect to the parameters.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass
from typing import Any

MODES = ("forward", "train", "double")
#: Multiply-adds of a mode in units of the forward pass, for the recurrent and inner layers. ``double`` is forward,
#: input gradient, its transpose (second-order sweep), the weights' share of both, and an ordinary backward.
_PASSES = {"forward": 1, "train": 3, "double": 6}
#: A training step with more arithmetic than this runs on a CPU with ``--full`` only.
_LONG_FLOP = 8.5e10


@dataclass(frozen=True)
class Case:
    """One LSTM layer stack (or cell) and the input that it is called with.

    Attributes:
        name: what ``--case`` matches.
        user: who runs this shape.
        hidden, input, batch, time, layers, bidirectional, proj: as in `torch.nn.LSTM`; ``time`` steps.
        fill: mean length of the sequences over ``time``; below 1 the batch is ragged.
        input_grad: whether training needs the input's gradient; not so where the layer is fed with data.
        modes: modes to measure.
        cell: an ``LSTMCell`` instead of an ``LSTM``.
        quick: part of ``--quick``.
        extra: also run only with ``--full``, whatever it costs.
    """

    name: str
    user: str
    hidden: int
    input: int
    batch: int
    time: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    fill: float = 1.0
    input_grad: bool = True
    modes: tuple[str, ...] = ("forward", "train")
    cell: bool = False
    quick: bool = False
    extra: bool = False

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def ragged(self) -> bool:
        """Whether sequences differ in length."""
        return self.fill < 1

    @property
    def size(self) -> str:
        """The sizes in one line."""
        head = f"{'bi ' if self.bidirectional else ''}{self.layers}x{self.hidden}"
        proj = f" proj {self.proj}" if self.proj else ""
        fill = f" fill {self.fill:.0%}" if self.ragged else ""
        return f"{head}{proj} ({self.input}) B{self.batch} T{self.time}{fill}"

    def layer_inputs(self) -> list[int]:
        """Input width of every layer."""
        return [self.input] + [self.directions * (self.proj or self.hidden)] * (self.layers - 1)

    def flop(self, mode: str) -> float:
        """Floating-point operations of the matrix products of one step in ``mode`` (padding not counted)."""
        rows = self.batch * self.time * self.fill * self.directions
        total = 0.0
        for layer, width in enumerate(self.layer_inputs()):
            recurrent = 4 * self.hidden * (self.proj or self.hidden) + self.hidden * self.proj
            passes = _PASSES[mode]
            no_input_grad = mode == "train" and layer == 0 and not self.input_grad
            total += 2 * rows * (recurrent * passes + 4 * self.hidden * width * (passes - no_input_grad))
        return total

    def least_bytes(self, mode: str, itemsize: int) -> float:
        """Least memory traffic: every input, output, parameter, gradient and saved tensor once per direction of use."""
        rows = self.batch * self.time * self.fill
        elements = 0.0
        for width in self.layer_inputs():
            out = self.proj or self.hidden
            weights = self.directions * (4 * self.hidden * (width + out + 2) + self.hidden * self.proj)
            forward = rows * (width + self.directions * out) + weights
            saved = rows * self.directions * 5 * self.hidden
            if mode == "forward":
                elements += forward
            else:
                sweeps = 1 if mode == "train" else 2
                elements += (1 + sweeps) * forward + 2 * sweeps * saved + weights
        return elements * itemsize

    @property
    def long_on_cpu(self) -> bool:
        """Whether the case runs on a CPU with ``--full`` only."""
        return self.extra or self.flop("train") > _LONG_FLOP


ALL = MODES

CASES: tuple[Case, ...] = (
    # Calls so small that what counts is the way to the kernel.
    Case(
        "cell-32",
        "agents and decoders stepping one sequence",
        32,
        32,
        1,
        1,
        modes=("forward",),
        cell=True,
        quick=True,
    ),
    Case("cell-256", "RL policy step", 256, 64, 16, 1, cell=True),
    Case(
        "step-32", "streaming inference, one time step a call", 32, 32, 1, 1, modes=("forward",), quick=True
    ),
    Case("rnnt-step", "RNN-T prediction network, step mode", 640, 640, 1, 1, modes=("forward",)),
    # Small hidden sizes.
    Case(
        "forecast-t24",
        "forecasting, two years of months",
        40,
        40,
        32,
        24,
        2,
        modes=ALL,
        quick=True,
        input_grad=False,
    ),
    Case("forecast-t100", "forecasting", 40, 40, 32, 100, 2, modes=ALL, input_grad=False),
    Case("forecast-t200", "forecasting, long window", 40, 40, 32, 200, 2, modes=ALL, input_grad=False),
    Case("sensor-t1000", "sensor series, few long sequences", 32, 4, 2, 1000, modes=ALL, input_grad=False),
    Case(
        "hydrology-20", "rainfall and runoff, one year of days", 20, 5, 256, 365, modes=ALL, input_grad=False
    ),
    Case("hydrology-128", "rainfall and runoff, one year of days", 128, 5, 256, 365, input_grad=False),
    Case("amp-65536", "guitar amplifier modelling, 1.5 s of audio", 24, 1, 2, 65_536, input_grad=False),
    Case(
        "amp-70000",
        "the same, longer than cuDNN's 65,535 steps",
        24,
        1,
        2,
        70_000,
        extra=True,
        input_grad=False,
    ),
    Case("odd-33-b1", "odd sizes, one sequence", 33, 33, 1, 100),
    Case("odd-33-b4", "odd sizes, small batch", 33, 33, 4, 100, modes=ALL),
    Case("odd-33-b32", "odd sizes", 33, 33, 32, 100),
    Case("odd-50-b8", "odd sizes, small batch", 50, 30, 8, 100, modes=ALL),
    Case("odd-50-b32", "odd sizes", 50, 30, 32, 100),
    Case("hidden-64-b16", "the default size of many tutorials", 64, 64, 16, 100, modes=ALL),
    # Middle and large ones.
    Case(
        "classifier",
        "row-wise image and sensor classification",
        128,
        28,
        128,
        28,
        modes=ALL,
        input_grad=False,
    ),
    Case("odd-200", "odd sizes", 200, 100, 16, 100, modes=ALL),
    Case("rl-b128", "recurrent PPO", 256, 64, 128, 128),
    Case("rl-b4096", "massively parallel PPO", 256, 64, 4096, 32),
    Case("tts-b1", "text to speech encoder, one sentence", 256, 512, 1, 200, bidirectional=True),
    Case("tts-b16", "text to speech encoder", 256, 512, 16, 200, bidirectional=True),
    Case("separation", "music source separation", 256, 512, 16, 258, 3, bidirectional=True),
    Case("codec", "neural audio codec", 512, 512, 64, 75, 2),
    Case("rnnt", "RNN-T prediction network, training", 640, 640, 32, 100),
    Case("language-model", "AWD language model", 1150, 400, 80, 70, 3),
    Case("large-b16", "large layer, small batch", 1024, 1024, 16, 100),
    Case("large-b64", "large layer", 1024, 1024, 64, 100),
    Case(
        "projected",
        "one of the twelve layers of a 1024 proj 512 speech encoder",
        1024,
        512,
        40,
        200,
        proj=512,
    ),
    # Ragged batches, half full.
    Case("ragged-20", "irregular time series", 20, 5, 64, 200, fill=0.5, quick=True, input_grad=False),
    Case(
        "ragged-40", "forecasting on series of unlike length", 40, 40, 32, 200, 2, fill=0.5, input_grad=False
    ),
    Case("ragged-128", "sequence tagging", 128, 100, 32, 100, fill=0.5, bidirectional=True),
    Case("ragged-tts", "text to speech encoder", 256, 512, 16, 200, fill=0.5, bidirectional=True),
)


def longest_sum(case: Case) -> int:
    """Number of terms in the longest chain of sums: through all steps and gates, or over all rows of a gradient."""
    return case.layers * case.time * max(case.batch, 4 * case.hidden + case.input)


def sizes(case: Case) -> dict[str, Any]:
    """What of a case goes into its rows."""
    return {key: value for key, value in asdict(case).items() if key not in ("name", "modes")}


def select(
    patterns: list[str] | None = None,
    *,
    quick: bool = False,
    full: bool = False,
    device: str = "cpu",
    available: tuple[Any, ...] = CASES,
) -> list[Any]:
    """The cases to run.

    Args:
        patterns: globs over names; None means all. A case named exactly is taken even when it is long.
        quick: only the quick ones.
        full: also those that take long on a CPU.
        device: ``"cpu"`` or ``"cuda"``.
        available: cases to choose from.
    """
    chosen = []
    for case in available:
        exact = case.name in (patterns or ())
        matched = not patterns or any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
        allowed = exact or full or device != "cpu" or not case.long_on_cpu
        if matched and allowed and (exact or case.quick or not quick):
            chosen.append(case)
    return chosen


def check_patterns(patterns: list[str] | None, available: tuple[Any, ...] = CASES) -> None:
    """Raise ValueError for a pattern that matches no case at all."""
    for pattern in patterns or ():
        if not any(fnmatch.fnmatch(case.name, pattern) for case in available):
            raise ValueError(f"no case matches {pattern!r}; see --list")
