"""Builds fuseblock: pure Python packages, the native library and, in the tree only, its introspection module.

fuseblock/_C.abi3.so         CPU and CUDA kernels behind PyTorch's stable ABI: one binary for torch >= 2.11, any Python
fuseblock/_introspect.*.so   pybind11, for `python setup.py build_ext --inplace` and editable installs
fuseblock/_build.json        compilers, flags, and registers and spills of every CUDA kernel, or why there is no library

Environment: FUSEBLOCK_BUILD_NATIVE and FUSEBLOCK_BUILD_CUDA (auto, 0 or 1; 1 turns "not found" into an error), CUDA_HOME,
CXX and MAX_JOBS. Objects are kept under build/native and rebuilt when a source, a header or the command changes.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "native"
MINIMUM_TORCH = (2, 11)
CXX_FLAGS = shlex.split("-std=c++20 -O3 -fno-math-errno -fno-trapping-math -fPIC -fvisibility=hidden -Wall")
STABLE_ABI = ["-DPy_LIMITED_API=0x03090000", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
NVCC_FLAGS = shlex.split("-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden")
NVCC_FLAGS += ["-Xptxas=-v,--warn-on-spills,--warning-as-error"]
ARCHITECTURES = ("80", "90a", "100")


class NotFoundError(Exception):
    """A tool that the native build needs is absent."""


def choice(name: str) -> str:
    if (value := os.environ.get(name, "auto")) not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def run(command: list[str]) -> str:
    """Run a compiler; its standard output and error together, shown whole if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    output = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(
            f"{shlex.join(command)}\n{output}\nfuseblock: this command failed ({done.returncode})"
        )
    return output


def version_line(tool: str) -> str:
    return next(line for line in run([tool, "--version"]).splitlines() if re.search(r"\d+\.\d+", line))


def find_cxx() -> list[str]:
    if not sys.platform.startswith("linux"):
        raise NotFoundError(f"the native library is built on Linux only, not on {sys.platform}")
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for candidate in map(shlex.split, candidates):
        if shutil.which(candidate[0]):
            return candidate
    raise NotFoundError(f"no C++ compiler found (looked for {', '.join(candidates)})")


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotFoundError("torch is not installed where the build runs (pip install --no-build-isolation)")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        raise NotFoundError(f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}")
    return Path(spec.origin).parent


def find_cuda() -> Path:
    """The toolkit's folder. The nvcc on PATH may be a script that calls the real one, so nvcc itself is asked."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            if not Path(os.environ[name], "bin/nvcc").exists():
                raise NotFoundError(f"{name}={os.environ[name]} has no bin/nvcc")
            return Path(os.environ[name])
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], check=False, capture_output=True, text=True)
        if top := re.search(r"TOP=(.*)", dryrun.stderr + dryrun.stdout):
            return Path(top[1].strip()).resolve()
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return Path("/usr/local/cuda")
    raise NotFoundError("nvcc not found: set CUDA_HOME or put nvcc on PATH")


def cuda_link_flags(home: Path) -> list[str]:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / "libcudart_static.a").exists():
            libraries = "-lcudart_static -Wl,--exclude-libs,ALL -ldl -lrt -lpthread"
            return [f"-L{home / folder}", *shlex.split(libraries)]
    raise NotFoundError(f"no libcudart_static.a under {home}")


def architecture_flags(nvcc: str, clusters: bool) -> tuple[list[str], list[str]]:
    """Machine code for every architecture that this nvcc knows, and PTX for what comes after the newest of them.

    All machine code is made of one PTX, the oldest architecture's: most of the work is then done once, not three times.
    Kernels with clusters need what sm_80 lacks, and each architecture's own PTX to get by with its registers.
    """
    known = set(run([nvcc, "--list-gpu-code"]).split())
    names = [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]
    if clusters:
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        return names, [*flags, "-gencode=arch=compute_{0},code=compute_{0}".format(names[-1].rstrip("a"))]
    ptx = f"compute_{names[0].rstrip('a')}"
    return names, [f"-gencode=arch={ptx},code=[{','.join(f'sm_{name}' for name in names)},{ptx}]"]


def is_current(output: Path, command: str) -> bool:
    """Whether output was made by this very command after the last change of all the files that it read."""
    stamp, depfile = Path(f"{output}.cmd"), Path(f"{output}.d")
    if not (output.exists() and stamp.exists() and depfile.exists()) or stamp.read_text() != command:
        return False
    made = output.stat().st_mtime_ns
    inputs = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(os.path.exists(path) and os.stat(path).st_mtime_ns <= made for path in inputs)


def compile_one(command: list[str], source: Path, output: Path) -> None:
    """Compile source to output if it is not current; the compiler's messages are kept beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*command, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
    if is_current(output, shlex.join(command)):
        return
    print(f"fuseblock: compiling {source.relative_to(ROOT)}", flush=True)
    messages = run(command)
    if messages.strip() and "ptxas info" not in messages:
        print(messages, flush=True)
    Path(f"{output}.log").write_text(messages)
    Path(f"{output}.cmd").write_text(shlex.join(command))


def kernel_report(log: str) -> list[dict[str, object]]:
    """What `ptxas -v` said about each kernel for each architecture."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<spills>\d+) bytes spill stores.*?"
        r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    rows: list[dict[str, object]] = []
    for match in entry.finditer(log):
        numbers = {key: int(match[key] or 0) for key in ("registers", "shared", "stack", "spills")}
        rows.append({"kernel": match["kernel"], "architecture": match["architecture"], **numbers})
    if rows and shutil.which("c++filt"):
        names = run(["c++filt", *(str(row["kernel"]) for row in rows)]).replace("void ", "").splitlines()
        rows = [{**row, "kernel": name.rsplit("(", 1)[0]} for row, name in zip(rows, names, strict=True)]
    return rows


class BuildNative(build_ext):
    """build_ext whose one extension is made here; the Extension object only tells setuptools that there is one."""

    def run(self) -> None:
        self.in_tree = bool(self.inplace or self.editable_mode)
        self.folder = ROOT / "python/fuseblock" if self.in_tree else Path(self.build_lib) / "fuseblock"
        self.report: dict[str, object] = dict.fromkeys(("native", "reason", "cuda", "cuda_reason", "kernels"))
        for folder in (OBJECTS, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        with open(OBJECTS / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if choice("FUSEBLOCK_BUILD_NATIVE") == "0":
                    raise NotFoundError("switched off by FUSEBLOCK_BUILD_NATIVE=0")
                cxx, torch = find_cxx(), find_torch()
            except NotFoundError as missing:
                if choice("FUSEBLOCK_BUILD_NATIVE") == "1":
                    raise SystemExit(f"fuseblock: {missing}") from None
                (self.folder / "_C.abi3.so").unlink(missing_ok=True)
                self.report["reason"] = str(missing)
                self.warn(f"building without the native library: {missing}")
            else:
                self.build_native(cxx, torch)
            (self.folder / "_build.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def build_native(self, cxx: list[str], torch: Path) -> None:
        cuda_parts, define, cuda_link = self.cuda_toolchain()
        common = [*cxx, *CXX_FLAGS, *define, f"-I{sysconfig.get_path('include')}", f"-I{ROOT / 'csrc'}"]
        host = [*common, *STABLE_ABI, f"-isystem{torch / 'include'}"]
        # Kernels take most of the time, what calls them seconds: in this order all processors are done together.
        parts = [*cuda_parts]
        if platform.machine() == "x86_64":
            # Half a minute less; only machines older than AVX2 run them.
            parts.append(([*host, "-O1"], "csrc/cpu/*_baseline.cpp"))
        parts.append((host, "csrc/cpu/*.cpp"))
        if self.in_tree and importlib.util.find_spec("pybind11"):
            import pybind11

            parts.append(([*common, f"-isystem{pybind11.get_include()}"], "csrc/introspect.cpp"))
        parts.append((host, "csrc/torch/*.cpp"))
        objects = self.compile_all(parts)
        self.report |= {"native": True, "compiler": version_line(cxx[0]), "flags": CXX_FLAGS + STABLE_ABI}
        introspection = objects.pop("csrc/introspect.cpp", [])
        cuda = [path for _, pattern in cuda_parts for path in objects[pattern]]
        if cuda_parts:
            logs = [Path(f"{path}.log").read_text() for path in cuda]
            self.report["kernels"] = [row for log in logs for row in kernel_report(log)]
        libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", *cuda_link]
        self.link(cxx, [path for paths in objects.values() for path in paths], libraries, "_C.abi3.so")
        if introspection:
            module = f"_introspect{sysconfig.get_config_var('EXT_SUFFIX')}"
            self.link(cxx, [*introspection, *cuda], cuda_link, module)

    def cuda_toolchain(self) -> tuple[list[tuple[list[str], str]], list[str], list[str]]:
        """The commands that compile CUDA, for which sources; the flags that compile and link code against its objects."""
        try:
            if choice("FUSEBLOCK_BUILD_CUDA") == "0":
                raise NotFoundError("switched off by FUSEBLOCK_BUILD_CUDA=0")
            link = cuda_link_flags(home := find_cuda())
        except NotFoundError as missing:
            if choice("FUSEBLOCK_BUILD_CUDA") == "1":
                raise SystemExit(f"fuseblock: {missing}") from None
            self.report["cuda_reason"] = str(missing)
            self.warn(f"building without CUDA kernels: {missing}")
            return [], [], []
        nvcc = str(home / "bin/nvcc")
        common = [nvcc, *NVCC_FLAGS, f"-I{ROOT / 'csrc'}"]
        names, with_clusters = architecture_flags(nvcc, clusters=True)
        _, without_clusters = architecture_flags(nvcc, clusters=False)
        self.report["cuda"] = {"compiler": version_line(nvcc), "flags": NVCC_FLAGS, "architectures": names}
        parts = [
            ([*common, *with_clusters], "csrc/cuda/*_cluster_*.cu"),
            ([*common, *with_clusters], "csrc/cuda/*_resident.cu"),
            ([*common, *without_clusters], "csrc/cuda/*.cu"),
        ]
        return parts, ["-DWITH_CUDA", f"-isystem{home / 'include'}"], link

    def compile_all(self, parts: list[tuple[list[str], str]]) -> dict[str, list[str]]:
        """Compile each file with the command of the first pattern that it matches; the objects of each pattern."""
        objects: dict[str, list[str]] = {}
        work = []
        taken: set[Path] = set()
        for command, pattern in parts:
            sources = sorted(set(ROOT.glob(pattern)) - taken)
            taken.update(sources)
            outputs = [OBJECTS / f"{source.relative_to(ROOT)}.o" for source in sources]
            objects[pattern] = list(map(str, outputs))
            work += [(command, *pair) for pair in zip(sources, outputs, strict=True)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count() or 1) as pool:
            list(pool.map(lambda job: compile_one(*job), work))
        return objects

    def link(self, cxx: list[str], objects: list[str], libraries: list[str], name: str) -> None:
        target, stamp = self.folder / name, OBJECTS / f"{name}.link"
        command = [*cxx, "-shared", *objects, *libraries, "-o", str(target)]
        same = target.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)
        if same and all(os.stat(path).st_mtime_ns < target.stat().st_mtime_ns for path in objects):
            return
        # Linked beside and moved into place: a process that has the old library mapped keeps it intact.
        run([*command[:-1], f"{target}.new"])
        os.replace(f"{target}.new", target)
        stamp.write_text(shlex.join(command))


setup(
    packages=[*find_packages(where="python"), "fuseblock.kernels"],
    package_dir={"": "python", "fuseblock.kernels": "kernels"},
    package_data={"fuseblock": ["py.typed"], "fuseblock.kernels": ["configs/*.json"]},
    ext_modules=[Extension("fuseblock._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
)
