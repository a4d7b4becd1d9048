"""Plots of a trade-off curve and of a training run, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcop._base.files import write_atomically
from onnxcop.errors import ModelError

if TYPE_CHECKING:
    from onnxcop.report.curve import CurveRow

SUFFIXES = (".svg", ".png", ".pdf")
_UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_COSTS = {
    "macs_kept": "multiply-accumulates", "latency_kept": "time", "latency_expected": "time (expected)",
    "params_kept": "parameters", "bytes_kept": "file size",
}  # fmt: skip
_FIXED = {"budget", "macs", "macs_kept", "params", "params_kept", "bytes", "bytes_kept", "seconds", "file"}


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before any work is done.

    Raises:
        ModelError: matplotlib is missing, or the file's name has no known suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path}: the plot's name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ModelError("the plot needs matplotlib; install it with: pip install 'onnxcop[plot]'")


def plot_curve(rows: Sequence[CurveRow], title: str, suffix: str) -> bytes:
    """Draw a trade-off curve: over the multiply-accumulates that are kept and, where it is known, over time.

    Args:
        rows: Its points, as :meth:`onnxcop.report.curve.Point.row` gives them; the original comes first.
        title: Its title.
        suffix: The format, one of :data:`SUFFIXES`.

    Returns:
        The bytes of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    upper = _quality(rows)
    times = ("latency_kept", "latency_expected")  # measured here, or expected on another device
    across = ["macs_kept", *(name for name in times if sum(row.get(name) is not None for row in rows) > 1)]
    figure = Figure(figsize=(6.4 * len(across), 2.6 + 2.2 * len(upper)), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would choose a window
    grid: Any = figure.subplots(len(upper) + 1, len(across), sharex="col", sharey="row", squeeze=False)
    for column, over in enumerate(across):
        for place, (name, label) in enumerate(upper.items()):
            _line(grid[place, column], rows, name, label, over)
            grid[place, 0].set_ylabel(label)
        _costs(grid[-1, column], rows, over)
        grid[0, column].invert_xaxis()
    figure.suptitle(title)
    for axis in grid.flat:
        axis.grid(alpha=0.3)
    out = io.BytesIO()
    # Without a date and random identifiers, equal figures give equal files.
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "onnxcop"}):
        figure.savefig(out, format=suffix.lstrip("."), metadata=_UNDATED.get(suffix.lower()))
    return out.getvalue()


def _costs(axis: Any, rows: Sequence[CurveRow], over: str) -> None:
    """The kept share of every cost, over one of them."""
    for place, (name, label) in enumerate(_COSTS.items()):
        if name != over:
            _line(axis, rows, name, label, over, color=f"C{place}")
    least = min(float(row.get(over) or 1.0) for row in rows)
    axis.plot([1.0, least], [1.0, least], ":", color="gray", label=f"as much as {_COSTS[over]}")
    axis.set_ylabel("kept")
    axis.set_xlabel(f"{_COSTS[over]} kept")
    axis.legend()


def _quality(rows: Sequence[CurveRow]) -> dict[str, str]:
    """Measures of quality by column: divergence, agreement, the user's metric."""
    measured = {name: name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    return {name: label for name, label in measured.items() if not _is_cost(name)}


def _is_cost(name: str) -> bool:
    return name in _FIXED or name.startswith("latency") or name.endswith(("_low", "_high"))


def _line(axis: Any, rows: Sequence[CurveRow], name: str, label: str, over: str, color: str = "C0") -> None:
    known = [row for row in rows if row.get(over) is not None]
    points = [(row[over], row[name]) for row in known if row.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", label=label, color=color)
    band = [(row[over], row[f"{name}_low"], row[f"{name}_high"]) for row in known
            if row.get(f"{name}_low") is not None and row.get(f"{name}_high") is not None]  # fmt: skip
    if band:
        axis.fill_between(*zip(*band, strict=True), alpha=0.2, color=color)


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Plot a training run with matplotlib.

    Args:
        path: A name that ends in .svg, .png or .pdf.
        history: Entries with `step`, `loss` and `score`.

    Raises:
        ModelError: matplotlib is missing, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would open a window
    axes: Any = figure.subplots(2, 1, sharex=True)
    for axis, name, label in zip(axes, ("loss", "score"), ("loss", "held-out score"), strict=True):
        axis.plot([entry["step"] for entry in history], [entry[name] for entry in history], marker=".")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "onnxcop"}):
        metadata = _UNDATED.get(path.suffix.lower())
        figure.savefig(out, format=path.suffix.lower().lstrip("."), metadata=metadata)
    write_atomically(path, out.getvalue())
