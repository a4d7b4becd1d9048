"""Displays of a result: a line, text, a table of rich, HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

from onnxcop._base.formatting import new_table
from onnxcop.report import text as story
from onnxcop.report.summary import Report

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_MOST_REASONS = 4


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """Every quantity before and after, and the share that is kept; in int8 too if there is such a model."""
    return [story.cells(row, report) for row in story.rows(report)]


def remarks(report: Report) -> Iterator[str]:
    """Remarks below the table: data, frozen filters, verification."""
    cut = sum(group.kept < group.width for group in report.groups)
    yield f"cut {story.filters_cut(report)} filters from {cut} of {len(report.groups)} groups"
    yield from report.choices
    if report.calibration:
        yield f"calibrated on {report.calibration}" + (f"; {story.fed_with(report)}" if report.inputs else "")
    yield from story.frozen(report, _MOST_REASONS)
    yield f"verified: {story.verified(report)}"
    yield from story.quality_lines(report)
    yield from story.int8_lines(report)
    yield from (f"warning: {warning}" for warning in report.warnings)


def one_line(report: Report) -> str:
    """The result in a line, for `repr`."""
    kept = ", ".join(f"{name} {share}" for name, _, _, share, *_ in table_rows(report)[1:4])
    return f"<PruneResult of {report.model}: keeps {kept}>"


def as_table(report: Report) -> Table:
    """The numbers as a table of rich."""
    table = new_table(*story.head(report))
    for row in table_rows(report):
        table.add_row(*row)
    return table


def as_rich(report: Report) -> Group:
    """The table and the remarks, for a console of rich."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(report.model), as_table(report), Text("\n".join(remarks(report))))


def as_text(report: Report) -> str:
    """The same in plain text."""
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=100, color_system=None).print(as_table(report))
    lines = (line.rstrip() for line in out.getvalue().strip("\n").splitlines())
    return "\n".join([report.model, *lines, *remarks(report)])


def as_html(report: Report) -> str:
    """The same for a notebook, with the groups folded away."""
    groups = [
        (group.name, str(group.width), str(group.kept), "" if group.exact else "inexact") for group in report.groups
    ]
    return (
        f"<div><strong>{escape(report.model)}</strong>"
        f"{_html_table(story.head(report), table_rows(report))}"
        + "".join(f"<div>{escape(line)}</div>" for line in remarks(report))
        + f"<details><summary>{len(groups)} groups</summary>"
        f"{_html_table(('layers', 'width', 'kept', ''), groups)}</details></div>"
    )


def _html_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    left, right = ' style="text-align:left"', ' style="text-align:right"'

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "".join(f"<{tag}{right if place else left}>{escape(cell)}</{tag}>" for place, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
