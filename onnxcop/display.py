"""A result that shows itself: as a line, as text, as a table of rich, as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

from onnxcop.drawing import counted, new_table, percent, sized
from onnxcop.report import Report

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_HEAD = ("", "before", "after", "kept")
_MOST_REASONS = 4


def cost_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """What is counted, before, after, and what share of it is kept."""
    before, after = report.before, report.after
    gone = sum(group.filters * (group.width - group.kept) for group in report.groups)
    rows = [
        (name, form(old), form(new), percent(new, old))
        for name, old, new, form in (
            ("filters", report.filters, report.filters - gone, counted),
            ("MACs", before.macs, after.macs, counted),
            ("parameters", before.params, after.params, counted),
            ("file size", before.bytes, after.bytes, sized),
        )
    ]
    times = report.latency
    return rows if times is None else [*rows, ("latency", str(times.before), str(times.after), f"{times.ratio:.1%}")]


def remarks(report: Report) -> Iterator[str]:
    """What there is to say beside the table: data, frozen filters, measured quality, verification."""
    cut = sum(group.kept < group.width for group in report.groups)
    yield f"cut {cut} of {len(report.groups)} groups"
    if report.calibration:
        yield f"calibrated on {report.calibration}"
    if report.frozen:
        reasons = "; ".join(f"{number} {reason}" for reason, number in list(report.frozen.items())[:_MOST_REASONS])
        more = "; …" if len(report.frozen) > _MOST_REASONS else ""
        yield f"frozen: {sum(report.frozen.values())} of {report.filters} filters ({reasons}{more})"
    for name, value in report.quality.items():
        yield f"{name}: {value:.4g}"
    checked = report.verification
    if checked is not None and checked.max_difference is not None:
        yield f"verified: differs from the masked original by {checked.max_difference:.1e} of the largest output"
    elif checked is not None:
        yield "verified: valid and runs (inexact groups only, which have no masked original to equal)"
    yield from (f"warning: {warning}" for warning in report.warnings)


def one_line(report: Report) -> str:
    """The result in a line, for `repr`."""
    kept = ", ".join(f"{name} {share}" for name, _, _, share in cost_rows(report)[1:4])
    return f"<PruneResult of {report.model}: keeps {kept}>"


def as_table(report: Report) -> Table:
    """The numbers as a table of rich."""
    table = new_table(*_HEAD)
    for row in cost_rows(report):
        table.add_row(*row)
    return table


def as_rich(report: Report) -> Group:
    """The table and what there is to say beside it, for a console of rich."""
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
        f"{_html_table(_HEAD, cost_rows(report))}"
        + "".join(f"<div>{escape(line)}</div>" for line in remarks(report))
        + f"<details><summary>{len(groups)} groups</summary>"
        f"{_html_table(('layers', 'width', 'kept', ''), groups)}</details></div>"
    )


def _html_table(head: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> str:
    left, right = ' style="text-align:left"', ' style="text-align:right"'

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "".join(f"<{tag}{right if place else left}>{escape(cell)}</{tag}>" for place, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
