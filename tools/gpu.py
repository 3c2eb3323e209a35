"""The stages of tools/gpu.sh. Needs nothing but Python until a stage runs."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, TIMED_OUT, UNFINISHED, REFUSED = "passed", "failed", "timed out", "unfinished", "refused"
#: What a benchmark or the tuning returns when its time was over before its work.
EXIT_UNFINISHED = 3
#: Of a stage. A stage that is stopped has so long to write what it has.
SECONDS, GRACE = 560.0, 15.0
TIERS = ["tests/test_gpu.py", "tests/test_gpu_graphed.py", "tests/test_gpu_recurrence.py"]
NO_GPU = "PyTorch sees no NVIDIA GPU"


@dataclass(frozen=True)
class Stage:
    """One entry of the summary.

    Attributes:
        name: a stage ``a-b`` is also run by the name ``a``.
        what: for ``--list``.
        command: arguments; ``{out}`` is the folder of results, ``python`` at the beginning the running interpreter.
        tool: a program that must be on PATH or in CUDA_HOME/bin.
        gpu: whether it needs one.
        variables: of the environment.
    """

    name: str
    what: str
    command: str
    tool: str | None = None
    gpu: bool = True
    variables: tuple[tuple[str, str], ...] = ()

    def is_called(self, name: str) -> bool:
        """Whether it is run by that name."""
        return self.name == name or self.name.startswith(f"{name}-")

    def refusal(self, has_gpu: bool) -> str | None:
        """Why it cannot run here, or None."""
        if self.gpu and not has_gpu:
            return NO_GPU
        if self.tool is not None and find(self.tool) is None:
            return f"{self.tool} is not installed"
        return None

    def arguments(self, out: Path) -> list[str]:
        """What to execute."""
        programs = {"python": sys.executable, self.tool: find(self.tool) if self.tool else None}
        words = [word.replace("{out}", str(out)) for word in shlex.split(self.command)]
        return [programs.get(word) or word for word in words]


def find(program: str) -> str | None:
    """Where a program is: in CUDA's folder, or on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(program, path=f"{home}/bin") or shutil.which(program)


#: Of the files that stages are made of.
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}
#: They need more than torch and pytest, and have no tests for a GPU.
ELSEWHERE = ("tests/emulator", "tests/mutants", "tests/triton_interpreter", "tests/test_*example*")


def _pytest(name: str, arguments: str) -> str:
    return (
        f"python -m pytest -m gpu -v --tb=short -p no:cacheprovider --junitxml={{out}}/{name}.xml {arguments}"
    )


def _tests(name: str, what: str, arguments: str) -> Stage:
    workers = "-n 4" if importlib.util.find_spec("xdist") else ""
    ignored = " ".join(f"--ignore-glob='{path}'" for path in ("tests/test_gpu*", *ELSEWHERE))
    return Stage(name, what, _pytest(name, f"{workers} {ignored} {arguments}"))


def _sanitizer(tool: str) -> Stage:
    """Of the recurrence's kernels alone: all others would take hours."""
    selection = _pytest(f"sanitize-{tool}", "tests/test_gpu_recurrence.py -k test_small_sizes")
    return Stage(
        f"sanitize-{tool}",
        f"compute-sanitizer's {tool} on the recurrence's kernels, small sizes",
        f"compute-sanitizer --tool {tool} --kernel-name kns=lstm_ --error-exitcode 9 {selection}",
        tool="compute-sanitizer",
        # One allocation of the driver for each tensor, so that accesses beyond one are seen.
        variables=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def _bench(suite: str, kind: str) -> Stage:
    name = f"bench-{suite}-{kind}"
    dtype = "--dtype float32 --tf32" if kind == "tf32" else f"--dtype {kind}"
    # Of blocks, both layouts and CUDA graphs: what their bars compare.
    names = ("fuseblock",) if suite == "lstm" else ("fuseblock", "*:channels-last", "*:graphed", "copy")
    providers = " ".join(f"--providers '{name}'" for name in names)
    return Stage(
        name,
        f"the {suite} suite in {kind} against PyTorch",
        f"python -m benchmarks --device cuda --suite {suite} {dtype} {providers} --budget 0.3"
        f" --limit {SECONDS - 30:.0f} --json {{out}}/{name}.json --html {{out}}/{name}.html",
    )


STAGES = (
    Stage("build", "compile the library", "python setup.py -q build_ext --inplace", gpu=False),
    Stage("env", "versions, devices, who can run what", "python -m fuseblock env", gpu=False),
    Stage(
        "test-recurrence",
        "graphs, streams, limits; every tier of the recurrence",
        _pytest("test-recurrence", " ".join(TIERS)),
    ),
    _tests(
        "test-cuda",
        "the operators' tests on CUDA C++ kernels",
        "-k 'not triton'",
    ),
    _tests("test-triton", "the operators' tests on Triton kernels", "-k triton"),
    *map(_sanitizer, ("memcheck", "racecheck", "synccheck")),
    Stage(
        "micro",
        "barriers, exchanges, gathers, products: what the design assumed",
        "python -m benchmarks.micro --json {out}/micro.json",
    ),
    # Before the suites: without a table, LSTM layers are PyTorch's own.
    Stage(
        "tune",
        "the table that dispatch reads, kernels/configs/<gpu>.json",
        "python -m benchmarks tune --budget 540",
    ),
    *(_bench("lstm", kind) for kind in ("bfloat16", "float16", "tf32")),
    *(_bench("gan", kind) for kind in ("bfloat16", "tf32")),
)


@dataclass
class State:
    """How a stage ended, and of what `sources`."""

    state: str
    seconds: float = 0.0
    reason: str = ""
    sources: str = ""


def sources(root: Path = ROOT) -> str:
    """A digest of the files that stages are made of: what has passed with others says nothing about these."""
    rooms = ("benchmarks", "csrc", "kernels", "python", "tests", "tools")
    files = [file for room in rooms for file in (root / room).rglob("*") if file.suffix in SUFFIXES]
    digest = hashlib.sha256()
    for file in sorted({*files, root / "setup.py", root / "pyproject.toml"}):
        if file.is_file():
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class States:
    """How the stages ended, in ``OUT/stages.json``; ``sources``: of those that run now."""

    def __init__(self, out: Path, sources: str) -> None:
        self._path, self.sources = out / "stages.json", sources
        found = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.of = {name: State(**state) for name, state in found.items()}

    def has_passed(self, stage: Stage) -> bool:
        """With the present sources."""
        state = self.of.get(stage.name)
        return state is not None and state.state == PASSED and state.sources == self.sources

    def note(self, stage: Stage, state: State) -> None:
        """Remember, on disk too."""
        state.sources = self.sources
        self.of[stage.name] = state
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({name: vars(s) for name, s in self.of.items()}, indent=1) + "\n")
        os.replace(new, self._path)  # whole, whenever this script is stopped


def _environment(stage: Stage) -> dict[str, str]:
    path = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **dict(stage.variables)}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the stage and what it started to end, then make them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def _hear_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so would a stage."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def execute(stage: Stage, out: Path, seconds: float = SECONDS) -> State:
    """Run a stage; what it prints goes to ``OUT/<stage>.log``."""
    begin = time.monotonic()
    with open(out / f"{stage.name}.log", "wb") as log:
        process = subprocess.Popen(
            stage.arguments(out),
            cwd=ROOT,
            env=_environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return State(TIMED_OUT, time.monotonic() - begin, f"stopped after {seconds:.0f} s")
        except BaseException:
            _stop(process)
            raise
    state = {0: PASSED, EXIT_UNFINISHED: UNFINISHED}.get(code, FAILED)
    return State(state, time.monotonic() - begin, "" if code == 0 else f"exit status {code}")


def link_kernels() -> None:
    """kernels/ is fuseblock.kernels once the package is installed; a link serves the same without."""
    link = ROOT / "python" / "fuseblock" / "kernels"
    if importlib.util.find_spec("fuseblock") is None and not link.exists():
        link.symlink_to(Path("..", "..", "kernels"))


def has_gpu() -> bool:
    """Whether the torch that stages import sees a GPU."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def _excerpt(log: Path, state: State) -> list[str]:
    """The end of a log; of a failure more, and before it the lines with errors, which compilers bury."""
    lines = log.read_text(errors="replace").splitlines()
    if state.state == PASSED:
        return lines[-10:]
    errors = [line[:300] for line in lines[:-40] if re.search(r"\berror\b", line, re.IGNORECASE)]
    return [*errors[:20], *lines[-40:]]


def run(stage: Stage, states: States, out: Path, gpu: bool) -> State:
    """Run a stage if it can run here, and tell."""
    refusal = stage.refusal(gpu)
    if refusal is not None:
        state = State(REFUSED, reason=refusal)
    else:
        print(f"{stage.name}: {stage.what} (log: {out / stage.name}.log)", flush=True)
        state = execute(stage, out)
        print("\n".join(_excerpt(out / f"{stage.name}.log", state)), flush=True)
    states.note(stage, state)
    return state


def summary(states: States, stages: Sequence[Stage]) -> str:
    """A line for each stage, those of earlier calls too."""
    width = max(len(stage.name) for stage in stages)
    lines = []
    for stage in stages:
        state = states.of.get(stage.name, State("not run", sources=states.sources))
        took = f"{state.seconds:6.0f} s" if state.seconds else " " * 8
        other = "" if state.sources == states.sources else f"with other sources, {state.sources or 'unknown'}"
        reason = ", ".join(filter(None, (state.reason, other)))
        lines.append(f"{stage.name:<{width}}  {state.state:<10} {took}  {reason}".rstrip())
    return "\n".join([f"sources {states.sources}", *lines])


def chosen(names: Sequence[str], states: States, stages: Sequence[Stage]) -> list[Stage]:
    """The stages named, or all that have not passed with the present sources; and the first one before any other.

    The first is the build: it is quick where nothing has changed, and what passed before may lack its library now.

    Raises:
        ValueError: no stage has that name.
    """
    for name in names:
        if not any(stage.is_called(name) for stage in stages):
            raise ValueError(f"no stage is called {name}: {', '.join(stage.name for stage in stages)}")
    wanted = [
        stage
        for stage in stages
        if any(map(stage.is_called, names)) or (not names and not states.has_passed(stage))
    ]
    return [stages[0], *(stage for stage in wanted if stage is not stages[0])]


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run stages.

    Returns:
        0; 1 if a stage did not pass; 2 for a usage error, or if nothing failed but there is no GPU.
    """
    parser = argparse.ArgumentParser(prog="sh tools/gpu.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("out/gpu"), metavar="OUT")
    parser.add_argument(
        "stage", nargs="*", metavar="STAGE", help="default: all that have not passed with these sources"
    )
    parser.add_argument("--list", action="store_true", help="print the stages and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{stage.name:<20} {stage.what}" for stage in stages))
        return 0
    if not args.stage and any(stage.is_called(str(args.out)) for stage in stages):
        print(f"error: the folder comes first: sh tools/gpu.sh out/gpu {args.out}", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    states = States(out, sources())
    try:
        build, *others = chosen(args.stage, states, stages)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    link_kernels()
    results = [run(build, states, out, False)]
    if results[0].state == PASSED:
        gpu = has_gpu()
        results += [run(stage, states, out, gpu) for stage in others]
    print(f"\n{summary(states, stages)}")
    if any(result.state in (FAILED, TIMED_OUT, UNFINISHED) for result in results):
        return 1
    return 2 if any(result.reason == NO_GPU for result in results) else 0


def stop_as_by_ctrl_c() -> None:
    """Whoever ends this script, or the connection that it was started over, ends what it started, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    stop_as_by_ctrl_c()
    sys.exit(main())
