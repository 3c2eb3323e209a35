"""Builds programs and Python modules from the CUDA sources with g++ and the emulator's runtime.

What is built lies under build/emulator in a folder named by a hash of everything that went into it, so nothing is ever
stale and nothing is built twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).resolve().parent / "runtime"
CACHE = ROOT / "build" / "emulator"

#: Compiler flags of a variant, and the definition that tells the (uninstrumented) runtime about it.
VARIANTS = {
    # An access that the hardware would refuse as misaligned traps.
    "plain": (["-O2", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"], []),
    "asan": (["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"], ["-DCUDA_EMULATOR_ASAN"]),
    "tsan": (["-O1", "-g", "-fsanitize=thread"], ["-DCUDA_EMULATOR_TSAN"]),
}


class Unavailable(Exception):
    """The emulator cannot be built here: says what is missing."""


def _cuda_include() -> Path:
    """CUDA's headers: types and conversions of 16-bit floats come from there."""
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
        output = dryrun.stderr + dryrun.stdout
        candidates += [
            Path(line.split("TOP=", 1)[1].strip()) for line in output.splitlines() if "TOP=" in line
        ]
    candidates.append(Path("/usr/local/cuda"))
    for home in candidates:
        if (home / "include" / "cuda_bf16.h").exists():
            return (home / "include").resolve()
    raise Unavailable("the CUDA headers were not found (no CUDA_HOME, no nvcc on PATH)")


def _digest(parts: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build(
    name: str, sources: Sequence[Path], *, module: bool, variant: str = "plain", defines: Sequence[str] = ()
) -> Path:
    """Compile sources and runtime into a Python module or a program called ``name``; its path.

    Raises:
        Unavailable: no g++, no CUDA headers or, for modules, no pybind11.
        RuntimeError: the compiler failed; the message holds its output.
    """
    gxx = shutil.which("g++")
    if gxx is None:
        raise Unavailable("g++ was not found")
    kernel_flags, runtime_flags = VARIANTS[variant]
    common = [gxx, "-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-isystem{_cuda_include()}"]
    common += [f"-I{ROOT / 'csrc'}", f"-I{RUNTIME}"]
    kernel = [*common, *kernel_flags, "-DFUSEBLOCK_EMULATE_CUDA", *(f"-D{define}" for define in defines)]
    if module:
        try:
            import pybind11
        except ImportError as error:
            raise Unavailable("pybind11 is not installed") from error
        python = sysconfig.get_path("include")
        kernel += ["-fvisibility=hidden", f"-isystem{pybind11.get_include()}", f"-isystem{python}"]
    runtime = [*common, "-O2", *runtime_flags]

    headers = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "math").iterdir(), *RUNTIME.iterdir()]
    folder = CACHE / f"{name}-{variant}-{_digest([*kernel, *runtime], sorted([*headers, *sources]))}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX") if module else ""
    target = folder / f"{name}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        commands, objects = [], []
        for command, files in ((kernel, sources), (runtime, sorted(RUNTIME.glob("*.cpp")))):
            for file in files:
                objects.append(str(folder / f"{file.name}.o"))
                commands.append([*command, "-x", "c++", "-c", str(file), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        sanitize = [flag for flag in kernel_flags if flag.startswith("-fsanitize")]
        link = [
            gxx,
            # The emulated CUDA runtime of this module wins over a real one that torch may have loaded.
            *(["-shared", "-Wl,-Bsymbolic"] if module else []),
            *sanitize,
            *objects,
            "-lpthread",
            "-o",
            f"{target}.new",
        ]
        _run(link)
        os.replace(f"{target}.new", target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
