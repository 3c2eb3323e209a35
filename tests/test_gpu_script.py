"""tools/gpu.sh: stages that pass are not run again, none can take the others with it, and all say why they cannot run."""

from __future__ import annotations

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from .benchmarks_package import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "tools" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _has_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "has_gpu", lambda: True)


def stage(script: ModuleType, name: str, code: str, **options):
    return script.Stage(name, "for a test", f'python -S -c "{code}"', **options)


def stages_of(script: ModuleType, **others: str) -> tuple:
    """A build and others, which count in a file of their name how often they ran."""
    count = "open('{{out}}/{name}.ran', 'a').write('x'); {code}"
    named = {"build": "pass", **others}
    return tuple(
        stage(script, name, count.format(name=name, code=code), gpu=name != "build")
        for name, code in named.items()
    )


def ran(out: Path, name: str) -> int:
    file = out / f"{name}.ran"
    return len(file.read_text()) if file.exists() else 0


def states(out: Path) -> dict[str, str]:
    return {name: state["state"] for name, state in json.loads((out / "stages.json").read_text()).items()}


def test_what_passed_is_not_run_again(script: ModuleType, tmp_path: Path, capsys) -> None:
    stages = stages_of(script, first="print('hello')", second="import sys; sys.exit(5)", third="pass")
    assert script.main([str(tmp_path)], stages) == 1
    assert states(tmp_path) == {"build": "passed", "first": "passed", "second": "failed", "third": "passed"}
    assert (tmp_path / "first.log").read_text() == "hello\n"
    assert "second  failed" in capsys.readouterr().out

    repaired = stages_of(script, first="pass", second="pass", third="pass")
    assert script.main([str(tmp_path)], repaired) == 0
    assert set(states(tmp_path).values()) == {"passed"}
    assert [ran(tmp_path, name) for name in ("build", "first", "second", "third")] == [2, 1, 2, 1]
    assert script.main([str(tmp_path)], repaired) == 0
    assert [ran(tmp_path, name) for name in ("build", "first", "second", "third")] == [3, 1, 2, 1]


def test_what_passed_with_other_sources_is_run_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stages = stages_of(script, first="pass", second="pass")
    monkeypatch.setattr(script, "sources", lambda: "before")
    assert script.main([str(tmp_path)], stages) == 0
    monkeypatch.setattr(script, "sources", lambda: "now")
    capsys.readouterr()
    assert script.main([str(tmp_path), "second"], stages) == 0
    told = capsys.readouterr().out
    assert "sources now" in told
    assert any(
        line.startswith("first") and line.endswith("with other sources, before") for line in told.splitlines()
    )
    assert [ran(tmp_path, name) for name in ("first", "second")] == [1, 2]
    assert script.main([str(tmp_path)], stages) == 0
    assert "other sources" not in capsys.readouterr().out
    assert [ran(tmp_path, name) for name in ("first", "second")] == [2, 2]


def test_sources_are_what_stages_are_made_of(script: ModuleType, tmp_path: Path) -> None:
    room = tmp_path / "csrc" / "cuda"
    room.mkdir(parents=True)
    (room / "a.cuh").write_text("a")
    before = script.sources(tmp_path)
    (room / "a.o").write_text("built")
    assert script.sources(tmp_path) == before
    for change in (
        lambda: (room / "a.cuh").write_text("b"),
        lambda: (room / "a.cuh").rename(room / "b.cuh"),
        lambda: (tmp_path / "setup.py").touch(),
    ):
        change()
        now = script.sources(tmp_path)
        assert now != before
        before = now


def test_named_stages_run_whatever_passed(script: ModuleType, tmp_path: Path, capsys) -> None:
    stages = stages_of(script, **{"test-a": "pass", "test-b": "pass", "tests": "pass"})
    for _ in range(2):
        assert script.main([str(tmp_path), "test"], stages) == 0
    assert [ran(tmp_path, name) for name in ("build", "test-a", "test-b", "tests")] == [2, 2, 2, 0]
    assert "tests   not run" in capsys.readouterr().out
    assert script.main([str(tmp_path), "test-b", "build"], stages) == 0
    assert [ran(tmp_path, name) for name in ("build", "test-a", "test-b")] == [3, 2, 3]
    assert script.main([str(tmp_path), "nothing"], stages) == 2
    assert "no stage is called nothing: build, test-a, test-b, tests" in capsys.readouterr().err


def test_nothing_runs_without_the_build(script: ModuleType, tmp_path: Path) -> None:
    build, other = stages_of(script, other="pass")
    broken = stage(script, "build", "raise SystemExit(1)", gpu=False)
    assert script.main([str(tmp_path)], (broken, other)) == 1
    assert states(tmp_path) == {"build": "failed"}
    assert ran(tmp_path, "other") == 0


def test_stages_are_stopped_with_all_that_they_started(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT first, for what has results to write; then SIGKILL."""
    monkeypatch.setattr(script, "GRACE", 1.0)
    polite = (
        "import time\ntry:\n  print('at work', flush=True)\n  time.sleep(60)\n"
        "except KeyboardInterrupt:\n  print('written')"
    )
    started = tmp_path / "started"
    deaf = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"open('{started}', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-S', '-c', {deaf!r}])"
    )
    for name, code in {"polite": polite, "deaf": deaf, "parent": parent.replace('"', r"\"")}.items():
        begin = time.monotonic()
        started.unlink(missing_ok=True)
        state = script.execute(stage(script, name, code), tmp_path, seconds=1.0)
        assert state.state == "timed out", name
        assert time.monotonic() - begin < 10
    pid = int(started.read_text())
    for _ in range(50):  # whoever adopts it may take a moment to notice
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the stage started still runs")
    assert (tmp_path / "polite.log").read_text().splitlines()[:2] == ["at work", "written"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ending_the_script_ends_the_stage(number: signal.Signals, tmp_path: Path) -> None:
    started, done = tmp_path / "started", tmp_path / "done"
    work = (
        f"import time, pathlib\ntry:\n  pathlib.Path(r'{started}').touch()\n  time.sleep(60)\n"
        f"finally:\n  pathlib.Path(r'{done}').touch()"
    )
    code = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu; "
        f"gpu.stop_as_by_ctrl_c(); stage = gpu.Stage('a', '', {'python -S -c ' + shlex.quote(work)!r}); "
        f"gpu.execute(stage, Path({str(tmp_path)!r}))"
    )

    def hear() -> None:
        signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup

    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=hear) as process:
        while not started.exists():
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(30)
    assert done.exists()


def test_a_stage_is_no_folder(script: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    stages = stages_of(script, **{"test-a": "pass"})
    for name in ("build", "test"):
        assert script.main([name], stages) == 2
        assert f"the folder comes first: sh tools/gpu.sh out/gpu {name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unfinished_work_is_no_success(script: ModuleType, tmp_path: Path) -> None:
    stages = stages_of(script, tune="raise SystemExit(3)")
    assert script.main([str(tmp_path)], stages) == 1
    assert states(tmp_path)["tune"] == "unfinished"


def test_refusals(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A missing tool is no failure; a missing GPU is what the whole script is for."""
    build = stages_of(script)[0]
    sanitizer = stage(script, "sanitize", "pass", tool="no-such-tool")
    assert script.main([str(tmp_path)], (build, sanitizer)) == 0
    assert "sanitize refused no-such-tool is not installed" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    assert script.main([str(tmp_path)], (build, stage(script, "micro", "pass"))) == 2
    assert "micro refused PyTorch sees no NVIDIA GPU" in " ".join(capsys.readouterr().out.split())
    assert states(tmp_path) == {"build": "passed", "sanitize": "refused", "micro": "refused"}


def test_the_stages_themselves(script: ModuleType, tmp_path: Path) -> None:
    """Their commands name files and options that exist; all but the build and a report need a GPU."""
    assert [s.name for s in script.STAGES if not s.gpu] == ["build", "env"]
    cli = load("cli")
    for entry in script.STAGES:
        program, *arguments = entry.arguments(tmp_path)
        assert Path(program).name in (Path(sys.executable).name, "compute-sanitizer")
        for word in arguments:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word
        if arguments[:2] == ["-m", "benchmarks"] and arguments[2] != "tune":
            parsed = cli._parser().parse_args(arguments[2:])
            assert parsed.limit < script.SECONDS and parsed.json.name == f"{entry.name}.json"
        if entry.name == "tune":
            assert load("tune")._parser().parse_args(arguments[3:]).budget < script.SECONDS
    names = [s.name for s in script.STAGES]
    assert names.index("tune") < names.index("bench-lstm-bfloat16"), "dispatch asks for what was measured"


def test_the_shell_script_lists_the_stages(script: ModuleType) -> None:
    command = ["sh", str(ROOT / "tools" / "gpu.sh"), "--list"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHON": sys.executable}, cwd="/"
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [s.name for s in script.STAGES]
