"""The report as Markdown, for pull requests, issues and notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from onnxcop._base.formatting import counted
from onnxcop.report import text as story
from onnxcop.report.document import ReportData


def markdown(data: ReportData) -> str:
    """Write a report as GitHub-flavoured Markdown."""
    parts = (_summary, _layers, _curve, _correlations, _frozen, _how)
    return "\n".join(line for part in parts for line in (*part(data), "")).rstrip() + "\n"


def _summary(data: ReportData) -> Iterator[str]:
    report = data.report
    yield f"# Pruning of {_code(report.model)}"
    yield ""
    yield from _table(
        ("", "before", "after", "kept"), ((r.name, r.before, r.after, r.kept) for r in story.rows(report))
    )
    yield ""
    for line in story.sentences(report, data.settings):
        yield f"- {_plain(line)}"
    for warning in report.warnings:
        yield f"- **Warning:** {_plain(warning)}"


def _layers(data: ReportData) -> Iterator[str]:
    yield "## Layers"
    yield ""
    yield from _table(
        ("layer", "operator", "width", "MACs", "parameters"),
        (
            (
                _code(layer.name), _plain(layer.op), _change(layer.width, layer.kept),
                _change(layer.macs, layer.macs_after), _change(layer.params, layer.params_after),
            )
            for layer in data.layers
        ),
    )  # fmt: skip


def _curve(data: ReportData) -> Iterator[str]:
    yield "## Divergence on the way to the budget"
    yield ""
    if not data.way:
        yield _plain(story.NO_CURVE)
        return
    yield from _table(
        ("after", "MACs left", "divergence", "agreement"),
        (
            (
                _plain(point.name), f"{point.macs:.1%}", f"{point.divergence:.4g}",
                "" if point.agreement is None else f"{point.agreement:.1%}",
            )
            for point in data.way
        ),
    )  # fmt: skip


def _correlations(data: ReportData) -> Iterator[str]:
    yield "## Correlation"
    yield ""
    yield (
        "How strongly a channel is correlated with the kept channel nearest to it, on average over the "
        "removed and over the kept ones. The matrices themselves are in the HTML and JSON reports."
    )
    yield ""
    rows = []
    for found in data.correlations:
        gone, kept = found.strongest()
        rows.append((
            _code(found.layer), found.measure, str(len(found.removed)), str(len(found.channels)),
            _number(gone), _number(kept),
        ))  # fmt: skip
    yield from _table(("read by", "measured on", "removed", "of", "removed ones", "kept ones"), rows)
    for note in data.left_out:
        yield ""
        yield f"Left out: {_plain(note)}."


def _frozen(data: ReportData) -> Iterator[str]:
    yield "## Frozen"
    yield ""
    if not data.frozen:
        yield "Nothing is frozen."
    else:
        yield from _table(
            ("layer", "filters frozen", "why"),
            (
                (_code(f.name), f"{f.filters - f.prunable} of {f.filters}", _plain("; ".join(f.reasons)))
                for f in data.frozen
            ),
        )
    for reason in data.report.declined:
        yield ""
        yield f"Not followed: {_plain(reason)}"


def _how(data: ReportData) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    if data.command:
        fence = "`" * max(3, 1 + _longest_run(data.command))
        yield from (f"{fence}sh", data.command, fence, "")
    for name, entries in story.provenance(data):
        yield f"- {name}: " + _plain(", ".join(f"{key} {value}" for key, value in entries))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return counted(before) if before == after else f"{counted(before)} → {counted(after)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _code(text: Any) -> str:
    """Text as code, whatever it holds, in a cell of a table too."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + _longest_run(flat))
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def _plain(text: Any) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(str(text).split()))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
