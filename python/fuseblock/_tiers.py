"""``python -m fuseblock tiers``: what each tier of the LSTM recurrence takes of a GPU, and the largest H that it holds.

The limits are those by which the tiers themselves decline a call. Registers and shared memory are what the assembler
reported at build time for each architecture, and what a launch asks for besides.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .launch import gpu as gpus
from .launch import lstm_grid, resident_recurrence
from .launch.gpu import Gpu

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNEL = re.compile(r"lstm_(\w+?)_(fwd|bwd|bwd_bwd)_kernel<")

#: Of the cluster tier, by bytes of an element and H: forward and backward, with two tiles of rows where there are such
#: kernels. A test compares them with the launchers.
_CLUSTER_SHARED = {
    2: {256: (26_640, 59_408), 384: (106_000, 118_288), 512: (54_288, 78_864), 640: (190_736, 221_456)},
    4: {256: (46_096, 46_096), 384: (102_160, 96_016), 512: (193_552, 193_552)},
}

#: The largest H of a tier, None for any.
Limit = Callable[[torch.dtype, Gpu], int | None]

#: The shared memory that a block of a tier asks for at launch: (dtype, H, whether backward, GPU) -> bytes, at least.
Launch = Callable[[torch.dtype, int, bool, Gpu], int]

#: Title, head, rows.
Table = tuple[str, Sequence[str], list[Sequence[str]]]


def limits() -> dict[str, Limit]:
    """The tiers by the labels of their candidates, in order of preference; Triton's where it is installed."""
    tiers = resident_recurrence.TIERS.values()
    found: dict[str, Limit] = {f"cuda ({tier.name})": partial(_resident, tier) for tier in tiers}
    if importlib.util.find_spec("triton") is not None:
        found["triton (persistent)"] = _triton_persistent
    found["cuda (per step)"] = lambda dtype, gpu: None
    if "triton (persistent)" in found:
        found["triton (fused step)"] = lambda dtype, gpu: None
    return found


def launches() -> dict[str, Launch]:
    """Of the tiers whose blocks ask for shared memory at launch, how much."""
    found: dict[str, Launch] = {"cuda (cluster)": _cluster_shared, "cuda (grid)": _grid_shared}
    if importlib.util.find_spec("triton") is not None:
        found["triton (persistent)"] = _triton_shared
    return found


def _resident(tier: resident_recurrence.Tier, dtype: torch.dtype, gpu: Gpu) -> int:
    return tier.largest_hidden(dtype, gpu) if dtype in tier.dtypes else 0


def _cluster_shared(dtype: torch.dtype, hidden: int, backward: bool, gpu: Gpu) -> int:
    by_hidden = _CLUSTER_SHARED[dtype.itemsize]
    return by_hidden[next(h for h in by_hidden if h >= hidden)][backward]


def _grid_shared(dtype: torch.dtype, hidden: int, backward: bool, gpu: Gpu) -> int:
    teams = lstm_grid.teams(dtype, hidden, backward, gpu)
    return min(team.shared_bytes(1, dtype.itemsize, backward) for team in teams)


def _triton_shared(dtype: torch.dtype, hidden: int, backward: bool, gpu: Gpu) -> int:
    from .launch.triton_lstm_recurrence import persistent_config

    config = persistent_config(dtype, hidden)
    # What fits nowhere fits into no GPU's shared memory.
    return gpu.shared_bytes + 1 if isinstance(config, str) else config.shared


def _triton_persistent(dtype: torch.dtype, gpu: Gpu) -> int:
    fitting = (h for h in range(1, 257) if _triton_shared(dtype, h, False, gpu) <= gpu.shared_bytes)
    return max(fitting, default=0)


def kernels() -> list[dict[str, Any]]:
    """The recurrence's CUDA C++ kernels as the assembler reported them; empty without a CUDA build."""
    path = Path(__file__).with_name("_build.json")
    recorded = json.loads(path.read_text())["kernels"] if path.exists() else None
    found = []
    for kernel in recorded or ():
        match = _KERNEL.search(kernel["kernel"])
        if match is not None:
            tier = "per step" if match[1] == "step" else match[1]
            name = kernel["kernel"][match.start() :]
            found.append({"tier": f"cuda ({tier})", "pass": match[2], **kernel, "kernel": name})
    return found


def report() -> dict[str, Any]:
    """Everything as plain values.

    The GPUs; the largest H by tier, GPU and dtype (None: any); the shared bytes that a block then asks for at launch,
    forward and backward; the kernels.
    """
    here = gpus.present()
    cards = [*gpus.KNOWN, *([] if here is None else [replace(here, name=f"this GPU: {here.name}")])]
    largest: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for tier, limit in limits().items():
        largest[tier] = {card.name: {_name(d): limit(d, card) for d in _DTYPES} for card in cards}
    for tier, launch in launches().items():
        asked[tier] = {card.name: {} for card in cards}
        for card, dtype in product(cards, _DTYPES):
            if hidden := largest[tier][card.name][_name(dtype)]:
                both = [launch(dtype, hidden, backward, card) for backward in (False, True)]
                asked[tier][card.name][_name(dtype)] = both
    return {
        "gpus": [asdict(card) for card in cards],
        "largest_hidden": largest,
        "shared_at_launch": asked,
        "kernels": kernels(),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_tier(
    found: dict[str, Any], cards: Sequence[dict[str, Any]], cell: Callable[[Any], str]
) -> list[Sequence[str]]:
    """Rows of (tier, dtypes, a cell for each GPU); dtypes with equal cells share a row, those of empty cells have none."""
    rows: list[Sequence[str]] = []
    for tier, by_card in found.items():
        by_cells: dict[tuple[str, ...], list[str]] = {}
        for dtype in map(_name, _DTYPES):
            if any(dtype in by_card[card["name"]] for card in cards):
                cells = tuple(cell(by_card[card["name"]].get(dtype, 0)) for card in cards)
                by_cells.setdefault(cells, []).append(dtype)
        rows += [(tier, ", ".join(dtypes), *cells) for cells, dtypes in by_cells.items()]
    return rows


def _spread(values: Iterable[int]) -> str:
    several = list(values)
    low, high = min(several), max(several)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def tables(found: dict[str, Any]) -> list[Table]:
    """The report as tables."""
    cards = found["gpus"]
    head: Sequence[str] = ("GPU", "compute capability", "multiprocessors", "shared bytes of a block")
    limits: list[Sequence[str]] = [
        (c["name"], "{}.{}".format(*c["capability"]), str(c["multiprocessors"]), f"{c['shared_bytes']:,}")
        for c in cards
    ]
    drawn: list[Table] = [("GPUs and their limits", head, limits)]

    head = ("tier", "dtype", *(card["name"] for card in cards))
    largest = _by_tier(found["largest_hidden"], cards, lambda h: "any" if h is None else str(h or "none"))
    drawn.append(("Largest H that a tier of the LSTM recurrence holds", head, largest))
    asked = _by_tier(
        found["shared_at_launch"], cards, lambda both: " / ".join(f"{b:,}" for b in dict.fromkeys(both or ()))
    )
    drawn.append(("Shared bytes of a block at that H, asked for at launch (forward / backward)", head, asked))

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
    head = ("tier", "pass", "for", "kernels", "registers of a thread", "static shared bytes", "spills")
    return [*drawn, ("Kernels as assembled: smallest and largest", head, resources)]


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
