"""Writes what tools/bench_accuracy.py has measured as a table and as a plot."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxcop

Row = Mapping[str, str]

HEADINGS = {
    "macs_target": "budget", "method": "method", "macs_kept": "MACs kept", "params_kept": "params kept",
    "accuracy": "{metric}, %", "base_accuracy": "original", "difference": "difference",
    "standard_error": "±", "agreement": "agreement, %", "seconds": "seconds", "note": "note",
}  # fmt: skip
LEFT = ("method", "note")  # aligned so; numbers are aligned to the right
EXPLANATION = (
    "No method trains. The budget is the share of multiply-accumulates that may be kept; MACs and parameters are "
    "counted in the files, by one counter for all methods. The difference is paired, on the same evaluation samples, "
    "and ± is its standard error over them; agreement is the share of samples with the original's top-1. A relative "
    "error is 100 · ‖y - y₀‖ / ‖y₀‖ of the output, where lower is better. Seconds are those of pruning alone; for "
    "onnxsim and Torch-Pruning, which take a ratio of channels, those of the search for the ratio that meets the "
    "budget."
)
COLORS = {
    "ours": "#0072b2", "cop-delete": "#d55e00", "l1-delete": "#e69f00", "cop+merge": "#009e73", "cop+full": "#56b4e9",
    "measured+merge": "#cc79a7", "measured+full": "#0072b2", "data-free": "#000000", "with-data": "#0072b2",
    "closed-form": "#56b4e9",
}  # fmt: skip
NAMES = {"with-data": "onnxcop", "closed-form": "onnxcop, no training"}  # in legends
GREYS = ("#999999", "#666666", "#bbbbbb", "#444444")
MARKERS = "osD^v<>Pp*hX"
ERROR = "relative error"


def markdown(rows: Sequence[Row]) -> str:
    """A table for every model and seed, with what it was measured on above."""
    parts = ["# Accuracy without training", "", EXPLANATION, "", machine(), ""]
    for model, seed in dict.fromkeys((row["model"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["model"], row["seed"]) == (model, seed)]
        evaluated = max((int(row["eval_samples"]) for row in own if row["eval_samples"]), default=0)
        calibrated = max((int(row["calib_samples"]) for row in own if row["calib_samples"]), default=0)
        parts += [f"## {model}", "", f"Seed {seed}" + (f", {evaluated} evaluation samples" if evaluated else "")
                  + (f", {calibrated} calibration samples" if calibrated else "") + ".", ""]  # fmt: skip
        names = [name.format(metric=own[0]["metric"]) for name in HEADINGS.values()]
        parts.append(f"| {' | '.join(names)} |")
        parts.append(f"|{'|'.join('---' if column in LEFT else '---:' for column in HEADINGS)}|")
        for row in own:
            note = "; ".join(filter(None, (row["error"] and f"failed: {row['error']}", row["note"])))
            cells = dict(row) | {"note": note.replace("|", "\\|")}
            parts.append(f"| {' | '.join(cells[column] for column in HEADINGS)} |")
        parts.append("")
    return "\n".join(parts)


def machine() -> str:
    """One line on what the figures were made with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "numpy"))
    threads = os.environ.get("OMP_NUM_THREADS") or "all"
    python = platform.python_version()
    cores = f"{platform.machine()} with {os.cpu_count()} cores, {threads} used"
    return f"Made on {cores}; Python {python}, onnxcop {onnxcop.__version__}, {versions}."


def version(name: str) -> str:
    """Of an installed distribution; `onnxruntime` may be the build for GPUs."""
    for variant in (name, f"{name}-gpu"):
        try:
            return metadata.version(variant)
        except metadata.PackageNotFoundError:
            continue
    return "(not installed as a package)"


def draw(
    rows: Sequence[Row], stem: Path, methods: Sequence[str], *, columns: int = 3,
    panel: tuple[float, float] = (5.2, 4), across: tuple[str, str] = ("macs_kept", "MACs kept"),
) -> None:  # fmt: skip
    """A panel for every model, accuracy against cost, a line for every method, as PNG and SVG.

    Args:
        rows: What was measured.
        stem: Of the files.
        methods: In the order of the legend.
        columns: Panels side by side, at most.
        panel: Width and height of one, in inches.
        across: The column of the horizontal axis, and its label.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "onnxcop"  # the same rows give the same bytes
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = min(len(models), columns)
    height = -(-len(models) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(panel[0] * columns, panel[1] * height), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for one, model in zip(axes.flat, models, strict=False):
        own = [row for row in rows if row["model"] == model]
        for place, method in enumerate(methods):
            mine = [row for row in own if row["method"] == method]
            mine.sort(key=lambda row: float(row["macs_kept"]))  # less arithmetic may take more time
            points = [(float(row[across[0]]), float(row["accuracy"])) for row in mine]
            if points:
                handles[method] = one.plot(*zip(*points, strict=True), **style(method, place))[0]
        dress(one, model, own[0], across[1])
    for one in axes.flat[len(models) :]:
        one.set_visible(False)
    ordered = [name for name in methods if name in handles]
    names = [NAMES.get(name, name) for name in ordered]
    figure.legend([handles[name] for name in ordered], names, loc="outside lower center", ncols=min(6, 2 * columns),
                  fontsize="small", frameon=False)  # fmt: skip
    figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def style(method: str, place: int) -> dict[str, Any]:
    """How a method's line looks: this package's in colours, the others' in greys."""
    given = {"marker": MARKERS[place % len(MARKERS)], "markersize": 4, "linewidth": 1.0}
    given |= {"color": COLORS.get(method, GREYS[place % len(GREYS)])}
    if method in ("ours", "with-data"):
        given |= {"linewidth": 2.5, "zorder": 5, "markersize": 6}
    elif method not in COLORS:
        given |= {"linestyle": "--" if method.endswith(("-global", "-local")) else ":"}
    return given


def dress(panel: Any, model: str, row: Row, cost: str) -> None:
    """Titles, axes and the original's line of a panel."""
    panel.set_title(model)
    panel.set_xlabel(cost)
    panel.set_ylabel(f"{row['metric']}, %")
    panel.grid(alpha=0.3)
    if row["metric"] == ERROR:
        panel.set_yscale("log")
    else:
        panel.axhline(float(row["base_accuracy"]), color="black", linewidth=0.8, alpha=0.6)
        panel.set_ylim(bottom=0)


def write(rows: Sequence[Row], stem: Path, methods: Sequence[str]) -> None:
    """Write the Markdown and, where matplotlib is installed, the plot."""
    if not rows:
        return
    stem.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    finite = [row for row in rows if row["accuracy"] not in ("", "nan", "inf") and row["macs_kept"]]
    if not finite:
        return
    try:
        draw(finite, stem, methods)
    except ImportError:
        print('no plot: matplotlib is not installed; pip install ".[bench]"', file=sys.stderr)
