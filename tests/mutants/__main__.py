"""Command line of the mutation tests.

python -m tests.mutants --list                                  how many mutants each source has
python -m tests.mutants --source 'csrc/math/*' --json out.json  all mutants of some sources
python -m tests.mutants --sample 30 --seed 1 --jobs 2           a random sample of every source

CPU kernels are compiled for AVX2, or for what FUSEBLOCK_CPU_ISA names (baseline, avx2, avx512).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .campaign import BaselineError, Campaign, Result, mutants_of
from .generate import Mutant
from .sources import SOURCES, Source, matching

_COLUMNS = ("killed", "survived", "equivalent", "invalid")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Mutation tests of fuseblock."
    )
    parser.add_argument("--list", action="store_true", help="count the mutants of each source and stop")
    parser.add_argument("--source", action="append", metavar="GLOB", help="sources to mutate (default: all)")
    parser.add_argument(
        "--operator", help="only mutants of this kind: sign, comparison, term, gate, barrier, ..."
    )
    parser.add_argument("--sample", type=int, metavar="N", help="at most N mutants of each source")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="sources that run at the same time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every mutant and what became of it")
    parser.add_argument(
        "--workspace", type=Path, help="keep the copies and what was compiled there, for the next run"
    )
    return parser.parse_args()


def _listed(console: Console, work: dict[Source, list[Mutant]]) -> None:
    operators = sorted({m.operator for mutants in work.values() for m in mutants})
    table = Table("source", "kit", *operators, "all", title="mutants")
    for source, mutants in work.items():
        counts = Counter(m.operator for m in mutants)
        table.add_row(source.path, source.kit, *(str(counts[o] or "") for o in operators), str(len(mutants)))
    console.print(table)
    console.print(sum(map(len, work.values())), "mutants")


def _run(arguments: argparse.Namespace, console: Console, work: dict[Source, list[Mutant]]) -> list[Result]:
    """Run the sources, each job in a workspace of its own."""
    results: list[Result] = []
    todo: SimpleQueue[Source] = SimpleQueue()
    for source in work:
        todo.put(source)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars = {s: progress.add_task(s.path, total=len(m), start=False) for s, m in work.items()}

        def job(number: int) -> None:
            folder = None if arguments.workspace is None else arguments.workspace / str(number)
            with Campaign(folder) as campaign:
                while not todo.empty():
                    source = todo.get()
                    progress.start_task(bars[source])
                    try:
                        for result in campaign.run(source, work[source]):
                            results.append(result)
                            progress.advance(bars[source])
                            if result.status == "survived":
                                _show(progress.console, result)
                            if arguments.json is not None:
                                _write(arguments.json, results)
                    except BaselineError as error:
                        progress.console.print(f"{source.path}: left out, {error}", style="red", markup=False)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(job, range(arguments.jobs)))
    return results


def _write(path: Path, results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([result.as_json() for result in results], indent=1) + "\n")


def _show(console: Console, result: Result) -> None:
    mutant = result.mutant
    console.print(
        f"survived ({mutant.operator}) {mutant.name}", style="yellow", markup=False, highlight=False
    )
    console.print(f"  - {mutant.original}", style="red", markup=False, highlight=False)
    console.print(f"  + {mutant.mutated}", style="green", markup=False, highlight=False)


def _summary(console: Console, results: list[Result]) -> None:
    table = Table("source", "mutants", *_COLUMNS, "kill rate", title="mutation tests")
    by_source: dict[str, Counter[str]] = {}
    for result in results:
        by_source.setdefault(result.mutant.path, Counter())[result.status] += 1
    total = sum(by_source.values(), Counter())
    for path, counts in [*by_source.items(), ("all", total)]:
        # Equivalent and invalid mutants could not have been killed.
        could = counts["killed"] + counts["survived"]
        rate = f"{counts['killed'] / could:.1%}" if could else ""
        table.add_row(path, str(sum(counts.values())), *(str(counts[c] or "") for c in _COLUMNS), rate)
    console.print(table)


def main() -> int:
    arguments, console = _arguments(), Console()
    sources = [s for s in SOURCES if any(s in matching(g) for g in arguments.source or ["*"])]
    if not sources:
        console.print(f"no source matches {arguments.source}")
        return 2
    chosen = (arguments.sample, arguments.seed, arguments.operator)
    work = {s: mutants for s in sources if (mutants := mutants_of(s, *chosen))}
    if arguments.list:
        _listed(console, work)
        return 0
    results = _run(arguments, console, work)
    _summary(console, results)
    complete = len(results) == sum(map(len, work.values()))
    return 0 if complete and all(r.status != "survived" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
