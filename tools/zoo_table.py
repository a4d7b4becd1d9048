"""The tables of tools/zoo.py: one row a model, what exports of one network share, and what fell short."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

LEAST_PRUNABLE = 0.9  # of the filters that neither reach an output nor a softmax, for a model not to fall short

HEADINGS = {
    "model": "model", "convs": "convs", "groups": "groups", "filters": "filters",
    "prunable": "prunable", "given": "output or softmax", "inner": "prunable of the others",
    "macs": "MACs", "params": "params", "difference": "difference", "inexact": "inexact",
    "seconds": "seconds", "reasons": "frozen by",
}  # fmt: skip

INTRODUCTION = """# Coverage

`tools/zoo.py` writes this page. It analyses real models and published architectures from several exporters, prunes
each by the {criterion} norm to {macs} of the multiply-accumulates, verifies and times it, in a process of its own.
Names in `.legacy` and `.dynamo` are one network from PyTorch's TorchScript and torch.export exporters.

- **groups**: sets of interchangeable filters, with everything coupled to them.
- **filters**: the filters of all layers, including outputs of matrix products and recurrent layers. **prunable** is
  the share that may be removed. Filters that are the model's output, meet a softmax over channels or are alone in
  their layer may not; *prunable of the others* excludes these.
- **MACs**, **params**: the share that was kept.
- **difference**: the largest difference from the masked original on random inputs, relative to the largest value.
  Removed units that change a statistic, such as that of a LayerNorm, are **inexact** and are not compared.
- **seconds**: analysis, choice, rewriting and proof, on a shared machine of two cores.

The table says that graphs are cut correctly, not how accurate they remain: nothing is calibrated or recovered here.
Accuracy was measured on models with real weights: a [sentence encoder](transformers.md#measured-on-a-sentence-encoder),
[readers of text, speech and music](report.md#what-the-figures-mean), and [image classifiers](comparison.md).
"""


@dataclass
class Row:
    """Result of one model; fractions are of the original, None if it did not come that far.

    Attributes:
        model: File name without its suffix.
        convs: Convolutions, those in bodies of control flow included.
        groups: Dependency groups.
        units: What can be removed, one by one.
        filters: Filters of all layers.
        prunable: Fraction of them that may be removed.
        given: Filters that reach an output or a channel softmax, or are their layer's only one.
        inner: The prunable fraction of all others.
        macs: Fraction of the multiply-accumulates kept.
        params: Fraction of the parameters kept.
        difference: Largest difference from the masked original, relative to its largest value.
        inexact: Removed units that the comparison leaves out, because they change a statistic.
        reasons: What freezes most filters.
        notes: What verification could not check.
        seconds: Analysis, selection, rewriting and verification together.
        error: Why there is no result.
        signature: Widths and layers of the groups, to compare two exports of one network.
    """

    model: str
    convs: int | None = None
    groups: int | None = None
    units: int | None = None
    filters: int | None = None
    prunable: float | None = None
    given: int | None = None
    inner: float | None = None
    macs: float | None = None
    params: float | None = None
    difference: float | None = None
    inexact: int | None = None
    reasons: str = ""
    notes: str = ""
    seconds: float | None = None
    error: str = ""
    signature: str = ""


def signature(groups: Iterable[tuple[int, int, bool]]) -> str:
    """How often a group of a width, a number of layers and an exactness occurs, as `width/layers×times`."""
    counted = sorted(Counter(groups).items())
    return " ".join(f"{width}/{layers}{'' if exact else '~'}×{times}" for (width, layers, exact), times in counted)


def page(rows: Sequence[Row], macs: float, criterion: str) -> str:
    """The page of the documentation.

    Args:
        rows: One for every model, in order.
        macs: The budget, a fraction.
        criterion: Name of the criterion.
    """
    parts = [
        INTRODUCTION.format(criterion=criterion.upper(), macs=f"{macs:.0%}".replace("%", " %")),
        "\n".join(f"- {line}" for line in summary(rows, macs)),
        "## Models that fell short\n\n" + "\n".join(shortfalls(rows, macs)),
        "## Models\n\n" + "\n".join(table(rows)),
        "## Two exports of one network\n\n" + "\n".join(pairs(rows)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def summary(rows: Sequence[Row], macs: float) -> list[str]:
    """The figures of all models together."""
    done = [row for row in rows if not row.error]
    convolutional = [row for row in rows if row.convs]
    reached = [row for row in convolutional if not row.error and reaches(row, macs)]
    compared = [row for row in done if row.difference is not None]
    worst = max(compared, key=lambda row: row.difference or 0.0, default=None)
    wide = [row for row in convolutional if row.inner is not None and row.inner >= LEAST_PRUNABLE]
    lines = [
        f"{len(rows)} models; {len(done)} give a valid model that runs, and {len(compared)} were compared with their "
        "masked original (of the others all that went is inexact).",
        f"{len(convolutional)} have convolutions; {len(reached)} of them reach the budget, and in {len(wide)} at least "
        f"{LEAST_PRUNABLE:.0%} of the filters can go that neither reach an output nor a softmax.".replace("%", " %"),
    ]
    if worst is not None:
        lines.append(f"Largest difference from a masked original: {worst.difference:.1e} ({worst.model}).")
    times = [row.seconds for row in done if row.seconds is not None]
    if times:
        lines.append(f"Median time {median(times):.1f} s, longest {max(times):.1f} s.")
    return lines


def reaches(row: Row, macs: float) -> bool:
    """Whether a model came down to the budget."""
    return row.macs is not None and row.macs <= macs


def shortfalls(rows: Sequence[Row], macs: float) -> list[str]:
    """Every model without a result, over the budget, or with few prunable filters, and why."""
    lines = []
    for row in rows:
        if row.error:
            lines.append(f"- {row.model}: {row.error}")
        elif not reaches(row, macs):
            lines.append(f"- {row.model}: keeps {percent(row.macs)} of the multiply-accumulates; {row.reasons}")
        elif row.inner is not None and row.inner < LEAST_PRUNABLE:
            lines.append(f"- {row.model}: {percent(row.inner)} prunable of the others; {row.reasons}")
        if not row.error and row.notes:
            lines.append(f"- {row.model}: {row.notes}")
    return lines or ["None."]


def table(rows: Sequence[Row]) -> list[str]:
    """One line a model."""
    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    return lines + ["| " + " | ".join(cell(row, name) for name in HEADINGS) + " |" for row in rows]


def pairs(rows: Sequence[Row]) -> list[str]:
    """Results for both of PyTorch's exporters of one network, side by side."""
    by_name = {row.model: row for row in rows}
    twins = [
        (row, by_name[other])
        for row in rows
        if (other := row.model.replace(".legacy", ".dynamo")) != row.model and other in by_name
    ]
    same = sum(one.signature == two.signature for one, two in twins)
    lines = [
        f"{same} of {len(twins)} networks have the same groups in both exports, by width, number of layers and "
        "exactness. Groups that differ are listed as width/layers×times, inexact ones with a ~.",
        "",
        "| network | groups | units | filters | prunable | groups of one export alone |",
        "|---|---|---|---|---|---|",
    ]
    for one, two in twins:
        name = one.model.replace(".legacy", "")
        numbers = [
            both(text(one), text(two))
            for text in (
                lambda row: str(row.groups), lambda row: str(row.units), lambda row: str(row.filters),
                lambda row: percent(row.prunable),
            )
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(numbers)} | {alone(one.signature, two.signature)} |")
    return lines


def both(one: str, other: str) -> str:
    """A number that two exports share, or both."""
    return one if one == other else f"{one} / {other}"


def alone(one: str, other: str) -> str:
    """Entries of two signatures that are not in both."""
    left, right = set(one.split()), set(other.split())
    sides = [("legacy", left - right), ("dynamo", right - left)]
    return "; ".join(f"{name} {' '.join(sorted(entries))}" for name, entries in sides if entries)


def percent(fraction: float | None) -> str:
    """`70.0 %`, or nothing."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def cell(row: Row, name: str) -> str:
    """One entry of the table."""
    value = getattr(row, name)
    if name == "difference" and value is None and not row.error:
        return "all inexact" if row.inexact else ""
    if value is None or value == "":
        return ""
    if name in ("prunable", "inner", "macs", "params"):
        return percent(value)
    if name == "difference":
        return f"{value:.1e}"
    if name == "seconds":
        return f"{value:.1f}"
    return str(value).replace("|", "\\|")


def write_csv(path: Path, rows: list[Row]) -> None:
    """All columns of all rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """Read a file of :func:`write_csv`."""
    whole = {"convs", "groups", "units", "filters", "given", "inexact"}
    texts = {"model", "reasons", "notes", "error", "signature"}
    rows = []
    with path.open(newline="") as file:
        for entry in csv.DictReader(file):
            values: dict[str, Any] = {}
            for name, text in entry.items():
                if name in texts:
                    values[name] = text
                elif text == "":
                    values[name] = None
                else:
                    values[name] = int(text) if name in whole else float(text)
            rows.append(Row(**values))
    return rows
