"""Entry point of ``python -m benchmarks.micro``."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import console, machine
from benchmarks.micro import library, measure
from benchmarks.micro.cases import CASES, Case

_HEAD = (
    "case",
    "unit",
    "median",
    "IQR",
    "predicted",
    "measured / predicted",
    "blocks",
    "us of a round",
    "clk of a round",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.micro",
        description="What barriers, exchanges, gathers and products cost on this GPU, beside what the design assumed.",
    )
    parser.add_argument("--case", action="append", metavar="GLOB", help="cases to run (repeatable)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser


def _predicted(bounds: tuple[float, float]) -> str:
    low, high = (f"{bound:.3g}" for bound in bounds)
    return low if low == high else f"{low} to {high}"


def _cells(row: measure.Row) -> tuple[str, ...]:
    if row.value is None:
        return (row.case, row.unit, row.status, "", _predicted(row.predicted), row.reason, "", "", "")
    spread, rounds = row.value, (row.us_of_round, row.clocks_of_round)
    return (
        row.case,
        row.unit,
        f"{spread.median:.4g}",
        f"{(spread.q75 - spread.q25) / spread.median:.0%}",
        _predicted(row.predicted),
        f"{row.ratio:.2f}",
        str(row.blocks),
        *("" if value is None else f"{value:.4g}" for value in rounds),
    )


def _style(row: measure.Row) -> str:
    return {measure.MEASURED: "", measure.REFUSED: "dim"}.get(row.status, "bold red")


def _list(cases: Sequence[Case]) -> None:
    lines = [((case.label, case.unit, _predicted(case.predicted)), "") for case in cases]
    console.print_table("Cases: name/blocks of a cluster", ("case", "unit", "predicted"), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the microbenchmarks.

    Returns:
        0; 1 if a kernel computed something wrong or failed; 2 for a usage error, or without a GPU or nvcc.
    """
    args = _parser().parse_args(argv)
    cases = [c for c in CASES if any(fnmatch.fnmatch(c.label, pattern) for pattern in args.case or ["*"])]
    if not cases:
        print(f"error: no case matches {', '.join(args.case)}", file=sys.stderr)
        return 2
    if args.list:
        _list(cases)
        return 0
    if not torch.cuda.is_available():
        print("error: the microbenchmarks need an NVIDIA GPU, and PyTorch sees none", file=sys.stderr)
        return 2
    try:
        kernels = library.Library(library.build(torch.cuda.get_device_capability()))
    except library.UnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = machine.describe("cuda")
    rows = []
    for case in cases:
        print(case.label, file=sys.stderr, flush=True)
        rows.append(measure.measure(case, kernels))
    title = f"{about['machine']['gpu']}; predicted for a Hopper GPU with 132 multiprocessors at 1.755 GHz"
    console.print_table(title, _HEAD, [(_cells(row), _style(row)) for row in rows])
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"schema": 1, **about, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")
    wrong = [row for row in rows if row.status in (measure.WRONG, measure.FAILED)]
    for row in wrong:
        print(f"error: {row.case}: {row.status}: {row.reason}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
