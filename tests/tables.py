"""Tables of measurements for tests: keys, entries, and what they are asked."""

from __future__ import annotations

from typing import Any

from fuseblock import _tables

H, B, T = 256, 16, 100


def recurrence_key(**changes: Any) -> dict[str, Any]:
    key = {"dtype": "float16", "tf32": "", "ragged": False, "mode": "train", "hidden": H, "proj": 0}
    return {**key, "batch": B, "steps": T, "directions": 1, **changes}


def entry(key: dict[str, Any], best: str, **times: float) -> dict[str, Any]:
    return {"key": key, "times": {name.replace("_", " "): t for name, t in times.items()}, "best": best}


def table(**ops: list[dict[str, Any]]) -> _tables.Table:
    return _tables.Table("test.json", _tables.parse({"schema": 1, "ops": ops}))


def asked(key: dict[str, Any]) -> _tables.Key:
    return tuple(key.items())
