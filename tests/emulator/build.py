"""Builds programs and Python modules from the CUDA sources with g++ and the emulator's runtime.

What is built lies under build/emulator in a folder named by a hash of every file that may have gone into it. Objects are
named by what the preprocessor made of their source, so an edited header costs only what includes it. Nothing is ever
stale, nothing is compiled twice, and what nobody has used for a day is deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).resolve().parent / "runtime"
CACHE = ROOT / "build" / "emulator"
OBJECTS = CACHE / "objects"
KEPT_SECONDS = 24 * 3600.0

#: Compiler flags of a variant, and the definition that tells the (uninstrumented) runtime about it.
VARIANTS = {
    # An access that the hardware would refuse as misaligned traps.
    "plain": (["-O2", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"], []),
    "asan": (["-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"], ["-DCUDA_EMULATOR_ASAN"]),
    "tsan": (["-O1", "-g1", "-fsanitize=thread"], ["-DCUDA_EMULATOR_TSAN"]),
    # The calls before every access, which the runtime answers itself: see counting.h.
    "counted": (["-O1", "-fsanitize=thread"], ["-DCUDA_EMULATOR_COUNTED"]),
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
    name: str,
    sources: Sequence[Path],
    *,
    binding: Path | None = None,
    variant: str = "plain",
    defines: Sequence[str] = (),
) -> Path:
    """Compile sources and runtime into a program called ``name``, or with a binding into a Python module; its path.

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
    runtime = [*common, "-O2", *runtime_flags]
    commands = [(kernel, file) for file in sources]
    commands += [(runtime, file) for file in sorted(RUNTIME.glob("*.cpp"))]
    if binding is not None:
        try:
            import pybind11
        except ImportError as error:
            raise Unavailable("pybind11 is not installed") from error
        kernel.append("-fvisibility=hidden")
        # It holds no kernels: without optimisation and instruments it takes half the time, and serves all variants.
        headers = (pybind11.get_include(), sysconfig.get_path("include"))
        host = [*common, "-O0", "-fvisibility=hidden", "-DFUSEBLOCK_EMULATE_CUDA"]
        host += [*(f"-D{define}" for define in defines), *(f"-isystem{folder}" for folder in headers)]
        # Last: of an inline function in several objects, the linker takes the first.
        commands.append((host, binding))

    files = [file for _, file in commands]
    rooms = {ROOT / "csrc" / "cuda", ROOT / "csrc" / "math", *(file.parent for file in files)}

    def current() -> Path:
        around = sorted(file for room in rooms for file in room.glob("*.[hc]*"))
        parts = [word for command, file in commands for word in (*command, str(file))]
        return CACHE / f"{name}-{variant}-{_digest(parts, around)}"

    folder = current()
    suffix = "" if binding is None else sysconfig.get_config_var("EXT_SUFFIX")
    target = folder / f"{name}{suffix}"
    OBJECTS.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        _prune()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            texts = list(pool.map(lambda pair: _run([*pair[0], "-x", "c++", "-E", str(pair[1])]), commands))
            if current() != folder:  # edited since its name was made
                return build(name, sources, binding=binding, variant=variant, defines=defines)
            objects = list(pool.map(lambda pair, text: _compile(pair[0], text), commands, texts))
        sanitize = [flag for flag in kernel_flags if flag.startswith("-fsanitize") and variant != "counted"]
        link = [
            gxx,
            # The emulated CUDA runtime of this module wins over a real one that torch may have loaded.
            *([] if binding is None else ["-shared", "-Wl,-Bsymbolic"]),
            *sanitize,
            *objects,
            "-lpthread",
            "-o",
            f"{target}.new",
        ]
        _run(link)
        os.replace(f"{target}.new", target)
    return target


def _compile(command: list[str], text: str) -> str:
    """The object of a preprocessed source. Whoever compiles the same at the same time puts the same in its place."""
    # What only the preprocessor reads would give the same object other names.
    command = [word for word in command if not word.startswith(("-D", "-I", "-isystem"))]
    target = OBJECTS / f"{hashlib.sha256(chr(0).join([*command, text]).encode()).hexdigest()[:16]}.o"
    if target.exists():
        os.utime(target)
    else:
        new = target.with_suffix(f".{os.getpid()}")
        _run([*command, "-x", "c++-cpp-output", "-c", "-", "-o", str(new)], text)
        os.replace(new, target)
    return str(target)


def _prune() -> None:
    """Delete what was last used, or is left of a compiler that was stopped, more than a day ago."""
    for path in [*CACHE.glob("*-*"), *OBJECTS.iterdir()]:
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            if path.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(command: list[str], text: str | None = None) -> str:
    """What the compiler wrote to its standard output."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
