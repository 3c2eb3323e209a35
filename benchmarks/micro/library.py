"""The microbenchmarks' kernels as functions: compiled by nvcc for the GPU at hand, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SOURCES = tuple(sorted(FOLDER.glob("*.cu")))


class UnavailableError(Exception):
    """The kernels cannot be compiled here: says what is missing."""


class Residency(ctypes.Structure):
    """``fuseblock::Residency``: blocks that run at the same time, or why none does."""

    _fields_ = (("blocks", ctypes.c_int), ("refusal", ctypes.c_char_p))


class Launch(ctypes.Structure):
    """``MicroLaunch`` of micro.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("blocks", "threads", "cluster", "shared_bytes", "rounds")),
        ("bytes", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("source", "result", "workspace", "clocks", "resident", "stream")
        ),
    )


#: Calls a function of the library: (function, launch) -> cudaError_t.
Call = Callable[[Any, Launch], int]


def _call(function: Any, launch: Launch) -> int:
    error: int = function(ctypes.byref(launch))
    return error


class Library:
    """The functions of a compiled library.

    Args:
        path: the shared library.
        call: how its functions are called.
    """

    def __init__(self, path: Path, call: Call = _call) -> None:
        self._library = ctypes.CDLL(str(path))
        self._call = call

    def _function(self, kernel: str) -> Any:
        return getattr(self._library, f"micro_{kernel}")

    def launch(self, kernel: str, launch: Launch) -> None:
        """Launch ``kernel``.

        Raises:
            RuntimeError: the runtime refused; the message has the number of its error.
        """
        if error := self._call(self._function(kernel), launch):
            raise RuntimeError(f"{kernel}: cudaError {error}")

    def resident(self, kernel: str, *, threads: int, cluster: int, shared_bytes: int) -> tuple[int, str]:
        """Blocks of ``kernel`` that run at the same time; if none does, 0 and the reason."""
        found = Residency()
        sizes = {"threads": threads, "cluster": cluster, "shared_bytes": shared_bytes}
        self.launch(kernel, Launch(resident=ctypes.addressof(found), **sizes))
        return found.blocks, (found.refusal or b"").decode()


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    found = shutil.which("nvcc", path=places)
    if found is None:
        raise UnavailableError("nvcc was not found (no CUDA_HOME, not on PATH)")
    return found


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc calls the machine code of a device; sm_90's own features (multicast) need the suffix."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if major == 9 else "")


def build(capability: tuple[int, int]) -> Path:
    """Compile the kernels for a device; kept under build/micro and compiled again when anything changes.

    Raises:
        UnavailableError: there is no nvcc.
        RuntimeError: it failed; the message holds its output.
    """
    flags = [f"-arch=sm_{architecture(capability)}", "-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{FOLDER}", "-Xptxas=--warn-on-spills,--warning-as-error"]
    command = [_nvcc(), *flags, *map(str, SOURCES)]
    digest = hashlib.sha256("\0".join(command).encode())
    for file in sorted([*FOLDER.glob("*.[hc]*"), *(ROOT / "csrc" / "cuda").glob("*.h")]):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    target = ROOT / "build" / "micro" / f"micro-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        os.replace(new, target)
    return target
