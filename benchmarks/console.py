"""Progress and tables on the terminal: with rich where it is installed, plain text otherwise."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.runner import GREEN, RED, UNAVAILABLE, Row
from benchmarks.suites import SUITES

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    _RICH = False
else:
    _RICH = True

HEAD = (
    "case",
    "mode",
    "provider",
    "median",
    "IQR",
    "vs stock",
    "vs best peer",
    "of ceiling",
    "peak",
    "saved",
    "error/bound",
)
_SIZES = {case.name: case.size for suite in SUITES for case in suite.cases}


def seconds(value: float) -> str:
    """A time with a fitting unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def megabytes(value: float | None) -> str:
    """Bytes in MB."""
    return "" if value is None else f"{value / 1e6:.3g} MB"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text; a row without speed-up says why instead."""
    head = (row.case, row.mode, row.provider)
    if row.seconds is None:
        return (*head, row.status, "", row.reason, "", "", "", "", "")
    spread = f"{(row.seconds.q75 - row.seconds.q25) / row.seconds.median:.0%}"
    stock = "RED" if row.status == RED else ""
    if row.speedup_stock is not None:
        stock = f"{row.speedup_stock.median:.2f}x"
    peer = ""
    if row.speedup_peer is not None:
        peer = f"{row.speedup_peer.median:.2f}x {row.best_peer}{' (red)' if row.best_peer_red else ''}"
    gemm, copy = row.gemm_fraction or 0.0, row.copy_fraction or 0.0
    ceiling = f"{gemm:.0%} GEMM" if gemm >= copy else f"{copy:.0%} copy"
    error = f"{row.error_over_bound:.2f} {row.tensor}" if row.error_over_bound is not None else ""
    median = seconds(row.seconds.median)
    if row.device_seconds is not None:
        median += f" (GPU {seconds(row.device_seconds.median)})"
    return (
        *head,
        median,
        spread,
        stock,
        peer,
        ceiling,
        megabytes(row.tensor_peak),
        megabytes(row.saved),
        error,
    )


_COPIES = "Against a plain copy of the bytes of forward, timed alike: bytes of the performance model, docs/performance.md"
#: Of `against_copy`.
COPY_HEAD = (
    "case",
    "mode",
    "provider",
    "bytes by the model",
    "their floor here",
    "time",
    "of the copy's rate",
)


def against_copy(rows: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of a table for the rows, as plain values, that have a share of a plain copy's rate."""
    lines = []
    for row in rows:
        share = row.get("of_copy")
        if share is not None:
            time = row["seconds"]["median"]
            floor = time * share["median"]
            figures = megabytes(row["moved"]), seconds(floor), seconds(time), f"{share['median']:.0%}"
            lines.append((row["case"], row["mode"], row["provider"], *figures))
    return lines


def _style(row: Row) -> str:
    if row.status == RED:
        return "bold red"
    if row.status != GREEN:
        return "dim"
    if row.speedup_stock is not None and row.provider.startswith("fuseblock"):
        return "green" if row.speedup_stock.median >= 1 else "yellow"
    return ""


def print_table(title: str, head: Sequence[str], lines: Iterable[tuple[Sequence[str], str]]) -> None:
    """Print lines of cells, each with a style."""
    if _RICH:
        table = rich.table.Table(title=title, title_justify="left")
        for name in head:
            table.add_column(name, no_wrap=name in ("case", "mode", "provider"))
        for line, style in lines:
            table.add_row(*line, style=style or None)
        # Not a terminal: as wide as the table wants, so that logs can be read and searched.
        console = rich.console.Console() if sys.stdout.isatty() else rich.console.Console(width=200)
        console.print(table)
        return
    texts = [line for line, _ in lines]
    widths = [max(len(line[i]) for line in [*texts, head]) for i in range(len(head))]
    print(title)
    for text in [head, *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())


def tables(report: dict[str, Any], rows: list[Row]) -> None:
    """Print rows, class means and bars."""
    shown = [row for row in rows if row.status != UNAVAILABLE]
    print_table(
        "Results (speed-ups are paired medians; a red row has none)",
        HEAD,
        [(cells(row), _style(row)) for row in shown],
    )
    absent: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.status == UNAVAILABLE:
            absent[row.provider, row.reason] = absent.get((row.provider, row.reason), 0) + 1
    for (provider, reason), count in absent.items():
        print(f"not run: {provider}, {count} rows: {reason}")
    copies = [(cells, "") for cells in against_copy([dataclasses.asdict(row) for row in rows])]
    if copies:
        print_table(_COPIES, COPY_HEAD, copies)
    means = [
        ((m["mode"], m["class"], str(m["cases"]), str(m["not_green"]), *(f"{m[k]:.2f}x" for k in _MEANS)), "")
        for m in report["classes"]
    ]
    if means:
        head = (
            "mode",
            "class",
            "cases",
            "not green",
            "mean vs stock",
            "worst",
            "mean vs best peer",
            "worst ",
        )
        print_table("Geometric means, fuseblock", head, means)
    bars = []
    for bar in report["bars"]:
        value = "" if bar["value"] is None else f"{bar['value']:.2f}"
        where = bar["at"] or ""
        if bar["without"]:
            where += f" (no figure: {', '.join(bar['without'])})"
        style = {"met": "green", "missed": "bold red"}.get(bar["verdict"], "dim")
        bars.append(((bar["bar"], f"{bar['least']:.2f}", value, where, bar["verdict"]), style))
    if bars:
        print_table("Bars", ("bar", "least", "measured", "worst at", "verdict"), bars)


_MEANS = ("stock_mean", "stock_worst", "peer_mean", "peer_worst")


def cases_table(cases: Iterable[Any]) -> None:
    """Print the registry."""
    lines = [
        (
            (
                c.name,
                c.size,
                ", ".join(c.modes),
                "quick" if c.quick else "--full" if c.long_on_cpu else "",
                c.user,
            ),
            "",
        )
        for c in cases
    ]
    print_table(
        "Cases: layers x hidden (input) batch time; or the shape of the input",
        ("case", "size", "modes", "runs", "user"),
        lines,
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; the function that it gives announces the next step."""
    if not _RICH:
        print("note: rich is not installed; progress is plain text", file=sys.stderr)
        count = 0

        def announce(text: str) -> None:
            nonlocal count
            count += 1
            print(f"[{count}/{total}] {text}", file=sys.stderr)

        yield announce
        return
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}"),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def announce(text: str) -> None:
            nonlocal started
            bar.update(task, advance=int(started), description=f"{text}  {_SIZES.get(text.split()[0], '')}")
            started = True

        yield announce
