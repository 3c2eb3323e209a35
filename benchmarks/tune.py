"""``python -m benchmarks tune``: measures who is fastest at which sizes on this GPU, and writes the table for dispatch.

    python -m benchmarks tune --device cuda                    writes kernels/configs/<gpu>.json
    python -m benchmarks tune --device cpu --out /tmp/cpu.json rehearses all of it; on CPUs dispatch asks no table

Every rival's results are checked before the timing and after it (`benchmarks.parity`); who is wrong, or fails, is left out
and reported. The others are timed against each other, interleaved (`benchmarks.timing`): on a GPU between CUDA events around
many calls in a row, so that a call limited by its launches counts as such. The table is written after every question: a run
that ends early, at its budget at the latest, is continued by the next.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import console, machine, tune_blocks, tune_layers, tune_passes, tune_questions, tune_spectral
from benchmarks.runner import one_line
from benchmarks.timing import Runnable, Spread, interleave
from benchmarks.tune_questions import PRECISIONS, Contest, Question, Rival
from fuseblock import _tables

#: Times this close count as equal: the plain rule's choice among them is the best.
MARGIN = 1.02
COMPLETE, WRONG, USAGE, UNFINISHED = 0, 1, 2, 3
#: In the place of a label: nobody could be asked.
_CONTEST = "contest"
_CONFIGS = Path(__file__).resolve().parents[1] / "kernels" / "configs"


@dataclass(frozen=True)
class Outcome:
    """What a contest gave.

    Attributes:
        times: microseconds per call of those that are right, in the order of the plain rule.
        excluded: the others, and why.
    """

    times: dict[str, float]
    excluded: dict[str, str]

    @property
    def best(self) -> str:
        """The fastest; of those as fast, the first."""
        least = min(self.times.values())
        return next(label for label, t in self.times.items() if t <= MARGIN * least)


class Document:
    """A table as it grows, in its file.

    Args:
        path: of the file; what is in it is kept.
        device: name of the GPU or CPU.
        run: what the measurements to come are taken on.

    Raises:
        ValueError: the file is no table, or one of another device.
    """

    def __init__(self, path: Path, device: str, run: dict[str, Any]) -> None:
        self.path = path
        self._content: dict[str, Any] = {"schema": _tables.SCHEMA, "device": device, "runs": [], "ops": {}}
        if path.exists():
            self._content = json.loads(path.read_text(encoding="utf-8"))
            _tables.parse(self._content)
            if self._content.get("device") != device:
                raise ValueError(f"it was measured on {self._content.get('device')}, this is {device}")
            _check_notes(self._content)
        self._content.setdefault("runs", []).append(run)
        # Whoever cannot write shall not measure first.
        path.parent.mkdir(parents=True, exist_ok=True)

    def find(self, op: str, key: dict[str, Any], part: str = "ops") -> dict[str, Any] | None:
        """The entry of a question, or None; ``part``: ``ops``, or ``failed`` for those that nobody answered."""
        return next((e for e in self._content.get(part, {}).get(op, ()) if e["key"] == key), None)

    def entry(self, op: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """What is known of a question: its entry, answered or not."""
        return self.find(op, key) or self.find(op, key, "failed")

    def has(self, question: Question, key: dict[str, Any], device: str) -> bool:
        """Whether it has of a question what asking it now would give: of all who can run by now.

        Who was wrong is asked again by another version, and a stack when its backends have been measured since.
        """
        entry = self.entry(question.op, key)
        if entry is None:
            return False
        excluded, run = entry.get("excluded", {}), entry.get("run", 0)
        runs = self._content["runs"]
        if excluded and run < len(runs) and runs[run].get("git") != runs[-1].get("git"):
            return False
        for inner in question.within():
            found = self.entry(inner.op, of_inner := inner.key())
            if found is None or found.get("run", 0) > run or not self.has(inner, of_inner, device):
                return False
        measured = {*entry.get("times", ()), *excluded}
        return _CONTEST in excluded or measured.issuperset(question.labels(device))

    def put(self, op: str, key: dict[str, Any], outcome: Outcome) -> None:
        """Write down an outcome, in the place of an earlier one."""
        for part in ("ops", "failed"):
            if (old := self.find(op, key, part)) is not None:
                self._content[part][op].remove(old)
        entry: dict[str, Any] = {"key": key}
        if outcome.times:
            entry |= {"times": {n: round(t, 2) for n, t in outcome.times.items()}, "best": outcome.best}
        if outcome.excluded:
            entry["excluded"] = outcome.excluded
        entry["run"] = len(self._content["runs"]) - 1
        part = self._content.setdefault("ops" if outcome.times else "failed", {})
        part.setdefault(op, []).append(entry)
        new = self.path.with_suffix(".new")
        # An entry a line: tables are read, compared and reviewed by people, too.
        new.write_text(_lines(self._content) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def table(self) -> _tables.Table:
        """What is measured so far, for dispatch."""
        return _tables.Table(self.path.name, _tables.parse(self._content), "nothing is measured yet")

    def entries(self) -> dict[str, list[dict[str, Any]]]:
        """The entries by operator."""
        return dict(self._content["ops"])


def _check_notes(content: dict[str, Any]) -> None:
    """Raise ValueError unless what dispatch does not read of a table is as it was written here."""
    failed = content.get("failed", {})
    lists = failed.values() if isinstance(failed, dict) else [None]
    if not all(isinstance(e, list) and all(isinstance(x, dict) and "key" in x for x in e) for e in lists):
        raise ValueError("failed: expected lists of entries by operator")
    if not isinstance(content.get("runs", []), list):
        raise ValueError("runs: expected a list")


def _lines(content: dict[str, Any]) -> str:
    """JSON with an entry, or what a run was taken on, in a line."""

    def listed(items: list[Any], indent: str) -> str:
        return "[\n" + ",\n".join(f"{indent} {json.dumps(item)}" for item in items) + f"\n{indent}]"

    parts = []
    for name, value in content.items():
        if name in ("ops", "failed"):
            ops = (f"  {json.dumps(op)}: {listed(entries, '  ')}" for op, entries in value.items() if entries)
            text = "{\n" + ",\n".join(ops) + "\n }"
        else:
            text = listed(value, " ") if isinstance(value, list) else json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def _fault(contest: Contest, rival: Rival) -> str | None:
    """What is wrong with a rival's results, or None."""
    try:
        verdict = contest.check(rival.results())
    except Exception as error:
        return one_line(error)
    off = f"{verdict.tensor} is off by {verdict.error:.3g}, bound {verdict.bound:.3g}"
    return None if verdict.green else off


def settle(contest: Contest, *, budget_s: float, cuda: bool) -> Outcome:
    """Check the rivals, time those that are right against each other, and check them again.

    Args:
        contest: who takes part.
        budget_s: seconds of timing for each.
        cuda: whether they run on a GPU.
    """
    found = {label: _fault(contest, rival) for label, rival in contest.rivals.items()}
    runs = {n: Runnable(r.step, r.context) for n, r in contest.rivals.items() if found[n] is None}
    interleave(list(runs.values()), budget_s=budget_s, cuda=cuda)
    # Once more: a race, or a workspace that one launch leaves to the next, shows in some call only.
    found |= {label: _fault(contest, contest.rivals[label]) for label in runs}
    excluded = {label: why for label, why in found.items() if why is not None}
    times = {
        label: Spread.of(run.device if cuda else run.wall).median * 1e6
        for label, run in runs.items()
        if label not in excluded
    }
    return Outcome(times, excluded)


def _answer(question: Question, args: argparse.Namespace) -> Outcome:
    cuda = args.device == "cuda"
    with question.settings():
        try:
            return settle(question.contest(args.device, args.seed), budget_s=args.seconds, cuda=cuda)
        except Exception as error:  # not enough memory for the reference, for example
            return Outcome({}, {_CONTEST: one_line(error)})


def _device_broken(cuda: bool) -> bool:
    """Whether a kernel has left the GPU unusable for this process."""
    if cuda:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune",
        description="Measure who is fastest at which sizes on this GPU, and write the table that dispatch reads.",
        epilog="exit status: 0 complete; 3 the budget is spent, run it again to go on; 1 a candidate was wrong or "
        "failed, now or when it was measured",
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only rehearses (with --out)")
    add("--out", type=Path, metavar="PATH", help="the table (default: kernels/configs/<gpu>.json)")
    add(
        "--dtype",
        action="append",
        choices=tuple(PRECISIONS),
        help="what to measure (repeatable; default: all). float32: PyTorch's own setting, TF32 in cuDNN alone; "
        "tf32, ieee: everywhere, nowhere",
    )
    add("--case", action="append", metavar="GLOB", help="sizes to measure (repeatable; default: all)")
    add("--again", action="store_true", help="measure also what the table has")
    add("--budget", type=float, default=540, metavar="S", help="seconds for this run (default 540)")
    add(
        "--seconds",
        type=float,
        default=0.1,
        metavar="S",
        help="seconds of timing per candidate (default 0.1)",
    )
    add("--seed", type=int, default=0)
    return parser


Asked = list[tuple[Question, dict[str, Any]]]


def everything(precisions: Sequence[str], patterns: list[str] | None) -> Asked:
    """All questions with their keys: real sizes first; of LSTMs, then of blocks; parts before wholes that they are in."""
    asked = [
        *tune_layers.questions(precisions, patterns),
        *tune_questions.questions(precisions, patterns),
        *tune_passes.questions(precisions, patterns),
        *tune_spectral.questions(precisions, patterns),
        *tune_blocks.questions(precisions, patterns),
    ]
    return sorted(asked, key=lambda pair: pair[0].case.name.startswith("spread-"))


def main(argv: Sequence[str], ask: Callable[..., Asked] = everything) -> int:
    """Tune.

    Args:
        argv: arguments.
        ask: gives the questions, from precisions and patterns of cases.

    Returns:
        0 when the table is complete, 3 when the budget ended before, 1 when a candidate was wrong or failed, now or when
        it was measured, 2 for a usage error.
    """
    deadline = time.perf_counter()
    args = _parser().parse_args(argv)
    deadline += args.budget
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("error: --device cuda, but PyTorch sees no CUDA device", file=sys.stderr)
        return USAGE
    if not cuda and args.out is None:
        print("error: --device cpu needs --out: dispatch on CPUs asks no table", file=sys.stderr)
        return USAGE
    here = machine.describe(args.device)
    name = here["machine"]["gpu" if cuda else "cpu"]
    path = args.out or _CONFIGS / _tables.file_name(name)
    try:
        document = Document(path, name, {**here, "command": "python -m benchmarks tune " + " ".join(argv)})
        questions = ask(args.dtype or PRECISIONS, args.case)
        if not questions:
            raise ValueError(f"no case matches {args.case}")
    except (OSError, ValueError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return USAGE
    pending = [(q, key) for q, key in questions if args.again or not document.has(q, key, args.device)]
    print(f"{name}: {len(pending)} of {len(questions)} questions to measure, at most {args.budget:.0f} s")

    done, broken = 0, False
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        announce = stack.enter_context(console.progress(len(pending)))
        for question, key in pending:
            if time.perf_counter() > deadline:
                break
            announce(question.name)
            # Stacks run on the backends that are the fastest by what is measured so far.
            with _tables.using(document.table()):
                outcome = _answer(question, args)
            document.put(question.op, key, outcome)
            done += 1
            gc.collect()
            if broken := _device_broken(cuda):
                break

    _summary(document)
    print(f"{path}: {done} measured, {len(pending) - done} left")
    if cuda and (hint := unread(path, name)):
        print(hint)
    # Of earlier runs, too: what is wrong stays wrong until it is measured again.
    errors = [
        f"{question.name}: {label}: {why}"
        for question, key in questions
        for label, why in (document.entry(question.op, key) or {}).get("excluded", {}).items()
    ]
    if broken:
        errors.append("the GPU cannot be used any more by this process; run again to go on")
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    return WRONG if errors else UNFINISHED if done < len(pending) else COMPLETE


def unread(path: Path, gpu: str) -> str | None:
    """What to do for dispatch to read this table of a GPU, or None: fuseblock may be installed from elsewhere."""
    name = _tables.file_name(gpu)
    if any((folder / name).resolve() == path.resolve() for folder in _tables.folders()):
        return None
    return f"note: dispatch does not read it there: name it {name}, and its folder in FUSEBLOCK_CONFIGS"


def _summary(document: Document) -> None:
    """Print by operator and dtype who was best how often, and what that gains over the plain rule."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for op, entries in document.entries().items():
        for entry in entries:
            kind = entry["key"]
            names = (op, *(str(kind.get(name, "")) for name in ("mode", "dtype", "tf32")))
            groups.setdefault(names, []).append(entry)
    lines = []
    for group, entries in groups.items():
        best = [entry["best"] for entry in entries]
        counts = ", ".join(f"{label} {best.count(label)}" for label in dict.fromkeys(best))
        # The plain rule takes the first that can run.
        gains = [next(iter(e["times"].values())) / e["times"][e["best"]] for e in entries]
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        lines.append(((*group, str(len(entries)), counts, f"{mean:.2f}x", f"{max(gains):.2f}x"), ""))
    head = (
        "operator",
        "mode",
        "dtype",
        "TF32 in",
        "measured",
        "best",
        "mean gain over the plain rule",
        "largest",
    )
    console.print_table("Who is fastest", head, lines)
