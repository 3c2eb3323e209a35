"""What the numbers were taken on: machine, versions, commit, and the ceilings measured in the same run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.check_output(
            ["git", *arguments], cwd=_ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_GPU_STATE = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
    "mig.mode.current",
)


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, limits and temperature of the first GPU, as nvidia-smi has them; None without nvidia-smi."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader"]
    try:
        line = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL, timeout=30).splitlines()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(_GPU_STATE, line.split(", "), strict=True))


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, commit and time as plain values."""
    cuda = device == "cuda"
    dirty = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "gpu_state": gpu_state() if cuda else None,
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "fuseblock": _version("fuseblock"),
            "cuda": torch.version.cuda if cuda else None,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
        },
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if dirty is None else bool(dirty)},
    }


def _best(step: Callable[[], object], cuda: bool, seconds: float) -> float:
    step()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def ceilings(device: str, dtype: torch.dtype, *, seconds: float = 0.5) -> dict[str, float]:
    """The best GFLOP/s of a square GEMM and the best GB/s of a copy (bytes read plus bytes written), measured now."""
    cuda = device == "cuda"
    n = 8192 if cuda else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm = _best(lambda: torch.mm(a, b, out=out), cuda, seconds)
    size = 2**28 if cuda else 2**26
    source, target = (torch.zeros(size, device=device, dtype=torch.float32) for _ in range(2))
    copy = _best(lambda: target.copy_(source), cuda, seconds)
    return {"gemm_gflops": 2 * n**3 / gemm / 1e9, "copy_gbytes": 2 * size * 4 / copy / 1e9}
