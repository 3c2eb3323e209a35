"""Cases of the benchmark that consist of kernels of the performance model: their floors, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import cases, gan_cases
from benchmarks.model import GPUS, Kernel, Rates
from benchmarks.model_kernels import NORM, RECURRENCE

_DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_FORWARD = ("batch_norm_act_fwd",)
_TRAIN = ("batch_norm_act_stats", *_FORWARD, "batch_norm_act_bwd_reduce", "batch_norm_act_bwd")
_DOUBLE = (
    "batch_norm_act_bwd_bwd_reduce",
    "batch_norm_act_bwd_bwd",
    "batch_norm_act_bwd_reduce",
    "batch_norm_act_bwd",
)
_RESIDENT = "block, cluster, grid tier: "


@dataclass(frozen=True)
class Case:
    """One case and mode of the suite, at its users' sizes.

    Attributes:
        name, mode: of the suite.
        kernels: that run, one after the other.
        sizes: of their symbols, for 16-bit tensors.
        products: (M, N, K) of the matrix products around them.
    """

    name: str
    mode: str
    kernels: tuple[Kernel, ...]
    sizes: dict[str, float]
    products: tuple[tuple[int, int, int], ...] = ()

    def floor(self, rates: Rates, itemsize: int = 2) -> float:
        """Seconds that kernels and products take at least."""
        sizes = self.sizes | {"b": itemsize}
        total = sum(kernel.floor(sizes, rates) for kernel in self.kernels)
        for m, n, k in self.products:
            moved = itemsize * (m * k + k * n + m * n) / rates.achievable_memory
            total += max(2 * m * n * k / rates.achievable(True), moved)
        return total

    def results(self, reports: Sequence[dict[str, Any]]) -> Iterator[tuple[Rates, float, float]]:
        """(GPU, median seconds, floor) of fuseblock in each report of a GPU of the model."""
        for report in reports:
            gpu = report["machine"]["gpu"]
            rates = next((r for r in GPUS if gpu is not None and r.name.split()[0] in gpu), None)
            for row in report["rows"] if rates is not None else ():
                if (row["case"], row["mode"], row["provider"]) == (self.name, self.mode, "fuseblock") and row[
                    "seconds"
                ]:
                    itemsize = _DTYPES[report["parameters"]["dtype"]]
                    yield rates, row["seconds"]["median"], self.floor(rates, itemsize)


def _norm(name: str, mode: str, kernels: tuple[str, ...]) -> Case:
    case = next(c for c in gan_cases.CASES if c.name == name)
    sizes = dict.fromkeys(NORM.symbols, 0.0)
    sizes |= {"E": case.real_batch * math.prod(case.shape), "C": case.shape[0], "b": 2, "P": 9, "n": 5}
    return Case(name, mode, tuple(NORM.kernel(k) for k in kernels), sizes)


def _lstm(name: str, mode: str) -> Case:
    case = next(c for c in cases.CASES if c.name == name)
    t, b, h, d = case.time, case.batch, case.hidden, 2 if case.bidirectional else 1
    sizes = {"T": t, "B": b, "D": d, "H": h, "U": t * b * d * h, "Q": d * b * h, "b": 2, "s": 4}
    sizes["k"] = int(mode == "train")
    assert case.layers == 1
    products = [(t * b, d * 4 * h, case.input)]
    kernels = [RECURRENCE.kernel(_RESIDENT + "forward")]
    if mode == "train":  # and the gradients of the input and of both weights
        kernels.append(RECURRENCE.kernel(_RESIDENT + "backward"))
        products += [(t * b, case.input, d * 4 * h), (d * 4 * h, case.input, t * b), (d * 4 * h, h, t * b)]
    return Case(name, mode, tuple(kernels), sizes, tuple(products))


CASES = (
    _norm("bn-lrelu", "forward", _FORWARD),
    _norm("bn-lrelu", "train", _TRAIN),
    _norm("bn-lrelu", "double", _DOUBLE),
    _norm("bn-silu", "forward", _FORWARD),
    _norm("bn-silu", "train", _TRAIN),
    *(
        _lstm(name, mode)
        for name in ("hydrology-128", "tts-b16", "rnnt", "large-b16")
        for mode in ("forward", "train")
    ),
)
