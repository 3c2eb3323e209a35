"""Registers and shared memory of the compiled kernels, recorded beside the performance model.

CUDA C++: what ptxas reported when the library was built (python/fuseblock/_build.json). Triton: cubins compiled for sm_90,
in the configurations of tests/test_compile_*.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "python" / "fuseblock" / "_build.json"
#: What the committed page shows.
RECORDED = ROOT / "docs" / "performance-resources.json"

# Lists the jobs of the tests that compile every Triton kernel: those for sm_90, of 16-bit tensors where there are such.
_LIST_JOBS = """
import itertools, json
from tests import test_compile_bias_act as bias_act, test_compile_conv_stats as convolutions
from tests import test_compile_spectral_norm as norms, test_compile_triton as others, test_compile_upfirdn2d as images
jobs = itertools.chain(
    bias_act._jobs(), convolutions._usual_jobs(), others._usual_jobs(), images._jobs(), norms._jobs()
)
jobs = [job for job in jobs if job["arch"] == 90]
short = [job for job in jobs if "bf16" in str(job["signature"])]
kernels = {job["kernel"] for job in short}
print(json.dumps(short + [job for job in jobs if job["kernel"] not in kernels]))
"""


def _spread(values: Iterable[int]) -> list[int]:
    several = list(values)
    return [min(several), max(several)]


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Smallest and largest figures by function and architecture."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["function"], row["architecture"]), []).append(row)
    return [
        {
            "function": function,
            "architecture": architecture,
            "instances": len(own),
            "registers": _spread(row["registers"] for row in own),
            "shared": _spread(row["shared"] for row in own),
            "spills": sum(row["spills"] for row in own),
        }
        for (function, architecture), own in sorted(found.items())
    ]


def of_build() -> dict[str, Any] | None:
    """The compiler and the kernels of the library in this tree; None without a CUDA build."""
    build = json.loads(BUILD.read_text()) if BUILD.exists() else {}
    if not build.get("cuda") or not build.get("kernels"):
        return None
    rows = []
    for kernel in build["kernels"]:
        name = re.search(r"(\w+)<", kernel["kernel"])
        if name is not None:
            rows.append({**kernel, "function": name[1]})
    return {"compiler": build["cuda"]["compiler"], "kernels": _summary(rows)}


def triton_version() -> str:
    """The compiler of Triton's kernels; "" without Triton."""
    try:
        return "Triton " + importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def of_triton(kernels: Collection[str] = ()) -> dict[str, Any]:
    """Triton's version and its kernels, or those with these names, compiled now: all of them take minutes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "jobs.json")
        jobs = json.loads(python("-c", _LIST_JOBS))
        functions = {job["name"]: job["kernel"] for job in jobs if not kernels or job["kernel"] in kernels}
        path.write_text(json.dumps([job for job in jobs if job["name"] in functions]))
        results = json.loads(python("-m", "tests.triton_aot", str(path)))
    rows = [
        {**result, "function": functions[result["name"]], "architecture": "90", "spills": result["stack"]}
        for result in results
    ]
    return {"compiler": triton_version(), "kernels": _summary(rows)}


def recorded() -> dict[str, Any]:
    """What is committed: by backend, the compiler and its kernels."""
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    return found


def record(triton: bool) -> None:
    """Write what this tree's build has, and Triton's where they are wanted; what is not here stays as it was."""
    found = recorded() if RECORDED.exists() else {}
    cuda = of_build()
    if cuda is not None:
        found["cuda"] = cuda
    if triton:
        found["triton"] = of_triton()
    lines = [
        f'  {json.dumps(backend)}: {{\n   "compiler": {json.dumps(of["compiler"])},\n   "kernels": [\n'
        + ",\n".join(f"    {json.dumps(row)}" for row in of["kernels"])
        + "\n   ]}"
        for backend, of in sorted(found.items())
    ]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
