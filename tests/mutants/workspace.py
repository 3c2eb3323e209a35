"""A private copy of what the tests need, in which mutants are applied; the working tree is only read."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .sources import ROOT, Source
from .switches import DEFINITION

_BUILD_LIMIT = 1200.0
_COPIED = ("csrc", "kernels", "python/fuseblock", "tests")
_SOURCES = (".py", ".h", ".cpp", ".cuh", ".cu")


_ONE_TABLE = """#include "kernel_table.h"
namespace fuseblock::cpu {{
extern const KernelTable kernels_{isa};
const KernelTable* kernel_table() {{ return &kernels_{isa}; }}
}}  // namespace fuseblock::cpu
"""


class Workspace:
    """A copy of the project for one kit, and a process that runs tests in it."""

    def __init__(self, folder: Path, kit: str) -> None:
        self.folder, self.kit = folder.resolve(), kit
        self._worker: subprocess.Popen[str] | None = None
        files = self._files()
        for top in _COPIED:
            for path in (self.folder / top).rglob("*"):
                if path.suffix in _SOURCES and str(path.relative_to(self.folder)) not in files:
                    path.unlink()  # gone from the working tree
        for name, content in files.items():
            file = self.folder / name
            # Files that are there already keep their times, so that what was compiled from them stays current.
            if not file.exists() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        kernels = self.folder / "python/fuseblock/kernels"
        if not kernels.exists():
            # Where an installation has them; the finder of an editable install would look in the working tree.
            kernels.symlink_to(self.folder / "kernels")

    def _files(self) -> dict[str, bytes]:
        """What the copy consists of, by name."""
        found = [ROOT / "setup.py", ROOT / "pyproject.toml"]
        for name in _COPIED:
            found += [path for path in (ROOT / name).rglob("*") if path.is_file()]
        files = {}
        for path in found:
            left_out = path.suffix in (".so", ".pyc") or path.name in ("introspect.cpp", "_build.json")
            if not left_out and path.parent != Path(__file__).parent:
                files[str(path.relative_to(ROOT))] = path.read_bytes()

        def replace(name: str, old: str, new: str) -> None:
            text = files[name].decode()
            assert old in text, f"{name} has changed: {old!r} is not in it"
            files[name] = text.replace(old, new).encode()

        library = ROOT / "python/fuseblock/_C.abi3.so"
        if self.kit == "cpu":
            # One instruction set, and little optimisation: compiling is what takes the time. Multiplications and
            # additions are fused where possible, since the error bounds of the tests count on it. What is written
            # behind an array of the stack is noticed.
            usual = "avx2" if platform.machine() == "x86_64" else "baseline"
            isa = os.environ.get("FUSEBLOCK_CPU_ISA") or usual
            others = {f"csrc/cpu/isa_{other}.cpp" for other in ("avx512", "avx2", "baseline") if other != isa}
            files = {name: content for name, content in files.items() if name not in others}
            files["csrc/cpu/kernel_table.cpp"] = _ONE_TABLE.format(isa=isa).encode()
            flags = "-std=c++20 -O1 -fexpensive-optimizations -fstack-protector-strong -fno-math"
            replace("setup.py", "-std=c++20 -O3 -fno-math", flags)
            files["csrc/cpu/mutants.cpp"] = DEFINITION.encode()
        elif library.exists():
            files["python/fuseblock/_C.abi3.so"] = library.read_bytes()
        if self.kit == "emulator":
            # An index outside of an array traps here, for the AddressSanitizer builds that the slow tests run. Python's
            # headers, which the bindings include, have arrays that are longer than they say.
            replace("tests/emulator/build.py", '"plain": (["-O2", ', '"plain": (["-O1", ')
            bounds = '[([*kernel, *["-fsanitize=bounds-strict"] * (file.suffix == ".cu")], file)'
            replace("tests/emulator/build.py", "[(kernel, file)", bounds)
            files["csrc/cuda/mutants.cu"] = DEFINITION.encode()
        return files

    def read(self, path: str) -> str:
        return (self.folder / path).read_text()

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.write_text(text)
        if path.endswith(".py"):
            Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)

    def restore(self, path: str) -> None:
        self.write(path, (ROOT / path).read_text())

    def build(self, source: Source) -> str | None:
        """Compile what the tests of a source need. None, or the compiler's messages if it fails."""
        if self.kit == "emulator" and source.tiers:
            load = f"from tests.emulator import load_recurrence; list(map(load_recurrence, {source.tiers}))"
            command = [sys.executable, "-c", load]
        elif self.kit == "emulator":
            program = "from tests.emulator.test_emulator import program; program('plain')"
            command = [sys.executable, "-c", f"from tests.emulator import load; load(); {program}"]
        elif self.kit == "cpu":
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        else:
            return None
        environment = self._environment() | {"FUSEBLOCK_BUILD_CUDA": "0", "MAX_JOBS": "1"}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=_BUILD_LIMIT
        )
        return done.stdout + done.stderr if done.returncode else None

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.folder / "python"), str(self.folder)]),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        }

    def test(
        self,
        stages: tuple[tuple[str, ...], ...],
        limit: float,
        environment: dict[str, str] | None = None,
        cache: bool = False,
    ) -> dict[str, Any]:
        """Run pytest in the copy; see worker.py for the answer."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), str(self.folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment(),
            )  # fmt: skip
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        request = {"stages": stages, "limit": limit, "environment": environment or {}, "cache": cache}
        print(json.dumps(request), file=self._worker.stdin, flush=True)
        line = self._worker.stdout.readline()
        return json.loads(line) if line else {"outcome": "crashed", "seconds": 0.0, "by": "the worker died"}

    def close(self) -> None:
        if self._worker is not None and self._worker.poll() is None:
            assert self._worker.stdin is not None
            self._worker.stdin.close()
            self._worker.wait()
        self._worker = None


def errors_of(messages: str) -> str:
    return "\n".join(re.findall(r"^.*error.*$", messages, re.MULTILINE)[:5])


def stages_for(source: Source, operator: str) -> tuple[tuple[str, ...], ...]:
    return source.barrier_stages if operator == "barrier" and source.barrier_stages else source.stages
