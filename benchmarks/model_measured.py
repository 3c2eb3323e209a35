"""Cases of the benchmark that consist of kernels of the performance model: their floors, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import cases, gan_cases
from benchmarks.model import GPUS, Kernel, Rates
from benchmarks.model_kernels import BIAS_ACT, IMAGES, NORM, RECURRENCE

_DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: The norm's kernels by mode, as sweeps; a channel that fits on a chip takes fewer in training.
_SWEEPS = {
    "forward": ("batch_norm_act_fwd",),
    "train": (
        "batch_norm_act_stats",
        "batch_norm_act_fwd",
        "batch_norm_act_bwd_reduce",
        "batch_norm_act_bwd",
    ),
    "double": (
        "batch_norm_act_bwd_bwd_reduce",
        "batch_norm_act_bwd_bwd",
        "batch_norm_act_bwd_reduce",
        "batch_norm_act_bwd",
    ),
}
#: Shared memory of a cluster's eight blocks on an H100 or H200, less what the kernels need besides: 224 KB each.
_ON_CHIP = 8 * 224 * 1024
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


def _norm(name: str, mode: str) -> Case:
    case = next(c for c in gan_cases.CASES if c.name == name)
    real = gan_cases.real(case, "cuda")
    return Case(name, mode, tuple(NORM.kernel(k) for k in _SWEEPS[mode]), _norm_sizes(real) | {"P": 9.0})


def _norm_sizes(case: gan_cases.GanCase) -> dict[str, float]:
    sizes = dict.fromkeys(NORM.symbols, 0.0)
    return sizes | {"E": case.elements, "C": case.shape[0], "b": 2, "P": 1, "n": 5}


def moved(case: gan_cases.GanCase, mode: str, itemsize: int, clusters: bool = False) -> float | None:
    """Bytes that a case's kernels take and bring by their formulas; None for a case that does more than they.

    Of norms in training: two sweeps, or one of forward, or of backward, where a channel fits on a chip with ``clusters``.
    """
    elements = float(case.elements)
    if case.kind.startswith("norm") and mode in _SWEEPS:
        names = list(_SWEEPS[mode])
        channel = elements / case.shape[0] * itemsize
        if clusters and mode == "train" and channel <= _ON_CHIP:
            names[:2] = ["batch_norm_act_whole_fwd"]
        if clusters and mode in ("train", "double") and 2 * channel <= _ON_CHIP:
            names[-2:] = ["batch_norm_act_whole_bwd"]
        return sum(NORM.kernel(name).moved(_norm_sizes(case) | {"b": itemsize}) for name in names)
    if case.kind == "pointwise" and mode in ("forward", "train"):
        sizes = dict.fromkeys(BIAS_ACT.symbols, 0.0) | {"E": elements, "C": case.shape[0], "b": itemsize}
        sizes["m"] = float(mode == "train")
        names = ["bias_act"] if mode == "forward" else ["bias_act", "bias_act_bwd"]
        return sum(BIAS_ACT.kernel(name).moved(sizes) for name in names)
    if case.kind == "filter" and mode in ("forward", "train"):
        with torch.device("meta"):
            results = case.build()(torch.empty(case.batch, *case.shape)).numel()
        # The gradient's filter takes the result's and brings the input's.
        sizes = {"X": elements, "Y": float(results), "b": itemsize, "K": 0, "u": 1}
        return IMAGES.kernel("upfirdn2d").moved(sizes) * (1 if mode == "forward" else 2)
    return None


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
    _norm("bn-lrelu", "forward"),
    _norm("bn-lrelu", "train"),
    _norm("bn-lrelu", "double"),
    _norm("bn-silu", "forward"),
    _norm("bn-silu", "train"),
    *(
        _lstm(name, mode)
        for name in ("hydrology-128", "tts-b16", "rnnt", "large-b16")
        for mode in ("forward", "train")
    ),
)
