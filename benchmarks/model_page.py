"""Writes docs/performance.md and docs/performance.svg: ``python -m benchmarks model``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import model_measured, model_resources
from benchmarks.model import GPUS, Family, Kernel, Rates, evaluate, shown
from benchmarks.model_blocks import BLOCKS, CALLS, DESIGNS, EAGER, OURS, SECOND_ORDER
from benchmarks.model_kernels import FAMILIES, is_known

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT, RESULTS = ROOT / "docs/performance.md", ROOT / "docs/performance.svg", ROOT / "benchmarks/results"

_HEAD = """# Performance model

Written by `python -m benchmarks model` from [benchmarks/model_kernels.py](../benchmarks/model_kernels.py); do not edit.
For every GPU kernel: the bytes that it takes from memory and brings there, its operations and launches as formulas, and
the time that these imply at least. **Nothing here was measured on a GPU** but what the last column of "Measured" says.
The formulas of bytes are checked: tests run every kernel, and whole blocks, in an emulator or interpreter, count each load
and store, and compare, within 5 % ([tests/ops/test_counted_passes.py](../tests/ops/test_counted_passes.py)).

*Read* is what is loaded once; *read again* what several blocks or neighbouring threads load: from memory the first time,
from cache then. A floor is the larger of bytes and operations divided by what the GPU is assumed to achieve. It knows
nothing of launches (some microseconds each outside of a CUDA graph) and of latency, and counts operations roughly.
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gpus() -> Iterator[str]:
    yield "## GPUs"
    yield ""
    yield "Bandwidth and dense peak rates are data sheet figures; the shares of them that kernels achieve are assumed."
    yield ""
    head = [
        "GPU",
        "memory, TB/s",
        "assumed",
        "bfloat16 tensor cores, TFLOP/s",
        "assumed",
        "float32, TFLOP/s",
        "assumed",
    ]
    rows = [
        [
            gpu.name,
            f"{gpu.memory / 1e12:.3g}",
            f"{gpu.achievable_memory / 1e12:.2f}",
            f"{gpu.tensor / 1e12:.0f}",
            f"{gpu.achievable(True) / 1e12:.0f}",
            f"{gpu.vector / 1e12:.3g}",
            f"{gpu.achievable(False) / 1e12:.1f}",
        ]
        for gpu in GPUS
    ]
    yield from _table(head, rows)


def _code(formula: str) -> str:
    return "" if formula == "0" else f"`{shown(formula)}`"


def _family(family: Family) -> Iterator[str]:
    yield f"### {family.title}"
    yield ""
    yield "; ".join(f"`{symbol}` {meaning}" for symbol, meaning in family.symbols.items()) + "."
    if family.note:
        yield family.note
    yield ""
    head = ("kernel", "read", "read again", "written", "FLOP", "launches")
    rows = [
        (k.name, *map(_code, (k.reads, k.again, k.writes, k.flops)), shown(k.launches))
        for k in family.kernels
    ]
    yield from _table(head, rows)
    yield f"{family.example[0].upper()}{family.example[1:]}:"
    yield ""
    yield from _table(
        ("kernel", "MB", "FLOP / byte", *(f"floor on {gpu.name}, us" for gpu in GPUS), "bound by"),
        [_floors(kernel, family.sizes_of(kernel)) for kernel in family.kernels],
    )


def _floors(kernel: Kernel, sizes: Any) -> list[str]:
    moved = kernel.moved(sizes)
    bounds = ["memory" if kernel.is_memory_bound(sizes, gpu) else "operations" for gpu in GPUS]
    return [
        kernel.name,
        _number(moved / 1e6),
        _number(evaluate(kernel.flops, sizes) / moved),
        *(_number(kernel.floor(sizes, gpu) * 1e6) for gpu in GPUS),
        bounds[0] if len(set(bounds)) == 1 else ", ".join(bounds),
    ]


def _blocks() -> Iterator[str]:
    yield "## Blocks of GANs"
    yield ""
    yield (
        "Convolution, batch norm in training, LeakyReLU, convolution: passes over the activation besides those of the "
        "convolutions, bytes of an element at 16 bit, and tensors that forward keeps."
    )
    yield ""
    rows = [
        (d.name, f"{d.forward:g}", f"{d.backward:g}", f"{d.bytes_of_element():g}", str(2 * d.saved))
        for d in DESIGNS
    ]
    yield from _table(("design", "forward", "backward", "bytes", "bytes kept"), rows)
    stock, ours = SECOND_ORDER
    yield f"The norm's second derivative with its activation: {stock} passes composed, {ours:g} fused."
    yield ""
    yield from _calls()
    h200 = GPUS[0]
    yield (
        f"Floors on {h200.name} in bfloat16, microseconds of forward + backward: the convolution at its own floor and the "
        "passes in between at the memory's rate. Launches are left out, which favours eager; so is the cache, which does "
        "not. A fused convolution pays only where it comes near the library's rate. `conv2d_stats` is for batch norms "
        "alone; `conv2d_act`, for activations, is not listed."
    )
    yield ""
    head = ("block", "batch", "convolution, us", "eager", "norm and activation in one", "`conv2d_stats`")
    rows = []
    for block in BLOCKS:
        eager = block.seconds(EAGER, h200)
        cells = [block.name, str(block.batch), _number(block.convolution(h200) * 1e6), _pair(eager)]
        for design in OURS:
            seconds = block.seconds(design, h200)
            gain = sum(eager) / sum(seconds)
            cells.append(
                f"{_pair(seconds)} ({gain:.2f}x)" if block.norm == "batch" or design is OURS[0] else ""
            )
        rows.append(tuple(cells))
    yield from _table(head, rows)


def _calls() -> Iterator[str]:
    yield (
        "What a call of a module moves and launches in training (float32), forward + backward, and + the norm's second "
        "order: tests count all of it, PyTorch's own operations included "
        "([tests/ops/test_counted_blocks.py](../tests/ops/test_counted_blocks.py)). PyTorch's convolutions are left out of "
        "both, of Triton's the launch counts. Small launches, at most, are PyTorch's on operands of channels (running "
        "statistics 6, coefficients between our kernels, gradients cast to the parameters' dtype) and, of a Triton "
        "convolution, the copy of the weight into the kernels' order: W elements read and written. They move next to "
        "nothing, but each takes some microseconds outside of a CUDA graph, and floors know nothing of them."
    )
    yield ""
    head = ("module", "by", "what runs", "passes over an activation", "launches", "small launches")
    rows = [
        (
            f"`{call.module}`",
            call.backend,
            call.how,
            _sum(call.passes(4)),
            _sum(call.launches),
            _sum(call.small),
        )
        for call in CALLS
    ]
    yield from _table(head, rows)


def _sum(figures: Sequence[float]) -> str:
    return " + ".join(f"{figure:.3g}" for figure in figures)


def _pair(seconds: tuple[float, float]) -> str:
    return " + ".join(_number(s * 1e6) for s in seconds)


def _measured(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Measured"
    yield ""
    yield "Cases of the benchmark that consist of these kernels, in bfloat16, and results of GPUs in benchmarks/results."
    yield ""
    head = ("case", "mode", *(f"floor on {gpu.name}, us" for gpu in GPUS), "measured")
    rows = [
        (
            case.name,
            case.mode,
            *(_number(case.floor(gpu) * 1e6) for gpu in GPUS),
            "; ".join(_shares(case, reports)) or "not measured",
        )
        for case in model_measured.CASES
    ]
    yield from _table(head, rows)


def _shares(case: model_measured.Case, reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    for gpu, seconds, floor in case.results(reports):
        yield f"{gpu.name}: {_number(seconds * 1e6)} us, {floor / seconds:.0%} of the floor"


def _range(values: Sequence[int]) -> str:
    low, high = values
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _resources() -> Iterator[str]:
    yield "## Registers and shared memory"
    yield ""
    yield (
        "Read from the compiled binaries: smallest and largest of all instances (dtypes, vector widths, sizes). What the "
        "recurrence's tiers ask for at launch besides: `python -m fuseblock tiers`. Triton's are all that a launch takes."
    )
    yield ""
    for backend, of in model_resources.recorded().items():
        yield f"{of['compiler']}:"
        yield ""
        columns = sorted(
            {row["architecture"] for row in of["kernels"]}, key=lambda name: int(name.rstrip("a"))
        )
        kernels: dict[str, dict[str, Any]] = {}
        for row in of["kernels"]:
            if is_known(row["function"], backend):
                kernels.setdefault(row["function"], {})[row["architecture"]] = row
        head = (
            "kernel",
            "instances",
            *(f"registers, sm_{name}" for name in columns),
            "shared bytes",
            "spills",
        )
        rows = [
            (
                f"`{function}`",
                str(max(row["instances"] for row in by_column.values())),
                *(_range(by_column[n]["registers"]) if n in by_column else "" for n in columns),
                _range(max(row["shared"] for row in by_column.values())),
                str(sum(row["spills"] for row in by_column.values())),
            )
            for function, by_column in kernels.items()
        ]
        yield from _table(head, rows)


def text(reports: Sequence[dict[str, Any]]) -> str:
    """The page, with what these reports of the benchmark measured."""
    lines = [_HEAD, *_gpus(), "![Roofline](performance.svg)", "", "## Kernels", ""]
    for family in FAMILIES:
        lines += _family(family)
    lines += [*_blocks(), *_measured(reports), *_resources()]
    return "\n".join(lines).rstrip() + "\n"


def reports() -> list[dict[str, Any]]:
    """The committed results of the benchmark."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def plot(path: Path, rates: Rates) -> None:
    """A roofline of every kernel at its family's example."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    memory, left, right = rates.achievable_memory / 1e12, 0.5, 3000.0
    options = {"svg.hashsalt": "fuseblock", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(options):
        figure, axes = plt.subplots(figsize=(9, 5))
        for tensor, name in ((True, "bfloat16 tensor cores"), (False, "float32 units")):
            peak = rates.achievable(tensor) / 1e12
            axes.plot([peak / memory, right], [peak, peak], color="0.5", lw=1)
            axes.annotate(name, (right, peak), (-4, -12), textcoords="offset points", ha="right", color="0.4")
        top = rates.achievable(True) / 1e12
        axes.plot([left, top / memory], [left * memory, top], color="0.5", lw=1)

        points: list[tuple[float, float, str]] = []
        for family, colour in zip(FAMILIES, plt.get_cmap("tab10").colors, strict=False):
            names = []
            for kernel in family.kernels:
                sizes = family.sizes_of(kernel)
                flops, moved = evaluate(kernel.flops, sizes), kernel.moved(sizes)
                if flops / moved < left or moved < 1e6:  # sums of sums
                    continue
                number = str(len(points) + 1)
                points.append((flops / moved, flops / kernel.floor(sizes, rates) / 1e12, number))
                axes.plot(*points[-1][:2], "o", ms=5, color=colour)
                names.append(f"{number}  {kernel.name}")
            axes.plot([], [], "o", color=colour, label="\n".join([family.title, *names]))
        for n, group in enumerate(_neighbours(points)):
            shift, side = ((-5, 5), "right") if n % 2 else ((5, -11), "left")
            numbers = ", ".join(number for _, _, number in sorted(group, key=lambda point: int(point[2])))
            axes.annotate(numbers, group[-1][:2], shift, textcoords="offset points", ha=side, size=8)

        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(left * memory, 1.5 * top))
        axes.set(xlabel="FLOP / byte from and to memory", ylabel="TFLOP/s at the floor")
        axes.set_title(f"{rates.name}: what the formulas allow (not measured)", size=10)
        axes.grid(True, color="0.92")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, bbox_inches="tight", metadata=metadata)
        plt.close(figure)


def _neighbours(points: Iterable[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Points whose labels would lie on each other, together."""
    groups: list[list[tuple[float, float, str]]] = []
    for point in sorted(points):
        if groups and point[0] < 1.3 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def main(argv: Sequence[str]) -> int:
    """Write the page and its plot; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model",
        description="Write docs/performance.md: the performance model of the GPU kernels.",
    )
    parser.add_argument(
        "--triton",
        action="store_true",
        help="compile the Triton kernels for their registers and shared memory: minutes",
    )
    args = parser.parse_args(argv)
    model_resources.record(args.triton)
    PAGE.write_text(text(reports()))
    plot(PLOT, GPUS[0])
    print(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")
    return 0
