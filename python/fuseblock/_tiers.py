"""``python -m fuseblock tiers``: what each tier of the LSTM recurrence takes of a GPU, and the largest H that it holds.

The limits are those by which the tiers themselves decline a call. Registers and shared memory are what the assembler
reported at build time for each architecture; shared memory that a launch asks for comes on top (the tiers' headers say it).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .launch import gpu as gpus
from .launch import resident_recurrence
from .launch.gpu import Gpu

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNEL = re.compile(r"lstm_(\w+?)_(fwd|bwd|bwd_bwd)_kernel<")

#: The largest H of a tier, None for any.
Limit = Callable[[torch.dtype, Gpu], int | None]

#: Title, head, rows.
Table = tuple[str, Sequence[str], list[Sequence[str]]]


def limits() -> dict[str, Limit]:
    """The tiers by the labels of their candidates, in order of preference; Triton's where it is installed."""
    tiers = resident_recurrence.TIERS.values()
    found: dict[str, Limit] = {f"cuda ({tier.name})": partial(_resident, tier) for tier in tiers}
    if importlib.util.find_spec("triton") is not None:
        found["triton (persistent)"] = _triton_persistent
        found["triton (fused step)"] = lambda dtype, gpu: None
    found["cuda (per step)"] = lambda dtype, gpu: None
    return found


def _resident(tier: resident_recurrence.Tier, dtype: torch.dtype, gpu: Gpu) -> int:
    return tier.largest_hidden(dtype, gpu) if dtype in tier.dtypes else 0


def _triton_persistent(dtype: torch.dtype, gpu: Gpu) -> int:
    from .launch.triton_lstm_recurrence import persistent_config

    fitting = [0]
    for hidden in range(1, 257):
        config = persistent_config(dtype, hidden)
        if not isinstance(config, str) and config.shared <= gpu.shared_bytes:
            fitting.append(hidden)
    return fitting[-1]


def kernels() -> list[dict[str, Any]]:
    """The recurrence's CUDA C++ kernels as the assembler reported them; empty without a CUDA build."""
    path = Path(__file__).with_name("_build.json")
    recorded = json.loads(path.read_text())["kernels"] if path.exists() else None
    found = []
    for kernel in recorded or ():
        match = _KERNEL.search(kernel["kernel"])
        if match is not None:
            tier = "per step" if match[1] == "step" else match[1]
            name = kernel["kernel"].rsplit("::", 1)[1]
            found.append({"tier": f"cuda ({tier})", "pass": match[2], **kernel, "kernel": name})
    return found


def report() -> dict[str, Any]:
    """Everything as plain values: the GPUs, the largest H by tier, GPU and dtype (None: any), the kernels."""
    here = gpus.present()
    cards = [*gpus.KNOWN, *([] if here is None else [replace(here, name=f"this GPU: {here.name}")])]
    largest = {
        tier: {card.name: {str(d).removeprefix("torch."): limit(d, card) for d in _DTYPES} for card in cards}
        for tier, limit in limits().items()
    }
    return {"gpus": [asdict(card) for card in cards], "largest_hidden": largest, "kernels": kernels()}


def _spread(values: Iterable[int]) -> str:
    several = list(values)
    low, high = min(several), max(several)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def tables(found: dict[str, Any]) -> list[Table]:
    """The report as tables."""
    cards = found["gpus"]
    limits = [
        (c["name"], "{}.{}".format(*c["capability"]), str(c["multiprocessors"]), f"{c['shared_bytes']:,}")
        for c in cards
    ]
    head: Sequence[str] = (
        "GPU",
        "compute capability",
        "multiprocessors",
        "shared bytes that a block may have",
    )
    gpu_limits: Table = ("GPUs", head, list(limits))

    rows: list[Sequence[str]] = []
    for tier, by_card in found["largest_hidden"].items():
        by_limits: dict[tuple[str, ...], list[str]] = {}
        for dtype in (str(d).removeprefix("torch.") for d in _DTYPES):
            largest = (by_card[card["name"]][dtype] for card in cards)
            cells = tuple("any" if h is None else str(h or "none") for h in largest)
            by_limits.setdefault(cells, []).append(dtype)
        rows += [(tier, ", ".join(dtypes), *cells) for cells, dtypes in by_limits.items()]
    head = ("tier", "dtype", *(card["name"] for card in cards))
    largest_hidden = ("Largest H that a tier of the LSTM recurrence holds", head, rows)

    by_pass: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for kernel in found["kernels"]:
        of_pass = by_pass.setdefault((kernel["tier"], kernel["pass"]), {})
        of_pass.setdefault(kernel["architecture"], []).append(kernel)
    resources: list[Sequence[str]] = []
    for (tier, which), by_architecture in sorted(by_pass.items()):
        for architecture, own in by_architecture.items():
            registers, shared = _spread(k["registers"] for k in own), _spread(k["shared"] for k in own)
            spills = str(sum(k["spills"] for k in own))
            resources.append((tier, which, f"sm_{architecture}", str(len(own)), registers, shared, spills))
    head = ("tier", "pass", "for", "kernels", "registers of a thread", "shared bytes of a block", "spills")
    return [gpu_limits, largest_hidden, ("Kernels as assembled: smallest and largest", head, resources)]


def show(found: dict[str, Any]) -> None:
    """Print the report, with rich where it is installed."""
    if not found["kernels"]:
        print("note: no CUDA build here, so no registers and shared memory of its kernels")
    for title, head, rows in tables(found):
        if importlib.util.find_spec("rich") is not None:
            import rich.console
            import rich.table

            drawn = rich.table.Table(*head, title=title, title_justify="left")
            for row in rows:
                drawn.add_row(*row)
            rich.console.Console().print(drawn)
        else:
            widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
            print(f"\n{title}")
            for row in (head, *rows):
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
