"""Peak memory of one step, above what was held before it (parameters and inputs do not count; results do), and what it
saves for its backward.

* CUDA: the caching allocator's own high-water mark.
* CPU, tensors: every allocation and release of PyTorch's CPU allocator during one step, as the profiler records them;
  the peak of the running sum. Exact and repeatable in bytes asked for (whether or not they are ever written to), and
  blind to what libraries allocate for themselves.
* CPU, process (``--rss``): the kernel's high-water mark of resident memory over one step, in a fresh process for each
  provider. It sees everything that is touched: ONNX Runtime, oneDNN's scratch, the autograd graph. The kernel counts in
  batches of pages (resolution some 100 KiB) and blocks under 64 KiB may reuse memory freed before. One warm-up step runs
  first, freed memory is returned to the system and the mark is reset: caches that a provider keeps count as held before.
* Saved for backward: the storages that autograd's saved-tensor hooks see, each once, without those that outlive the step
  (parameters, inputs).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ROOT = Path(__file__).resolve().parents[1]


def peak_of_tensors(step: Callable[[], object], *, cuda: bool) -> int:
    """Largest number of bytes that tensors hold during ``step()`` above those held before."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(held_during(step))


def held_during(step: Callable[[], object]) -> list[int]:
    """Bytes that CPU tensors hold above those held before ``step()``: 0, and after each allocation and release in it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return list(itertools.accumulate(changes, initial=0))


def saved_for_backward(step: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd saves during ``step()``, a training step; those held before do not count."""
    saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    gc.collect()
    return sum(size for reference, size in saved.values() if reference.expired())


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_of_process(step: Callable[[], object]) -> int:
    """Growth of this process's resident high-water mark over ``step()``, after one warm-up. Linux only."""
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def process_peak_available() -> str | None:
    """None where `peak_of_process` works, else the reason."""
    return None if os.access(_CLEAR, os.W_OK) else "needs Linux's /proc/self/clear_refs"


def in_fresh_process(case: str, mode: str, provider: str, *, dtype: str, threads: int, seed: int) -> int:
    """`peak_of_process` of one case in a process of its own.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case, mode, provider]
    command += ["--dtype", dtype, "--threads", str(threads), "--seed", str(seed)]
    # Large blocks come straight from the system and go straight back: the mark then follows what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def main(argv: list[str] | None = None) -> None:
    """Print one step's process peak as JSON; what `in_fresh_process` starts."""
    from benchmarks.suites import suite_of

    parser = argparse.ArgumentParser()
    for name in ("case", "mode", "provider"):
        parser.add_argument(name)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    suite = suite_of(args.case)
    case = next(c for c in suite.cases if c.name == args.case)
    provider = next(p for p in suite.providers if p.name == args.provider)
    problem = suite.make_problem(case, dtype=getattr(torch, args.dtype), device="cpu", seed=args.seed)
    step, context = provider.step(problem, args.mode)
    with context():
        print(json.dumps({"peak": peak_of_process(step)}))


if __name__ == "__main__":
    main()
