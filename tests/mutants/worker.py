"""Runs pytest in forks of a process that has imported everything but the project: a script, not a module.

    python worker.py <workspace>

It reads one request per line, {"stages": [[pytest arguments], ...], "environment": {...}, "limit": seconds, "cache": bool},
and answers with one line, {"outcome": "passed" | "failed" | "crashed" | "timed out", "seconds": ..., "by": "..."}. A fork
starts in milliseconds, where a fresh interpreter needs seconds to import PyTorch. Bytecode is written on request only: a
mutant that is as long as the original and a moment younger would otherwise be taken for it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

WORKSPACE = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path()


def enter_workspace() -> None:
    os.chdir(WORKSPACE)
    # The script's own folder would shadow other modules; the workspace must come before an editable install.
    sys.path[:] = [str(WORKSPACE / "python"), str(WORKSPACE), *sys.path[1:]]


def imported_by_the_project() -> list[str]:
    """The modules that `import fuseblock` loads, told by a fork so that this process stays without the project."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        import fuseblock  # noqa: F401

        with os.fdopen(writing, "w") as pipe:
            json.dump(
                [name for name in sys.modules if name.split(".")[0] not in ("fuseblock", "tests")], pipe
            )
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.wait()
    return json.loads(text or "[]")


def warm_up() -> None:
    for name in ["torch", "numpy", "pytest", *imported_by_the_project(), "greenlet", "triton", "hypothesis"]:
        try:
            importlib.import_module(name)
        except Exception:  # whatever cannot be imported here is left to the tests, which then skip or fail
            continue


def run_tests(request: dict) -> int:
    """In the fork: the status that pytest ends with, 1 if the project cannot be imported."""
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = not request["cache"]
    import pytest

    import fuseblock

    if not Path(fuseblock.__file__).is_relative_to(WORKSPACE):
        print("NOT THE WORKSPACE", fuseblock.__file__)
        return 3
    common = [
        "-x",
        "-q",
        "--tb=line",
        "-rfE",
        "--no-header",
        "-p",
        "no:cacheprovider",
        f"--rootdir={WORKSPACE}",
    ]
    for stage in request["stages"]:
        if status := int(pytest.main([*common, *stage])):
            return status
    return 0


def answer(request: dict) -> dict:
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                status = run_tests(request)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        outcome = waited(child, request["limit"])
        output.seek(0)
        text = output.read()
    if outcome == "failed" and "NOT THE WORKSPACE" in text:
        outcome = "misplaced"
    # pytest -x names the one test that failed; without one, the last line says what went wrong.
    lines = [line for line in text.splitlines() if line.strip()]
    by = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "")
    result = {"outcome": outcome, "seconds": round(time.monotonic() - started, 3), "by": by[:300]}
    return result if outcome == "passed" else result | {"output": text[-3000:]}


def waited(child: int, limit: float) -> str:
    """How the child ended. Time in which this process was suspended, with its children, does not count."""
    spent, last = 0.0, time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if os.WIFSIGNALED(status):
                return "crashed"
            return "passed" if os.WEXITSTATUS(status) == 0 else "failed"
        if spent > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timed out"
        time.sleep(0.01)
        now = time.monotonic()
        spent, last = spent + min(now - last, 1.0), now


def main() -> None:
    enter_workspace()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    warm_up()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
