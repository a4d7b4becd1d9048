"""The picture of a training run: loss and held-out score over its steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcop._base.files import write_atomically
from onnxcop.report.plot import check_plot


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draw a run with matplotlib.

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
    FigureCanvasAgg(figure)  # without pyplot, which would choose a window
    axes: Any = figure.subplots(2, 1, sharex=True)
    for axis, name, label in zip(axes, ("loss", "score"), ("loss", "held-out score"), strict=True):
        axis.plot([entry["step"] for entry in history], [entry[name] for entry in history], marker=".")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "onnxcop"}):
        figure.savefig(out, format=path.suffix.lower().lstrip("."))
    write_atomically(path, out.getvalue())
