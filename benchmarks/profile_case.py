"""Where a step's time goes, stock beside fuseblock: ``python -m benchmarks profile CASE --mode MODE``.

Both are timed as in the suite, and so is stock once more against itself: how far that ratio is from 1 is what the machine's
noise does to a ratio. Then PyTorch's profiler runs, in turns, and for every operator and shape the least time of its own
(without what it calls) over the rounds is shown. Page faults are counted without the profiler: memory that the C library
gave back to the system and takes again costs a fault for every page, whichever operator touches it first. With
``MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824`` it keeps all that a step frees.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import console, machine
from benchmarks.providers import BASE, OURS
from benchmarks.suites import SUITES, Suite
from benchmarks.timing import Runnable, Spread, interleave, paired_ratio

AGAIN = "stock again"
#: Rounds of the profiler, and steps in each.
ROUNDS, STEPS = 5, 4
#: Parts of the names of operators that convolve; autograd's nodes have other names.
_CONVOLUTIONS = ("convolution", "conv2d", "conv1d", "conv_transpose")


@dataclass(frozen=True)
class Operator:
    """Self time of an operator on some shapes: milliseconds and calls of a step, by provider."""

    name: str
    shapes: str
    ms: dict[str, float]
    calls: dict[str, float]

    @property
    def is_convolution(self) -> bool:
        """Whether its time is a convolution's."""
        return any(part in self.name for part in _CONVOLUTIONS)


def _steps(suite: Suite, case: Any, mode: str, seed: int) -> dict[str, Runnable]:
    """Stock, the same steps once more, and fuseblock, run once."""
    problem = suite.make_problem(case, dtype=torch.float32, device="cpu", seed=seed)
    providers = {provider.name: provider for provider in suite.providers}
    stock, ours = (providers[name].step(problem, mode) for name in (BASE, OURS))
    runs = {BASE: Runnable(*stock), AGAIN: Runnable(*stock), OURS: Runnable(*ours)}
    for run in runs.values():
        with run.context():
            run.step()
    return runs


def kernel_work(runs: dict[str, Runnable]) -> dict[str, dict[str, float]]:
    """Page faults, and milliseconds in the system's kernel, of a step by provider: medians over rounds in turns."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in runs}
    for _ in range(2 * ROUNDS):
        for name, run in runs.items():
            with run.context():
                run.step()
                before = resource.getrusage(resource.RUSAGE_SELF)
                for _ in range(STEPS):
                    run.step()
                after = resource.getrusage(resource.RUSAGE_SELF)
            found[name].append((after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime))
    return {
        name: {
            "page_faults": statistics.median(faults for faults, _ in own) / STEPS,
            "kernel_ms": statistics.median(seconds for _, seconds in own) / STEPS * 1e3,
        }
        for name, own in found.items()
    }


def operators(runs: dict[str, Runnable]) -> list[Operator]:
    """Every operator of the steps, the slowest first; of each the least time over the rounds."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            activities = [torch.profiler.ProfilerActivity.CPU]
            with (
                run.context(),
                torch.profiler.profile(activities=activities, record_shapes=True) as profile,
            ):
                for _ in range(STEPS):
                    run.step()
            for event in profile.key_averages(group_by_input_shape=True):
                shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
                own = found.setdefault((event.key, shapes), {}).setdefault(name, [])
                own.append((event.self_cpu_time_total / STEPS / 1e3, event.count / STEPS))
    result = [
        Operator(
            *key,
            {name: min(own)[0] for name, own in by_provider.items()},
            {name: min(own)[1] for name, own in by_provider.items()},
        )
        for key, by_provider in found.items()
    ]
    return sorted(result, key=lambda operator: -max(operator.ms.values()))


def measure(suite: Suite, case: Any, mode: str, *, budget_s: float, seed: int = 0) -> dict[str, Any]:
    """The profile as plain values.

    Args:
        suite: the family of the case.
        case: what to run, float32 on the CPU.
        mode: one of the case's modes.
        budget_s: seconds of timing for each of the three.
        seed: of parameters and inputs.

    Returns:
        ``seconds`` (median) of a step by provider; ``ratios`` of stock's time to that of fuseblock and of stock again;
        ``memory``: `kernel_work`; ``malloc``: settings of the C library's allocator; ``operators``; ``convolutions_ms`` and
        ``sum_ms`` of them by provider; ``most``: the ratio if all that fuseblock does beside its convolutions took no time.
    """
    runs = _steps(suite, case, mode, seed)
    interleave(list(runs.values()), budget_s=budget_s)
    two = {name: runs[name] for name in (BASE, OURS)}
    work = kernel_work(two)
    table = operators(two)

    def total(name: str, of: Callable[[Operator], bool]) -> float:
        return sum(operator.ms.get(name, 0.0) for operator in table if of(operator))

    sums = {name: total(name, lambda _: True) for name in (BASE, OURS)}
    convolutions = {name: total(name, lambda operator: operator.is_convolution) for name in (BASE, OURS)}
    return {
        "case": case.name,
        "mode": mode,
        "threads": torch.get_num_threads(),
        **machine.describe("cpu"),
        "rounds": len(runs[BASE].wall),
        "seconds": {name: Spread.of(run.wall).median for name, run in runs.items()},
        "ratios": {name: asdict(paired_ratio(runs[BASE], runs[name])) for name in (OURS, AGAIN)},
        "memory": work,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "sum_ms": sums,
        "convolutions_ms": convolutions,
        "most": sums[BASE] / convolutions[OURS] if convolutions[OURS] else None,
        "operators": [asdict(operator) for operator in table],
    }


def _lines(profile: dict[str, Any], count: int) -> Iterator[tuple[Sequence[str], str]]:
    for operator in profile["operators"][:count]:
        figures = [
            f"{operator['ms'][name]:.3f} ({operator['calls'][name]:g})" if name in operator["ms"] else ""
            for name in (BASE, OURS)
        ]
        yield (operator["name"], operator["shapes"][:60], *figures), ""
    for title, sums in (("convolutions", profile["convolutions_ms"]), ("all", profile["sum_ms"])):
        yield (title, "", *(f"{sums[name]:.3f}" for name in (BASE, OURS))), "bold"


def show(profile: dict[str, Any], count: int) -> None:
    """Print the profile, its ``count`` slowest operators."""
    console.print_table(
        f"{profile['case']} {profile['mode']}, {profile['threads']} threads: own time of a step in ms (calls)",
        ("operator", "shapes", *(BASE, OURS)),
        _lines(profile, count),
    )
    for name, ratio in profile["ratios"].items():
        spread = f"quartiles {ratio['q25']:.2f} to {ratio['q75']:.2f}"
        print(f"stock / {name}: {ratio['median']:.2f} ({spread}, {profile['rounds']} rounds)")
    if profile["most"] is not None:
        print(f"stock / fuseblock's convolutions alone, by the profile: {profile['most']:.2f}")
    for name, work in profile["memory"].items():
        print(
            f"{name}: {work['page_faults']:.0f} page faults, {work['kernel_ms']:.2f} ms in the kernel, of a step"
        )


def main(argv: Sequence[str]) -> int:
    """Run; 0, or 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("case", help="a case of the suite: python -m benchmarks --list")
    add("--mode", default="train", help="one of the case's modes (default train)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--budget", type=float, default=2.0, metavar="S", help="seconds of timing for each (default 2)")
    add("--operators", type=int, default=20, metavar="N", help="operators to show (default 20)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="PATH", help="write everything")
    args = parser.parse_args(argv)
    pairs = [(suite, case) for suite in SUITES for case in suite.cases if case.name == args.case]
    if not pairs or args.mode not in pairs[0][1].modes:
        modes = f" has modes {', '.join(pairs[0][1].modes)}" if pairs else ": no such case"
        print(f"error: {args.case}{modes}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    profile = measure(*pairs[0], args.mode, budget_s=args.budget, seed=args.seed)
    show(profile, args.operators)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(profile, indent=1) + "\n")
        print(f"wrote {args.json}")
    return 0
