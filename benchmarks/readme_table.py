"""Writes the README's tables of results from committed JSON: ``python -m benchmarks.readme_table README.md JSON ...``.

The text between the two markers in the README is replaced; nothing else is touched, and no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_MODES = ("forward", "train", "double")
#: Headings by mode; whole steps have a column where a result has any.
_GAN_MODES = {
    "forward": "forward",
    "train": "train",
    "penalty": "penalty step",
    "double": "double backward",
    "step": "whole step",
}


def _size(sizes: dict[str, Any]) -> str:
    layers = f"{'bi ' if sizes['bidirectional'] else ''}{sizes['layers']}x{sizes['hidden']}"
    fill = f" fill {sizes['fill']:.0%}" if sizes["fill"] < 1 else ""
    return f"{layers} ({sizes['input']}) B{sizes['batch']} T{sizes['time']}{fill}"


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']['median'] * 1e3:.3g}"


def _lstm_table(report: dict[str, Any]) -> list[str]:
    rows = {
        (r["case"], r["mode"], r["provider"]): r for r in report["rows"] if r.get("suite", "lstm") == "lstm"
    }
    if not rows:
        return []
    lines = [
        "| case | size | forward ms | vs stock | vs ONNX Runtime | train ms | vs stock | double backward vs stock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(case for case, _, _ in rows):
        own = {mode: rows.get((case, mode, "fuseblock")) for mode in _MODES}
        first = next(r for r in own.values() if r is not None)
        cells = [case, _size(first["sizes"])]
        cells += _pair(own["forward"])
        cells.append(_against(rows, case, "onnxruntime"))
        cells += _pair(own["train"])
        cells.append(_ratio(own["double"]))
        lines.append("| " + " | ".join(cells) + " |")
    return ["", *lines]


def _gan_table(report: dict[str, Any]) -> list[str]:
    rows = {(r["case"], r["mode"], r["provider"]): r for r in report["rows"] if r.get("suite") == "gan"}
    if not rows:
        return []
    measured = {mode for _, mode, _ in rows}
    modes = [mode for mode in _GAN_MODES if mode != "step" or mode in measured]
    head = "".join(f" {_GAN_MODES[mode]} ms | vs stock |" for mode in modes)
    lines = [f"| case | input |{head}", "|---|---|" + "---|---|" * len(modes)]
    for case in dict.fromkeys(case for case, _, _ in rows):
        own = {mode: rows.get((case, mode, "fuseblock")) for mode in modes}
        first = next(r for r in own.values() if r is not None)
        cells = [case, first["sizes"]["size"], *(cell for mode in modes for cell in _pair(own[mode]))]
        lines.append("| " + " | ".join(cells) + " |")
    return ["", *lines]


def table(report: dict[str, Any]) -> str:
    """The Markdown tables of the default provider's rows, with what they were measured on."""
    machine, versions = report["machine"], report["versions"]
    where = (
        f"{machine['gpu'] or machine['cpu']}, {report['parameters']['threads']} threads, "
        f"{report['parameters']['dtype']}, torch {versions['torch']}, commit {report['git']['commit'][:10]}, "
        f"load before the run {machine['load_before']:.1f}. Medians of interleaved rounds; ratios above 1 mean that "
        "fuseblock is faster. Losses are shown like wins."
    )
    bars = ["", "| bar | asked | measured | |", "|---|---|---|---|"]
    for bar in report["bars"]:
        measured = "" if bar["value"] is None else f"{bar['value']:.2f} ({bar['at'] or 'mean'})"
        bars.append(f"| {bar['bar']} | {bar['least']:.2f} | {measured} | {bar['verdict']} |")
    return "\n".join([where, *_lstm_table(report), *_gan_table(report), *bars])


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or row["speedup_stock"] is None:
        return "" if row is None else row["status"]
    return f"{row['speedup_stock']['median']:.2f}x"


def _pair(row: dict[str, Any] | None) -> list[str]:
    if row is None or row["seconds"] is None:
        return ["", "" if row is None else row["status"]]
    return [_milliseconds(row), _ratio(row)]


def _against(rows: dict[tuple[str, str, str], dict[str, Any]], case: str, peer: str) -> str:
    own, other = rows.get((case, "forward", "fuseblock")), rows.get((case, "forward", peer))
    if own is None or other is None or not other["seconds"] or not own["seconds"]:
        return ""
    return f"{other['seconds']['median'] / own['seconds']['median']:.2f}x"


def main() -> None:
    """Rewrite the README's results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table", description=main.__doc__)
    parser.add_argument("readme", type=Path, help="the file with the markers")
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="JSON", help="results of python -m benchmarks"
    )
    args = parser.parse_args()
    text = args.readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    bodies = [
        f"From [{s.as_posix()}]({s.as_posix()}):\n\n{table(json.loads(s.read_text()))}" for s in args.sources
    ]
    args.readme.write_text(f"{before}{BEGIN}\n" + "\n\n".join(bodies) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
