"""Measured choices: who was fastest at which sizes on which GPU, read from the tables of ``python -m benchmarks tune``.

A table is a JSON file per GPU, named after it: ``nvidia-h200.json``. It is looked for in the folder that the environment
variable ``FUSEBLOCK_CONFIGS`` names, then among those that come with the package (kernels/configs, whose README.md describes
the format). A file that cannot be used is reported once by a warning and then ignored: a call never fails for it.

A call asks with a key: pairs of a name and a value, sizes and kinds. Among the measurements of its operator whose kinds are
equal (dtype, ragged or not, ...), the one nearest in sizes answers, by the logarithm of their ratios. Where a size is
further away than its `REACH`, nothing answers: the plain rule holds, as on a GPU without a table.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1

#: Kinds are strings, dtypes and truth values; integers are sizes.
Value = str | bool | int | torch.dtype
Key = tuple[tuple[str, Value], ...]

#: The factor up to which a measurement speaks for another size; 1: equal sizes only.
REACH: Mapping[str, float] = {
    "hidden": 2,
    "batch": 4,
    "steps": 8,
    "input": 4,
    "positions": 4,
    "elements": 4,
    "layers": 1.5,
    "directions": 1,
}
_OTHER_REACH = 2.0

#: Sequences longer than this count as this long: from here on, time is proportional to steps for everyone.
STEADY_STEPS = 1024

#: What no size and no time reaches; beyond it lie numbers without a logarithm.
_LARGEST = 2**63


def tf32(*operations: str) -> str:
    """Those of the CUDA operations ``matmul`` and ``rnn`` whose float32 products may be rounded to TF32."""
    # PyTorch's documented `allow_tf32` raises where a user has set `fp32_precision`.
    precision = torch._C._get_fp32_precision_getter
    return " ".join(name for name in operations if precision("cuda", name) == "tf32")


class TableError(ValueError):
    """A file is not a table."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One measurement.

    Attributes:
        key: what was measured; dtypes by their names.
        times: microseconds per call, by candidate.
        best: whom to take.
    """

    key: Mapping[str, str | bool | int]
    times: Mapping[str, float]
    best: str

    def order(self) -> tuple[str, ...]:
        """The candidates, best first, the others from the fastest on."""
        return tuple(sorted(self.times, key=lambda label: (label != self.best, self.times[label])))


@dataclass(frozen=True, eq=False)
class Answer:
    """What a table says about a call.

    Attributes:
        order: the measured candidates, best first; empty where the plain rule holds.
        source: the name of the table, or the reason why the plain rule holds.
        entry: the measurement, or None.
    """

    order: tuple[str, ...]
    source: str
    entry: Entry | None = None

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - answers are memoised themselves
    def rule(self, label: str) -> str:
        """Why ``label`` was taken."""
        if self.entry is None:
            return f"plain rule: {self.source}"
        at = ", ".join(f"{name} = {value}" for name, value in self.entry.key.items() if _is_size(value))
        if label not in self.entry.times:
            return f"plain rule: nobody whom table {self.source} lists at {at} can run"
        others = [f"{self.entry.times[other]:.1f} us ({other})" for other in self.order if other != label]
        against = f" against {', '.join(others)}" if others else ""
        return f"table {self.source}: measured {self.entry.times[label]:.1f} us{against} at {at}"


@dataclass(frozen=True, eq=False)
class Table:
    """The measurements on one GPU.

    Attributes:
        name: of the file, for explanations.
        entries: by operator.
        why_empty: where there are none, why.
    """

    name: str
    entries: Mapping[str, tuple[Entry, ...]]
    why_empty: str = ""
    _groups: dict[Any, list[Entry]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for op, entries in self.entries.items():
            for entry in entries:
                self._groups.setdefault((op, _kinds(entry.key.items())), []).append(entry)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - tables live as long as the process
    def answer(self, op: str, key: Key) -> Answer:
        """The measurement that speaks for a call, by the rule of this module."""
        if not self.entries:
            return Answer((), self.why_empty)
        asked = {name: _plain(value) for name, value in key}
        near = [
            (distance, number, entry)
            for number, entry in enumerate(self._groups.get((op, _kinds(asked.items())), ()))
            if (distance := _distance(asked, entry.key)) is not None
        ]
        if not near:
            return Answer((), f"table {self.name} has no measurement of {op} near these sizes")
        _, _, entry = min(near)
        return Answer(entry.order(), self.name, entry)


def _plain(value: Value) -> str | bool | int:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def plain_key(key: Key) -> dict[str, str | bool | int]:
    """A call's key as it stands in a table."""
    return {name: _plain(value) for name, value in key}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kinds(items: Iterable[tuple[str, str | bool | int]]) -> frozenset[tuple[str, str | int | None]]:
    """What has to be equal: the names of all fields, and the values of those that are no sizes."""
    return frozenset((name, None if _is_size(value) else value) for name, value in items)


def _distance(asked: Mapping[str, Any], measured: Mapping[str, Any]) -> float | None:
    """The sum over all sizes of (log ratio / log reach)^2, or None where one is out of reach."""
    total = 0.0
    for name, value in asked.items():
        if not _is_size(value) or value == measured[name]:
            continue
        reach = math.log(REACH.get(name, _OTHER_REACH))
        # A size of zero is as far from one as one from itself.
        apart = abs(math.log(max(value, 1) / max(measured[name], 1)))
        if apart > reach:
            return None
        total += (apart / reach) ** 2 if reach else 0.0
    return total


def file_name(gpu: str) -> str:
    """The name of a GPU's table: ``NVIDIA H200`` has ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def parse(document: Any) -> dict[str, tuple[Entry, ...]]:
    """The measurements in a table's JSON.

    Raises:
        TableError: it is not a table, with the place where it is wrong.
    """

    def require(condition: bool, where: str, expected: str) -> None:
        if not condition:
            raise TableError(f"{where}: expected {expected}")

    require(isinstance(document, dict), "file", "an object")
    require(document.get("schema") == SCHEMA, "schema", str(SCHEMA))
    require(isinstance(document.get("ops"), dict), "ops", "an object")
    found = {}
    for op, entries in document["ops"].items():
        require(isinstance(entries, list), f"ops.{op}", "a list")
        for number, entry in enumerate(entries):
            where = f"ops.{op}[{number}]"
            require(isinstance(entry, dict), where, "an object")
            key, times = entry.get("key"), entry.get("times")
            values = key.values() if isinstance(key, dict) else (None,)
            plain = all(isinstance(v, str) or (isinstance(v, int) and abs(v) < _LARGEST) for v in values)
            require(plain, f"{where}.key", "sizes and kinds")
            micros = list(times.values()) if isinstance(times, dict) else []
            positive = all(isinstance(t, int | float) and 0 < t < _LARGEST for t in micros)
            require(positive and bool(micros), f"{where}.times", "microseconds by candidate")
            best = entry.get("best")
            require(isinstance(best, str) and best in times, f"{where}.best", "one of times")
        found[op] = tuple(Entry(e["key"], e["times"], e["best"]) for e in entries)
    return found


def folders() -> list[Path]:
    """Where tables are looked for, in this order."""
    own = os.environ.get("FUSEBLOCK_CONFIGS")
    kernels = importlib.util.find_spec("fuseblock.kernels")
    packaged = (kernels.submodule_search_locations if kernels else None) or ()
    return [*([Path(own)] if own else []), *(Path(location) / "configs" for location in packaged)]


def load(gpu: str) -> Table:
    """The table of a GPU, by the driver's name of it; an empty one where there is none."""
    name, why_empty = file_name(gpu), f"no table for {gpu} (python -m benchmarks tune writes one)"
    for folder in folders():
        path = folder / name
        try:
            entries = parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            why_empty = f"the table {path} is ignored: {error}"
            warnings.warn(f"fuseblock: {why_empty}", stacklevel=2)
            continue
        return Table(name, entries, "" if entries else f"table {name} is empty")
    return Table(name, {}, why_empty)


@functools.cache
def of(device: int) -> Table:
    """The table of a CUDA device of this machine; read once."""
    try:
        return load(torch.cuda.get_device_name(device))
    except (AssertionError, RuntimeError):  # fake tensors may be on a GPU that is not here
        return Table("", {}, f"GPU {device} is not here")


_IN_FORCE: Table | None = None


def in_force(device: int) -> Table:
    """The table that calls on a CUDA device ask."""
    return of(device) if _IN_FORCE is None else _IN_FORCE


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Put a table in force on all CUDA devices: while it grows, and in tests."""
    global _IN_FORCE
    before, _IN_FORCE = _IN_FORCE, table
    try:
        yield
    finally:
        _IN_FORCE = before
