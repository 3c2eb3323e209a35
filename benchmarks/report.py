"""The HTML report: one self-contained file with tables and plots (inline SVG)."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.console import COPY_HEAD, against_copy, megabytes, seconds
from benchmarks.providers import BASE, OURS

Rows = list[dict[str, Any]]

_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#1a1a1a}
table{border-collapse:collapse;font-size:13px;margin:1em 0}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td.text,th.text{text-align:left;white-space:normal} tr.red td{color:#b00020;font-weight:bold}
tr.ours td{background:#f2f7f2} .met{color:#1b7a2f} .missed{color:#b00020;font-weight:bold}
svg{max-width:100%;height:auto} dt{font-weight:600} dd{margin:0 0 .4em 1.5em}
"""
_COLOURS = {
    BASE: "#888888",
    "onnxruntime": "#d08020",
    "compile": "#a05fa0",
    OURS: "#1b7a2f",
    "fuseblock:cpu": "#63b37b",
    "fuseblock:triton": "#3f7fbf",
    "fuseblock:cuda": "#1f4f8f",
    "fuseblock:aten": "#b0b0d0",
    "fuseblock:reference": "#c8c8a0",
}
#: Shown by the plots; what is not green has no bar.
Value = Callable[[dict[str, Any]], float | None]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _bars(rows: Rows, value: Value, label: str, line: float) -> str:
    """Horizontal bars on a logarithmic axis that start at ``line``; one group a case, one colour a provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = [
        (row["case"], row["provider"], number)
        for row in rows
        if (number := value(row)) is not None and number > 0
    ]
    if not figures:
        return "<p>No figures.</p>"
    cases = list(dict.fromkeys(case for case, _, _ in figures))
    providers = list(dict.fromkeys(provider for _, provider, _ in figures))
    thickness = 0.8 / len(providers)
    figure, axes = pyplot.subplots(figsize=(10, 0.9 + len(cases) * (0.12 + 0.17 * len(providers))))
    for index, provider in enumerate(providers):
        chosen = [(cases.index(case), number) for case, name, number in figures if name == provider]
        places = [-place - (index + 0.5) * thickness + 0.4 for place, _ in chosen]
        widths = [number - line for _, number in chosen]
        axes.barh(places, widths, thickness, left=line, label=provider, color=_COLOURS.get(provider))
        for place, (_, number) in zip(places, chosen, strict=True):
            axes.annotate(
                f"{number:.2g}" if number < 10 else f"{number:.0f}",
                (number, place),
                xytext=(3 if number >= line else -3, 0),
                textcoords="offset points",
                ha="left" if number >= line else "right",
                va="center",
                fontsize=7,
            )
    axes.set_xscale("log")
    axes.axvline(line, color="black", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(cases))], cases, fontsize=9)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(providers), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fuseblock"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    # Drop the XML prologue: an inline SVG has none.
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)


def _table(head: Sequence[str], lines: Sequence[tuple[Sequence[str], str]], text_columns: int = 1) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="text"' if index < text_columns else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    first = "".join(cell("th", index, text) for index, text in enumerate(head))
    body = "".join(
        f'<tr class="{style}">' + "".join(cell("td", i, text) for i, text in enumerate(line)) + "</tr>\n"
        for line, style in lines
    )
    return f"<table><tr>{first}</tr>\n{body}</table>"


def _ratio(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f} ({spread['q25']:.2f} to {spread['q75']:.2f})"


def _row_line(row: dict[str, Any]) -> tuple[list[str], str]:
    text = [row["case"], row["provider"]]
    if row["seconds"] is None:
        return [*text, f"{row['status']}: {row['reason']}", *[""] * 8], ""
    spread, device = row["seconds"], row["device_seconds"]
    error = _number(row["error_over_bound"]) or 0.0
    line = [
        *text,
        f"{seconds(spread['median'])} ({seconds(spread['q25'])} to {seconds(spread['q75'])})",
        seconds(device["median"]) if device else "",
        "red" if row["status"] == "red" else _ratio(row["speedup_stock"]),
        f"{_ratio(row['speedup_peer'])} {row['best_peer'] or ''}{' (red)' if row['best_peer_red'] else ''}",
        f"{row['gflops']:.3g} ({row['gemm_fraction']:.0%})",
        f"{row['gbytes']:.3g} ({row['copy_fraction']:.0%})",
        " / ".join(filter(None, [megabytes(row["tensor_peak"]), megabytes(row["process_peak"])])),
        megabytes(row["saved"]),
        f"{error:.2f} {row['tensor']}",
    ]
    return line, "red" if row["status"] == "red" else "ours" if row["provider"] == OURS else ""


_HEAD = (
    "case",
    "provider",
    "time (quartiles)",
    "GPU time",
    "x stock (quartiles)",
    "x best peer (quartiles)",
    "GFLOP/s (of GEMM)",
    "GB/s (of copy)",
    "peak: tensors / process",
    "saved for backward",
    "error / bound",
)


def _calls(rows: Rows) -> str:
    """The section on call overhead: cells and single steps, microseconds."""
    lines = []
    base = {(r["case"], r["mode"]): r for r in rows if r["provider"] == BASE and r["seconds"]}
    for row in rows:
        sizes = row["sizes"]
        if row["seconds"] is None or not (sizes.get("cell") or sizes.get("time") == 1):
            continue
        stock = base.get((row["case"], row["mode"]))
        more = (row["seconds"]["median"] - stock["seconds"]["median"]) * 1e6 if stock else 0.0
        what = f"{'LSTMCell' if sizes['cell'] else 'LSTM, T = 1'}, H {sizes['hidden']}, B {sizes['batch']}"
        median = f"{row['seconds']['median'] * 1e6:.1f}"
        lines.append(
            (
                [
                    row["case"],
                    what,
                    row["mode"],
                    row["provider"],
                    median,
                    f"{more:+.1f}",
                    _ratio(row["speedup_stock"]),
                ],
                "",
            )
        )
    if not lines:
        return "<p>Not measured in this run.</p>"
    return _table(("case", "call", "mode", "provider", "us", "us above stock", "x stock"), lines, 4)


_COPIES = (
    "Norms, activations and filters move the bytes that the performance model's formulas say (docs/performance.md): their "
    "rate against that of a plain copy of forward's bytes, timed in the same rounds. The floor is the time of these bytes "
    "at the copy's rate."
)


def _plots(rows: Rows, mode: str) -> str:
    """Three plots of a mode."""
    chosen = [row for row in rows if row["mode"] == mode and row["seconds"] is not None]
    base = {row["case"]: row for row in chosen if row["provider"] == BASE}

    def speed(row: dict[str, Any]) -> float | None:
        if row["provider"] == BASE or not row["speedup_stock"]:
            return None
        return float(row["speedup_stock"]["median"])

    def error(row: dict[str, Any]) -> float | None:
        ratio = _number(row["error_over_bound"])
        return None if ratio is None else min(max(ratio, 1e-3), 1e3)

    def held(row: dict[str, Any]) -> float | None:
        stock = base.get(row["case"])
        if row["provider"] == BASE or stock is None or not stock["tensor_peak"] or not row["tensor_peak"]:
            return None
        return float(row["tensor_peak"] / stock["tensor_peak"])

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "<p><b>Plots are missing: matplotlib is not installed.</b></p>"
    return (
        "<h3>Speed against stock, more is better</h3>"
        + _bars(chosen, speed, "times faster than torch.nn (paired median, log scale)", 1.0)
        + "<h3>Error against its bound, right of the line is wrong</h3>"
        + _bars(chosen, error, "largest error / bound (log scale)", 1.0)
        + "<h3>Peak memory of tensors against stock, less is better</h3>"
        + _bars(chosen, held, "peak / peak of torch.nn (log scale)", 1.0)
    )


def to_html(report: dict[str, Any]) -> str:
    """The report as one HTML document.

    Args:
        report: what ``--json`` writes.
    """
    rows: Rows = [row for row in report["rows"] if row["status"] != "unavailable"]
    machine, versions, parameters = report["machine"], report["versions"], report["parameters"]
    name = machine["gpu"] or machine["cpu"]
    facts = {
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}"
        + (f"; {machine['gpu']}" if machine["gpu"] else ""),
        "Versions": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
        "Commit": f"{report['git']['commit']}{' with local changes' if report['git']['dirty'] else ''}",
        "Time": report["timestamp"],
        "Parameters": ", ".join(f"{key} {value}" for key, value in parameters.items()),
        "Ceilings measured": f"GEMM {report['ceilings']['gemm_gflops']:.0f} GFLOP/s, "
        f"copy {report['ceilings']['copy_gbytes']:.1f} GB/s",
        "Load before the run": f"{machine['load_before']}",
        "Command": report["command"],
    }
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>fuseblock benchmarks: {html.escape(name)}</title>",
        f"<style>{_CSS}</style><h1>fuseblock benchmarks</h1><dl>",
        *(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in facts.items()),
        "</dl><p>All providers of a case run interleaved in one process on equal values. A speed-up is the median over "
        "rounds of the ratio within a round, shown only where the largest error is at most twice that of stock PyTorch "
        "plus one unit in the last place, both against a float64 run. GFLOP/s and GB/s are nominal work per time.</p>",
    ]
    if report["bars"]:
        lines = [
            (
                [
                    bar["bar"],
                    f"{bar['least']:.2f}",
                    "" if bar["value"] is None else f"{bar['value']:.2f}",
                    (bar["at"] or "")
                    + (f" no figure: {', '.join(bar['without'])}" if bar["without"] else ""),
                    str(bar["cases"]),
                    bar["verdict"],
                ],
                bar["verdict"].split()[0],
            )
            for bar in report["bars"]
        ]
        parts += [
            "<h2>Bars</h2>",
            _table(("bar", "least", "measured", "worst at", "cases", "verdict"), lines),
        ]
    if report["classes"]:
        keys = ("stock_mean", "stock_worst", "peer_mean", "peer_worst")
        means = [
            (
                [
                    m["class"],
                    m["mode"],
                    str(m["cases"]),
                    str(m["not_green"]),
                    *(f"{m[key]:.2f}" for key in keys),
                ],
                "",
            )
            for m in report["classes"]
        ]
        head = ("class", "mode", "cases", "not green", "mean x stock", "worst", "mean x best peer", "worst")
        parts += ["<h2>Geometric means, fuseblock</h2>", _table(head, means, 2)]
    if copies := against_copy(rows):
        lines = [(list(cells), "") for cells in copies]
        parts += ["<h2>Against a plain copy and the performance model</h2>", f"<p>{_COPIES}</p>"]
        parts.append(_table(COPY_HEAD, lines, 3))
    parts += ["<h2>Call overhead</h2>", _calls(rows)]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        lines = [_row_line(row) for row in rows if row["mode"] == mode]
        parts += [f"<h2>{mode.capitalize()}</h2>", _plots(rows, mode), _table(_HEAD, lines, 2)]
    return "\n".join(parts) + "</html>\n"
