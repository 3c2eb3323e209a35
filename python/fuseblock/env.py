"""``python -m fuseblock env``: versions, devices, and for every operator and backend whether it is available here."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata

import torch

from . import __version__, _ext, _fused_layer, dispatch

#: Every environment variable that fuseblock reads: (name, default, meaning).
VARIABLES = (
    ("FUSEBLOCK_BACKEND", "auto", "backend in force at import: auto, aten, cpu, cuda, triton or reference"),
    (
        "FUSEBLOCK_CHECK_LENGTHS",
        "0",
        "1 checks lengths on a GPU as well, at the price of a synchronisation per call",
    ),
    ("FUSEBLOCK_CONFIGS", "none", "a folder of measured dispatch tables, asked before those of the package"),
    ("FUSEBLOCK_CPU_ISA", "best", "instruction set of the CPU kernels: baseline, avx2 or avx512"),
    (
        "FUSEBLOCK_BUILD_NATIVE",
        "auto",
        "at build time: 0 builds no compiled library, 1 makes a missing compiler an error",
    ),
    (
        "FUSEBLOCK_BUILD_CUDA",
        "auto",
        "at build time: 0 builds no CUDA kernels, 1 makes a missing nvcc an error",
    ),
)


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return metadata.version(package)


def report() -> str:
    """The report as text."""
    devices = ["cpu"] + [
        f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in range(torch.cuda.device_count())
    ]
    lines = [
        f"fuseblock   {__version__}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch       {torch.__version__} (CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads)",
        f"triton      {_version('triton')}",
        f"devices     {', '.join(devices)}",
        f"compiled    {_ext.why_not or 'yes'}",
        "",
        "operator x backend",
    ]
    for op in dispatch.operators():
        for candidate in dispatch.candidates(op):
            where = f"available for tensors on {', '.join(candidate.devices)}"
            verdict = candidate.why_not() if candidate.run is None else where
            lines.append(f"  {op:<24} {candidate.label:<20} {verdict}")
    verdict = _fused_layer.why_absent or "available for tensors on cpu"
    lines.append(f"  {'lstm_layer':<24} {'cpu':<20} {verdict}")
    lines += ["", "environment"]
    lines += [f"  {name}={os.environ.get(name, default)}   {meaning}" for name, default, meaning in VARIABLES]
    return "\n".join(lines)
