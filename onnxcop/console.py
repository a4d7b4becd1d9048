"""What the terminal shows: log lines, and the tables of results.

Results go to standard output; log lines, warnings, errors and progress go to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcop.drawing import counted, listed_names, new_table, percent, sized, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from onnxcop.inspection import Inspection
    from onnxcop.pipeline import PruneResult
    from onnxcop.report import Report
    from onnxcop.scores import Scores

_MOST_NAMES = 4  # of the layers of a group
_MOST_REASONS = 4  # so that the summary of a run fits one screen
_MOST_SCORES = 20

log = logging.getLogger("onnxcop")


class _EchoHandler(logging.Handler):
    """Writes records to standard error, warnings marked as such."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            say(f"{record.levelname.lower()}: {text}")
        else:
            click.echo(text, err=True)


@contextmanager
def logging_to_stderr(*, quiet: bool = False, debug: bool = False) -> Iterator[None]:
    """Show the package's log lines on standard error while the block runs."""
    handler = _EchoHandler()
    previous = log.level, log.propagate
    log.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = previous


def say(line: str) -> None:
    """Write one line to standard error; what stands before its colon is coloured on a terminal."""
    head, colon, rest = line.partition(":")
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    style = {"error": "red", "warning": "yellow"}.get(head)
    start = click.style(head + colon, fg=style, bold=True) if coloured and style else head + colon
    click.echo(start + rest, err=True)


def show_json(document: dict[str, Any]) -> None:
    """Write one JSON object to standard output."""
    click.echo(json.dumps(document, indent=1, allow_nan=False, default=str))


def show_result(result: PruneResult, output: Path, *, verbose: bool = False) -> None:
    """Draw the summary of a run: cost before and after, what was cut, frozen and verified."""
    console, report = terminal(), result.report
    if verbose:
        console.print(_group_table(report))
    table = new_table("", "before", "after", "kept")
    before, after = report.before, report.after
    gone = sum(group.filters * (group.width - group.kept) for group in report.groups)
    for name, old, new, form in (
        ("filters", report.filters, report.filters - gone, counted),
        ("MACs", before.macs, after.macs, counted),
        ("parameters", before.params, after.params, counted),
        ("file size", before.bytes, after.bytes, sized),
    ):
        table.add_row(name, form(old), form(new), percent(new, old))
    if report.latency is not None:
        times = report.latency
        table.add_row("latency", str(times.before), str(times.after), f"{times.ratio:.1%}")
    console.print(table)
    for line in _summary(result, output):
        console.print(line)
    if verbose:
        for name, seconds in report.seconds.items():
            console.print(f"  {seconds:8.2f} s {name}")


def _summary(result: PruneResult, output: Path) -> Iterator[str]:
    report, settings = result.report, result.plan.settings
    cut = sum(group.kept < group.width for group in report.groups)
    inexact = sum(group.kept < group.width and not group.exact for group in report.groups)
    measured = settings.get("allocate") == "measured"
    text = f"cut {cut} of {len(report.groups)} groups "
    text += "by measurement" if measured else f"by {report.criterion}"
    text += f", {inexact} of them inexact" if inexact else ""
    yield text + f"; recovery: {settings.get('recover', 'none')}"
    if report.calibration:
        yield f"calibrated on {report.calibration}"
    if report.frozen:
        yield f"frozen: {sum(report.frozen.values())} of {report.filters} filters"
        yield from _reasons(report.frozen.items(), _MOST_REASONS)
    if report.declined:
        yield f"not followed: {len(report.declined)} nodes, {report.declined[0]}"
    for name, value in report.quality.items():
        yield f"{name}: {value:.4g}"
    if report.verification is not None:
        yield f"verified: {verification_line(report.verification)}"
        yield from (f"  {note}" for note in report.verification.notes)
    yield f"wrote {output} in {sum(report.seconds.values()):.1f} s"


def _reasons(entries: Any, most: int) -> Iterator[str]:
    listed = list(entries)
    for reason, count in listed[:most]:
        yield f"  {count:6d}  {reason}"
    if len(listed) > most:
        rest = sum(count for _, count in listed[most:])
        yield f"  {rest:6d}  for {len(listed) - most} more reasons; see onnxcop inspect"


def verification_line(found: Any) -> str:
    """What a :class:`onnxcop.verify.Verification` says, in a line."""
    if found.max_difference is None:
        text = "valid and runs; outputs were not compared with the masked original"
    else:
        gap = "exactly" if found.max_difference == 0 else f"to {found.max_difference:.1e}"
        text = f"valid, runs, equals the masked original {gap}"
    if found.inexact_units:
        text += f"; {found.inexact_units} of the removed units are inexact"
    return text


def _group_table(report: Report) -> Table:
    table = new_table("group", "width", "kept", "", title="dependency groups")
    for group in report.groups:
        table.add_row(group.name, str(group.width), str(group.kept), "" if group.exact else "inexact")
    return table


def show_inspection(found: Inspection, *, verbose: bool = False) -> None:
    """Draw what could be pruned, what not and why."""
    console = terminal()
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in found.input_shapes.items())
    console.print(f"{found.model} with {shapes}")
    console.print(
        f"{counted(found.cost.macs)} MACs, {counted(found.cost.params)} parameters, "
        f"{sized(found.cost.bytes)}; {found.filters} filters, {found.prunable:.1%} of them prunable"
    )
    if found.groups:
        table = new_table(
            "layers", "width", "exact", "MACs/filter", "params/filter",
            title="dependency groups (the filters of one group go together)",
        )  # fmt: skip
        most = sys.maxsize if verbose else _MOST_NAMES
        for group in found.groups:
            table.add_row(
                listed_names(group.layers or (group.name,), most), str(group.width),
                "yes" if group.exact else "no", counted(group.macs), counted(group.params),
            )  # fmt: skip
        console.print(table)
    _show_inexact(console, found)
    if found.frozen_layers:
        table = new_table("layer", "why", "frozen", title="frozen filters", left=2)
        for layer in found.frozen_layers:
            gone = f"{layer.filters - layer.prunable} of {layer.filters}"
            table.add_row(layer.name, "; ".join(layer.reasons), gone)
        console.print(table)
    if found.declined:
        console.print("nodes that could not be followed, so that what touches them is frozen:")
        for reason in found.declined:
            console.print(f"  {reason}")


def show_scores(found: Scores, model: str, *, verbose: bool = False) -> None:
    """Draw what filters are worth: the least important ones, or all."""
    console, most = terminal(), len(found.units) if verbose else _MOST_SCORES
    settings = ", ".join(f"{name} {value}" for name, value in found.parameters.items())
    console.print(f"{model} by {found.criterion}" + (f" ({settings})" if settings else ""))
    if not found.units:
        console.print("no filter may be removed; see onnxcop inspect without --scores")
        return
    rest = len(found.units) - most
    title = "importance of filters, lowest first" + (f" (of {len(found.units)}; all with -v)" if rest > 0 else "")
    table = new_table("group", "filter", "importance", *found.terms, title=title)
    for unit in found.units[:most]:
        terms = (f"{value:.4g}" for value in unit.terms.values())
        table.add_row(unit.group, str(unit.filter), f"{unit.importance:.5g}", *terms)
    console.print(table)


def _show_inexact(console: Console, found: Inspection) -> None:
    reasons = sorted({reason for group in found.groups for reason in group.reasons})
    if reasons:
        console.print("inexact groups change a statistic that other channels share (--exact-only):")
        for reason in reasons:
            console.print(f"  {reason}")
