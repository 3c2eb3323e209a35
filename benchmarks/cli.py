"""The command line of the suite."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases as registry
from benchmarks import console, machine, model_page, profile_case, runner, summary, tune
from benchmarks import providers as peers
from benchmarks.suites import SUITES, Suite

SCHEMA = 1
UNFINISHED = 3
_OPTIONAL = {"onnx": "no ONNX Runtime rows", "onnxruntime": "no ONNX Runtime rows", "matplotlib": "no plots"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure fuseblock against PyTorch and ONNX Runtime. Speed is shown for right results only.",
        epilog="python -m benchmarks tune measures the table of this GPU that dispatch reads: tune --help; "
        "python -m benchmarks model writes docs/performance.md; "
        "python -m benchmarks profile shows where a case's time goes: profile --help",
    )
    add = parser.add_argument
    add("--case", "--only", dest="case", action="append", metavar="GLOB", help="cases to run (repeatable)")
    add("--suite", choices=("all", *(suite.name for suite in SUITES)), default="all")
    add(
        "--mode",
        action="append",
        choices=sorted({mode for suite in SUITES for mode in suite.modes}),
        help="modes to run (repeatable; default: all)",
    )
    add("--providers", action="append", metavar="GLOB", help="providers to run beside stock (repeatable)")
    add("--compile", action="store_true", help="also torch.compile of PyTorch's module")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=found, help="default: a GPU where there is one")
    dtypes = ("float32", "float64", "float16", "bfloat16")
    add("--dtype", choices=dtypes, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--threads", type=int, default=None, help="CPU threads of all providers (default: PyTorch's)")
    add("--tf32", action="store_true", help="CUDA: allow TF32 in float32 products, for everyone")
    add(
        "--budget",
        type=float,
        default=None,
        metavar="S",
        help="seconds per provider, case and mode (default 2)",
    )
    add(
        "--limit",
        type=float,
        default=math.inf,
        metavar="S",
        help="begin no further case and mode after so many seconds; results are written, the exit status is 3",
    )
    add(
        "--rss",
        action="store_true",
        help="CPU: also each provider's process peak memory (slow: one process a row)",
    )
    add("--seed", type=int, default=0)
    add("--full", action="store_true", help="also the sizes that take long on a CPU")
    add("--quick", action="store_true", help="a few tiny cases and short timings, under a minute")
    add("--json", type=Path, metavar="PATH", help="write results")
    add("--html", type=Path, metavar="PATH", help="write a self-contained report with plots")
    add("--list", action="store_true", help="print the cases and stop")
    return parser


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes the string ``"inf"``."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def build_report(
    rows: list[runner.Row], settings: runner.Settings, ceilings: dict[str, float], argv: Sequence[str]
) -> dict[str, Any]:
    """Everything that goes to JSON and HTML, as plain values."""
    families = [(suite, [row for row in rows if row.suite == suite.name]) for suite in SUITES]
    families = [(suite, own) for suite, own in families if own]
    # Promised are float32 on a CPU, and 16 bit on a GPU.
    on_cpu = settings.device == "cpu"
    is_promised = settings.dtype in (("float32",) if on_cpu else ("float16", "bfloat16"))
    promised = "bars" if on_cpu else "gpu_bars"
    return {
        "schema": SCHEMA,
        **machine.describe(settings.device),
        # Where files lie is the machine's affair.
        "command": "python -m benchmarks "
        + " ".join(Path(a).name if Path(a).is_absolute() else a for a in argv),
        "parameters": dataclasses.asdict(settings),
        "ceilings": ceilings,
        "rows": [_finite(dataclasses.asdict(row)) for row in rows],
        "classes": [entry for suite, own in families for entry in summary.classes(own, suite.classes)],
        "bars": [entry for suite, own in families for entry in summary.bars(own, getattr(suite, promised))]
        if is_promised
        else [],
    }


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a suite is run."""

    suite: Suite
    cases: list[Any]
    modes: list[str]
    providers: list[Any]


def _plan(suite: Suite, args: argparse.Namespace) -> _Plan:
    cases = registry.select(
        args.case, quick=args.quick, full=args.full, device=args.device, available=suite.cases
    )
    if args.full or args.device != "cpu":
        cases = [suite.real(case, args.device) for case in cases]
    patterns = args.providers
    if args.compile:
        patterns = [*(patterns or [p.name for p in suite.providers if p.default]), "compile"]
    modes = [mode for mode in suite.modes if not args.mode or mode in args.mode]
    return _Plan(suite, cases, modes, peers.select(patterns, suite.providers))


def _why_nothing(plans: Sequence[_Plan], args: argparse.Namespace) -> str:
    """Why the plans have nothing to run."""
    cases = [case for plan in plans for case in plan.cases]
    if not cases:
        return "--quick or the absence of --full leaves no case"
    asked = "mode " + " or ".join(args.mode or ())
    return f"no case has {asked}; " + "; ".join(f"{case.name} has {', '.join(case.modes)}" for case in cases)


def main(argv: Sequence[str] | None = None, suites: tuple[Suite, ...] = SUITES) -> int:
    """Run the suites.

    Args:
        argv: arguments; default the process's.
        suites: to choose from.

    Returns:
        0, or 1 if a row of fuseblock is red or failed, or 2 for a usage error, or 3 if ``--limit`` ended the run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["tune"]:
        return tune.main(argv[1:])
    if argv[:1] == ["model"]:
        return model_page.main(argv[1:])
    if argv[:1] == ["profile"]:
        return profile_case.main(argv[1:])
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    chosen = [suite for suite in suites if args.suite in ("all", suite.name)]
    try:
        registry.check_patterns(args.case, tuple(case for suite in chosen for case in suite.cases))
        peers.check_patterns(args.providers, tuple(p for suite in chosen for p in suite.providers))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plans = [_plan(suite, args) for suite in chosen]
    if args.list:
        for plan in plans:
            console.cases_table(plan.cases if args.case or args.quick else plan.suite.cases)
        return 0

    for package, consequence in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            print(f"note: {package} is not installed: {consequence}", file=sys.stderr)
    total = sum(mode in case.modes for plan in plans for case in plan.cases for mode in plan.modes)
    if total == 0:
        print(f"error: {_why_nothing(plans, args)}", file=sys.stderr)
        return 2
    names = {case.name for plan in plans for case in plan.cases}
    left_out = [
        case.name
        for suite in chosen
        for case in registry.select(args.case, full=True, available=suite.cases)
        if case.name not in names
    ]
    if left_out and not args.quick:
        print(f"note: left out without --full: {', '.join(left_out)}", file=sys.stderr)

    load = machine.describe(args.device)["machine"]["load_before"]
    if load is not None and load > 0.5:
        print(
            f"note: the machine is not quiet (load {load:.1f}); times, most of all of two threads, suffer",
            file=sys.stderr,
        )
    settings = runner.Settings(
        device=args.device,
        dtype=args.dtype or ("float32" if args.device == "cpu" else "bfloat16"),
        threads=args.threads or torch.get_num_threads(),
        seed=args.seed,
        budget_s=args.budget if args.budget is not None else (0.25 if args.quick else 2.0),
        rss=args.rss,
        tf32=args.tf32,
    )
    rows: list[runner.Row] = []
    deadline = time.perf_counter() + args.limit
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        runner.apply(settings)
        ceilings = machine.ceilings(args.device, settings.torch_dtype, seconds=0.2 if args.quick else 0.5)
        announce = stack.enter_context(console.progress(total))
        for plan in plans:
            rows.extend(
                runner.run(
                    plan.suite,
                    plan.cases,
                    plan.modes,
                    plan.providers,
                    settings,
                    ceilings,
                    announce,
                    deadline,
                )
            )

    report = build_report(rows, settings, ceilings, argv)
    print(
        f"{report['machine']['gpu'] or report['machine']['cpu']}, {settings.threads} threads, {settings.dtype}; "
        f"ceilings: GEMM {ceilings['gemm_gflops']:.0f} GFLOP/s, copy {ceilings['copy_gbytes']:.1f} GB/s"
    )
    console.tables(report, rows)
    _write(report, args.json, args.html)
    print("model: docs/performance.md has what the GPU kernels move and compute, and their floors")
    wrong = [row for row in runner.ours(rows) if row.status in (runner.RED, runner.FAILED)]
    for row in wrong:
        print(f"error: {row.case} {row.mode} {row.provider}: {row.status}: {row.reason}", file=sys.stderr)
    done = {(row.case, row.mode) for row in rows}
    if wrong:
        return 1
    if len(done) < total:
        print(
            f"error: {total - len(done)} of {total} cases and modes were left out (--limit)", file=sys.stderr
        )
        return UNFINISHED
    return 0


def _write(report: dict[str, Any], json_path: Path | None, html_path: Path | None) -> None:
    for path in (json_path, html_path):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {json_path}")
    if html_path is not None:
        from benchmarks.report import to_html

        html_path.write_text(to_html(report))
        print(f"wrote {html_path}")
