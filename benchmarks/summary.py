"""What the rows add up to: geometric means by class of sizes, and the project's bars, each met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import BASE, OURS
from benchmarks.runner import GREEN, Row, ours

Predicate = Callable[[dict[str, Any]], bool]
#: Rows by provider, case and mode.
Others = dict[tuple[str, str, str], Row]


def _dense(sizes: dict[str, Any]) -> bool:
    return sizes["fill"] == 1 and not sizes["cell"] and sizes["time"] > 1


CLASSES: dict[str, Predicate] = {
    "H <= 40, B <= 8": lambda s: _dense(s) and s["hidden"] <= 40 and s["batch"] <= 8,
    "H <= 40, B >= 32": lambda s: _dense(s) and s["hidden"] <= 40 and s["batch"] >= 32,
    "H <= 64": lambda s: _dense(s) and s["hidden"] <= 64,
    "H > 64": lambda s: _dense(s) and s["hidden"] > 64,
    "ragged": lambda s: s["fill"] < 1,
    "calls": lambda s: s["cell"] or s["time"] == 1,
}


def classes(rows: list[Row], by: dict[str, Predicate] = CLASSES) -> list[dict[str, Any]]:
    """Geometric mean and worst speed-up against stock and against the best peer, by mode and class of sizes."""
    result = []
    for mode in dict.fromkeys(row.mode for row in rows):
        for name, belongs in by.items():
            chosen = [row for row in ours(rows) if row.mode == mode and belongs(row.sizes)]
            green = [row for row in chosen if row.speedup_stock is not None and row.speedup_peer is not None]
            if not green:
                continue
            stock = [row.speedup_stock.median for row in green if row.speedup_stock]
            peer = [row.speedup_peer.median for row in green if row.speedup_peer]
            result.append(
                {
                    "mode": mode,
                    "class": name,
                    "cases": len(green),
                    "not_green": len(chosen) - len(green),
                    "stock_mean": statistics.geometric_mean(stock),
                    "stock_worst": min(stock),
                    "peer_mean": statistics.geometric_mean(peer),
                    "peer_worst": min(peer),
                }
            )
    return result


@dataclass(frozen=True)
class Bar:
    """A promised speed or size: ``pick`` of the rows that it covers must reach ``least``.

    Attributes:
        name: the promise in words.
        mode: mode of the rows, or None for all.
        covers: on a row's sizes.
        value: a row's figure, None where it has none.
        least: what the figure has to reach.
        mean: whether the geometric mean counts instead of the worst row.
        provider: whose rows.
    """

    name: str
    mode: str | None
    covers: Predicate
    value: Callable[[Row, Others], float | None]
    least: float
    mean: bool = False
    provider: str = OURS


def _stock(row: Row, others: Others) -> float | None:
    return row.speedup_stock.median if row.speedup_stock else None


def _peer(row: Row, others: Others) -> float | None:
    return row.speedup_peer.median if row.speedup_peer else None


def _copy(row: Row, others: Others) -> float | None:
    return row.of_copy.median if row.of_copy else None


def _against(provider: str) -> Callable[[Row, Others], float | None]:
    def ratio(row: Row, others: Others) -> float | None:
        other = others.get((provider, row.case, row.mode))
        return other.seconds.median / row.seconds.median if other and other.seconds and row.seconds else None

    return ratio


def _saved(provider: str) -> Callable[[Row, Others], float | None]:
    def ratio(row: Row, others: Others) -> float | None:
        other = others.get((provider, row.case, row.mode))
        return other.saved / row.saved if other is not None and other.saved and row.saved else None

    return ratio


def _memory(row: Row, others: Others) -> float | None:
    stock = others.get((BASE, row.case, row.mode))
    if stock is None or not stock.tensor_peak or not row.tensor_peak:
        return None
    return stock.tensor_peak / row.tensor_peak


def _every(sizes: dict[str, Any]) -> bool:
    return True


#: The bars for a CPU with two cores.
BARS: tuple[Bar, ...] = (
    Bar("train, H <= 40 and B <= 8: 3x stock", "train", CLASSES["H <= 40, B <= 8"], _stock, 3.0),
    Bar("train, H <= 40 and B >= 32: 1.5x stock", "train", CLASSES["H <= 40, B >= 32"], _stock, 1.5),
    Bar("train, H <= 64: geometric mean 2.5x stock", "train", CLASSES["H <= 64"], _stock, 2.5, mean=True),
    Bar("train, anywhere: 0.95x stock", "train", _every, _stock, 0.95),
    Bar(
        "forward, H <= 64, B > 1: the best of stock and ONNX Runtime",
        "forward",
        lambda s: CLASSES["H <= 64"](s) and s["batch"] > 1,
        _peer,
        1.0,
    ),
    Bar(
        "forward, B = 1: 0.95 of the best of stock and ONNX Runtime",
        "forward",
        lambda s: _dense(s) and s["batch"] == 1,
        _peer,
        0.95,
    ),
    Bar("forward, anywhere: 0.95x stock", "forward", lambda s: not s["cell"], _stock, 0.95),
    Bar("train, ragged, half full: 2.5x stock with PackedSequence", "train", CLASSES["ragged"], _stock, 2.5),
    Bar("double backward: 2x stock", "double", _every, _stock, 2.0),
    Bar(
        "LSTMCell, H 32, B 1, no gradient: at most 1.2x stock's time",
        "forward",
        lambda s: s["cell"] and s["hidden"] == 32 and s["batch"] == 1,
        _stock,
        1 / 1.2,
    ),
    Bar(
        "peak memory of a training step: not above stock's (ratio stock / ours)",
        "train",
        _every,
        _memory,
        1.0,
    ),
)


def _kind(*kinds: str) -> Predicate:
    return lambda sizes: sizes["kind"] in kinds


GAN_CLASSES: dict[str, Predicate] = {
    "batch norm and activation": _kind("norm", "norm-small", "norm-smooth", "norm-large"),
    "convolution": _kind("conv"),
    "blocks and networks": _kind("block", "critic-bn", "r1"),
    "spectral norm": _kind("spectral"),
    "bias, activation and filters": _kind("pointwise", "filter"),
    "steps": _kind("step", "average"),
}

#: The promises about GAN blocks on a CPU with two cores.
GAN_BARS: tuple[Bar, ...] = (
    Bar("batch norm and LeakyReLU, train: 2x stock", "train", _kind("norm"), _stock, 2.0),
    Bar("batch norm and LeakyReLU, double backward: 6x stock", "double", _kind("norm"), _stock, 6.0),
    Bar("convolution, double backward: 1.5x stock", "double", _kind("conv"), _stock, 1.5),
    Bar(
        "WGAN-GP penalty step of a critic with batch norm, 96 channels: 1.8x stock",
        "penalty",
        _kind("critic-bn"),
        _stock,
        1.8,
    ),
    Bar("R1 by itself, critic without norm: 1.3x stock", "penalty", _kind("r1"), _stock, 1.3),
    Bar("spectral norm of 8 layers: 2x stock", "train", _kind("spectral"), _stock, 2.0),
    Bar("any block, any mode: 0.95x stock", None, _every, _stock, 0.95),
    Bar(
        "saved for backward by conv, batch norm, LeakyReLU: a third less (ratio stock / ours)",
        "train",
        lambda s: s.get("stack", False),
        _saved(BASE),
        1.5,
    ),
    Bar(
        "the same against LeakyReLU(inplace=True): not more (ratio in place / ours)",
        "train",
        lambda s: s.get("stack", False),
        _saved("stock:inplace"),
        1.0,
    ),
)

_LAST = "fuseblock:channels-last"
_BLOCKS = _kind("block", "critic-bn")


def _is_large(sizes: dict[str, Any]) -> bool:
    """Whether an input of 16 bit has 64 MB."""
    kinds = _kind("norm", "norm-smooth", "norm-large", "pointwise", "filter")
    return kinds(sizes) and 2 * sizes["elements"] >= 64e6


#: The promises about GAN blocks on a GPU, in channels-last bfloat16 where that is not said otherwise.
GPU_BARS: tuple[Bar, ...] = (
    *(
        Bar(
            f"norms, activations, filters from 64 MB on, {mode}: 0.9 of a plain copy's rate",
            mode,
            _is_large,
            _copy,
            0.9,
        )
        for mode in ("forward", "train")
    ),
    *(
        Bar(
            f"GAN blocks, {mode}: 0.97x the best of eager in both layouts and, with --compile, compiled",
            mode,
            _BLOCKS,
            _peer,
            0.97,
            provider=_LAST,
        )
        for mode in ("forward", "train")
    ),
    Bar(
        "GAN blocks of at most 128 channels, train: 1.3x the best of these",
        "train",
        lambda s: _BLOCKS(s) and 0 < s["channels"] <= 128,
        _peer,
        1.3,
        provider=_LAST,
    ),
    Bar("penalty steps: 2x eager", "penalty", _every, _stock, 2.0, provider=_LAST),
    Bar("DCGAN-64, a training step: 1.5x eager", "step", _kind("step"), _stock, 1.5, provider=_LAST),
    Bar(
        "DCGAN-64, a training step as a CUDA graph: 1.5x eager as a CUDA graph",
        "step",
        _kind("step"),
        _against("stock:graphed"),
        1.5,
        provider="fuseblock:graphed",
    ),
    Bar(
        "saved for backward by conv, batch norm, LeakyReLU: a third less (ratio stock / ours)",
        "train",
        lambda s: s.get("stack", False),
        _saved(BASE),
        1.5,
    ),
)


def bars(rows: list[Row], promised: tuple[Bar, ...] = BARS) -> list[dict[str, Any]]:
    """Each bar with its figure and verdict: ``met``, ``missed``, or ``not measured``.

    A row that is not green, or has no figure, makes a bar that covers it missed.
    """
    others = {(row.provider, row.case, row.mode): row for row in rows}
    result = []
    for bar in promised:
        figures: list[tuple[float, str]] = []
        without: list[str] = []
        for row in rows:
            if row.provider == bar.provider and bar.mode in (None, row.mode) and bar.covers(row.sizes):
                value = bar.value(row, others)
                if value is None or row.status != GREEN:
                    without.append(row.case)
                else:
                    figures.append((value, row.case))
        entry: dict[str, Any] = {
            "bar": bar.name,
            "least": bar.least,
            "cases": len(figures),
            "without": without,
        }
        if not figures:
            entry |= {"value": None, "at": None, "verdict": "missed" if without else "not measured"}
        else:
            worst, at = min(figures)
            value = statistics.geometric_mean([figure for figure, _ in figures]) if bar.mean else worst
            met = value >= bar.least and not without
            entry |= {"value": value, "at": None if bar.mean else at, "verdict": "met" if met else "missed"}
        result.append(entry)
    return result
