"""Compile Triton kernels for GPUs that are not there, and read the cubins: registers, stack, shared memory.

Run as a module in a process of its own, without TRITON_INTERPRET: decorated kernels are either interpreted or compiled.
`python -m tests.triton_aot JOBS` reads a list of jobs from a JSON file and prints the list of results.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

#: Shared memory that one block may use, in bytes, by architecture.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


def _tuples(types: Any) -> Any:
    """JSON has lists where Triton has tuples."""
    return tuple(types) if isinstance(types, list) else types


def _path(names: list[str], argument: str | list[Any]) -> tuple[int, ...]:
    """Where an argument is, given by its name, or an entry of a tuple, given by name and number."""
    name, *rest = [argument] if isinstance(argument, str) else argument
    return names.index(name), *rest


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job; returns registers, stack, shared (bytes), whether 16-byte accesses, asynchronous copies of 16 bytes
    and matrix instructions occur.

    A job has name, module, kernel, arch, signature (argument: Triton type, a list of them for a tuple, or "constexpr"),
    constants (argument: value; "fp32" and the like name Triton types), divisible (arguments that are multiples of 16),
    options (num_warps, ...), and perhaps ones (integers that are 1, which Triton makes constants). In divisible and ones, an
    entry of a tuple is a pair of name and number.
    """
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-", dir=job["cache"])
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(job["module"]), job["kernel"])
    names = list(function.arg_names)
    constants = {k: tl.dtype(v) if v in ("fp32", "fp64") else v for k, v in job["constants"].items()}
    constants |= {_path(names, name): 1 for name in job.get("ones", ())}
    kernel = triton.compile(
        ASTSource(
            fn=function,
            signature={name: _tuples(job["signature"][name]) for name in names},
            constexprs=constants,
            attrs={_path(names, name): [["tt.divisibility", 16]] for name in job["divisible"]},
        ),
        target=GPUTarget("cuda", job["arch"], 32),
        options=job["options"],
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", dir=job["cache"]) as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        )

    def figure(name: str) -> int:
        match = re.search(rf"{name}:(\d+)", usage.stdout)
        assert match is not None, usage.stdout
        return int(match.group(1))

    ptx = kernel.asm["ptx"]
    return {
        "name": job["name"],
        "registers": figure("REG"),
        "stack": figure("STACK"),
        "shared": kernel.metadata.shared,
        "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        "wide_copies": bool(re.search(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x10\b", ptx)),
        "wide": bool(
            re.search(r"(ld|st)\.global\.(L\S+\.)?v4\.b32|(ld|st)\.global\S*\.v[24]\.b(32|64)", ptx)
        ),
        # Bytes of the widest accesses.
        "loads": widest("ld", ptx),
        "stores": widest("st", ptx),
    }


def widest(kind: str, ptx: str) -> int:
    """Bytes of the widest load or store of global memory."""
    found = re.findall(rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\s", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def main(path: str, workers: int = 2) -> None:
    """Compile the jobs of a JSON file and print their results as JSON."""
    jobs = json.loads(Path(path).read_text())
    with tempfile.TemporaryDirectory() as cache:
        for job in jobs:
            job["cache"] = cache
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(compile_job, jobs, chunksize=4))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
