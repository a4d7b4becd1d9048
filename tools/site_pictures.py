"""Draws the figures of docs/how-it-works.md from models/digits_resnet.onnx, as SVG.

    pip install ".[bench]" && python tools/site_pictures.py docs/images

Every number in them is computed here: correlations, scores and curves by the package itself, accuracies on
models/digits_test.npz. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnx
import onnxruntime as ort

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "onnxcop", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
     "axes.spines.right": False, "figure.facecolor": "white", "savefig.facecolor": "white"}
)  # fmt: skip

from matplotlib import pyplot as plt  # noqa: E402

import onnxcop  # noqa: E402
from onnxcop.allocation import sensitivity as curves  # noqa: E402
from onnxcop.allocation.greedy import PruningState  # noqa: E402
from onnxcop.analysis.census import group_name  # noqa: E402
from onnxcop.criteria import cop  # noqa: E402
from onnxcop.criteria.filters import produced_norms  # noqa: E402
from onnxcop.criteria.registry import criterion_named  # noqa: E402
from onnxcop.data.open import open_data  # noqa: E402
from onnxcop.data.options import DataOptions  # noqa: E402
from onnxcop.recovery.rounds import Recovery, RecoverySettings  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "models"
MODEL, CALIB, TEST = MODELS / "digits_resnet.onnx", MODELS / "digits_calib.npz", MODELS / "digits_test.npz"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
METHODS = {
    "L1, deletion": {"criterion": "l1", "recover": "none"},
    "COP, deletion": {"criterion": "cop", "recover": "none"},
    "COP, merged and refined": {"criterion": "cop", "recover": "full", "data": CALIB},
    "measured, merged and refined (the default)": {"data": CALIB},
}  # fmt: skip
RED, BLUE, GREY = "#c62828", "#3f51b5", "#9e9e9e"


def coupling(folder: Path) -> None:
    """Filters that are removed together: a filter with everything that carries or reads its channel."""
    figure, axes = plt.subplots(figsize=(9, 2.9))
    axes.set_axis_off()
    axes.set_xlim(0, 18)
    axes.set_ylim(0, 5.6)
    axes.set_aspect("equal")

    def weights(x: float, y: float, name: str, *, row: bool, column: bool) -> None:
        axes.add_patch(mpl.patches.Rectangle((x, y), 2, 2, facecolor="#e8eaf6", edgecolor=BLUE))
        stripes = [((x, y + 1.2), 2, 0.25)] * row + [((x + 0.55, y), 0.25, 2)] * column
        for stripe in stripes:
            axes.add_patch(mpl.patches.Rectangle(*stripe, facecolor=RED))
        axes.text(x + 1, y - 0.35, name, ha="center", va="top")

    def arrow(x0: float, y0: float, x1: float, y1: float) -> None:
        axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "black"})

    weights(1.2, 3.2, "conv A: filter i", row=True, column=False)
    weights(5.2, 0.9, "conv B: filter i\nand input channel i", row=True, column=True)
    axes.add_patch(mpl.patches.Circle((9.6, 4.2), 0.45, facecolor="white", edgecolor="black"))
    axes.text(9.6, 4.2, "+", ha="center", va="center", fontsize=14)
    weights(11.6, 3.2, "conv C: input channel i", row=False, column=True)
    arrow(0.2, 4.2, 1.2, 4.2)
    arrow(3.2, 4.2, 9.15, 4.2)
    arrow(4.2, 4.2, 5.2, 2.0)
    arrow(7.2, 1.9, 9.4, 3.75)
    arrow(10.05, 4.2, 11.6, 4.2)
    arrow(13.6, 4.2, 14.6, 4.2)
    axes.text(14.8, 4.2, "one unit: all that\nis red goes, or stays,\ntogether", va="center")
    axes.text(9.6, 1.0, "the addition ties channel i of both branches; biases and\n"
              "normalization lose entry i; what reads them loses a column\n"
              "and computes what it would with that column at zero",
              va="center")  # fmt: skip
    save(figure, folder / "coupling.svg")


def greedy(folder: Path) -> None:
    """One layer's correlations, the first channel to go, and what that does to its twins."""
    analysis = onnxcop.analyze(MODEL)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ranking: Any = cop.Cop(beta=0.0, gamma=0.0).rank(context)
    table = next(t for t in ranking.tables if len(t.units) == 24)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), gridspec_kw={"width_ratios": [1, 1.35]})
    before, matrix = table.evidence.copy(), table.correlation.copy()
    first = int(np.argmax(before))
    twins = np.argsort(-matrix[first])[:3]
    shown = left.imshow(np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix), cmap="Purples", vmin=0, vmax=1)
    figure.colorbar(shown, ax=left, shrink=0.8)
    for side in (left.axhspan, left.axvspan):
        side(first - 0.5, first + 0.5, fill=False, edgecolor=RED, linewidth=1.5)
    left.set_title("correlation of outgoing weights, one layer")
    left.set_xlabel("channel")
    left.set_ylabel("channel")
    table.remove(first)
    after = table.evidence
    places = np.arange(len(before))
    colours = [RED if i == first else BLUE if i in twins else GREY for i in places]
    right.bar(places - 0.2, before, 0.4, color=colours, label="before")
    right.bar(places + 0.2, np.where(places == first, 0, after), 0.4, color=colours, alpha=0.4, label="after")
    right.set_title("how well the others stand in for a channel,\nbefore and after channel "
                    f"{first} (red) is removed")  # fmt: skip
    right.set_xlabel("channel (blue: its three closest)")
    right.set_ylabel("s, mean of the 3 largest correlations,\nless what chance gives")
    save(figure, folder / "greedy.svg")


def chosen(folder: Path) -> None:
    """The same for a whole run: which channels of each layer are left, and their importance."""
    analysis = onnxcop.analyze(MODEL)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ranking = criterion_named("cop").rank(context)
    scores = ranking.importance(PruningState(context, onnxcop.Limits()).kept)
    selection = onnxcop.choose(context, criterion_named("cop").rank(context), onnxcop.Budget(macs=0.7))
    removed = set(selection.removed.tolist())
    figure, axes = plt.subplots(figsize=(9, 3.6))
    groups = analysis.structure.groups
    for row, group in enumerate(groups):
        for unit in group.units.tolist():
            axes.scatter(scores[unit], row, s=16, color=RED if unit in removed else BLUE, alpha=0.7, linewidths=0)
    axes.set_yticks(range(len(groups)), [f"{group_name(analysis, g.index)[-34:]}  {g.width}" for g in groups])
    axes.invert_yaxis()
    axes.set_xlabel("importance by COP at the start; red goes at 70 % of the MACs, blue stays")
    save(figure, folder / "importance.svg")


def prices(folder: Path) -> None:
    """Cost of cutting each group at the network's output."""
    analysis = onnxcop.analyze(MODEL, biases=True)
    data = open_data(analysis, DataOptions(data=CALIB, samples=512, batch_size=32))
    assert data is not None
    fit, held_out = data.split(1 / 3, 0)
    state = Recovery(analysis, fit, held_out, onnxcop.EngineOptions(), RecoverySettings())
    samples = state.statistics()
    ridges = curves.choose_ridges(state.working, samples)
    fallback = produced_norms(onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost))
    known = None
    groups = analysis.structure.groups
    for share in (0.05, 0.1, 0.2, 0.35, 0.5):
        requests = {g.index: max(1, round(share * g.width)) for g in groups}
        if known is not None:
            requests = {g: n for g, n in requests.items() if n > known[g].counts[-1]}
        known = curves.measure_curves(
            state.working, samples, onnxcop.Limits(), fallback, state.options, ridges, requests=requests, known=known
        )
    assert known is not None
    figure, axes = plt.subplots(figsize=(9, 4))
    for index, curve in known.items():
        share = np.concatenate([[0], curve.counts / groups[index].width])
        axes.plot(share * 100, np.concatenate([[0], np.maximum(curve.values, 0)]), marker="o", markersize=3,
                  label=f"{group_name(analysis, index)[-34:]} ({groups[index].width})")  # fmt: skip
    axes.set_xlabel("% of the group's channels removed (the others have taken over)")
    axes.set_ylabel("divergence of the output\n(nats, held-out samples)")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, folder / "curves.svg")


def accuracy(model: onnx.ModelProto) -> float:
    """Accuracy on the test images, in percent."""
    test = np.load(TEST)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"input": test["input"]})
    return 100 * float((np.asarray(scores).argmax(axis=1) == test["labels"]).mean())


def tradeoff(folder: Path) -> None:
    """Accuracy on test pictures against the MACs that are left, nothing trained."""
    base = accuracy(onnx.load(MODEL))
    figure, axes = plt.subplots(figsize=(9, 3.8))
    for (name, settings), colour in zip(METHODS.items(), (GREY, "#ef6c00", "#7e57c2", BLUE), strict=True):
        points = [(1.0, base)]
        for macs in BUDGETS:
            result = onnxcop.prune(MODEL, macs=macs, **settings)
            points.append((result.report.after.macs / result.report.before.macs, accuracy(result.model)))
        print(name, [f"{share:.3f}: {value:.2f}" for share, value in points])
        axes.plot(
            [100 * x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name, color=colour
        )
    axes.invert_xaxis()
    axes.set_xlabel("% of the multiply-accumulates kept")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, loc="center right")
    save(figure, folder / "tradeoff.svg")


def save(figure: Any, path: Path) -> None:
    """Write a figure, the same bytes for the same figure."""
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    if os.environ.get("PNG"):
        figure.savefig(path.with_suffix(".png"), dpi=70)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("onnxcop").setLevel(logging.ERROR)
    for draw in (coupling, greedy, chosen, prices, tradeoff):
        draw(folder)


if __name__ == "__main__":
    main()
