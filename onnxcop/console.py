"""What the terminal shows: log lines, tables and progress.

Results go to standard output; log lines, warnings, errors and progress go to standard error. Colour
is used on a terminal only, and not where NO_COLOR is set. Rich is imported when something is drawn.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
_PIPE_WIDTH = 100  # columns where the output is no terminal
_PATIENCE = 1.0  # seconds a step may take before progress is shown

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


def _console(*, error: bool = False) -> Console:
    from rich.console import Console

    file = sys.stderr if error else sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    # Names of nodes hold brackets and colons, which mean nothing here.
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def _table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        text = place < left
        table.add_column(
            column, justify="left" if text else "right", no_wrap=not text,
            overflow="fold" if text else "ellipsis",
        )  # fmt: skip
    return table


def show_result(result: PruneResult, output: Path, *, verbose: bool = False) -> None:
    """Draw the summary of a run: cost before and after, what was cut, frozen and verified."""
    console, report = _console(), result.report
    if verbose:
        console.print(_group_table(report))
    table = _table("", "before", "after", "kept")
    before, after = report.before, report.after
    gone = sum(group.filters * (group.width - group.kept) for group in report.groups)
    for name, old, new, form in (
        ("filters", report.filters, report.filters - gone, _count),
        ("MACs", before.macs, after.macs, _count),
        ("parameters", before.params, after.params, _count),
        ("file size", before.bytes, after.bytes, _size),
    ):
        table.add_row(name, form(old), form(new), _percent(new, old))
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
    table = _table("group", "width", "kept", "", title="dependency groups")
    for group in report.groups:
        table.add_row(group.name, str(group.width), str(group.kept), "" if group.exact else "inexact")
    return table


def show_inspection(found: Inspection, *, verbose: bool = False) -> None:
    """Draw what could be pruned, what not and why."""
    console = _console()
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in found.input_shapes.items())
    console.print(f"{found.model} with {shapes}")
    console.print(
        f"{_count(found.cost.macs)} MACs, {_count(found.cost.params)} parameters, "
        f"{_size(found.cost.bytes)}; {found.filters} filters, {found.prunable:.1%} of them prunable"
    )
    if found.groups:
        table = _table(
            "layers", "width", "exact", "MACs/filter", "params/filter",
            title="dependency groups (the filters of one group go together)",
        )  # fmt: skip
        most = sys.maxsize if verbose else _MOST_NAMES
        for group in found.groups:
            table.add_row(
                _names(group.layers or (group.name,), most), str(group.width),
                "yes" if group.exact else "no", _count(group.macs), _count(group.params),
            )  # fmt: skip
        console.print(table)
    _show_inexact(console, found)
    if found.frozen_layers:
        table = _table("layer", "why", "frozen", title="frozen filters", left=2)
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
    console, most = _console(), len(found.units) if verbose else _MOST_SCORES
    settings = ", ".join(f"{name} {value}" for name, value in found.parameters.items())
    console.print(f"{model} by {found.criterion}" + (f" ({settings})" if settings else ""))
    if not found.units:
        console.print("no filter may be removed; see onnxcop inspect without --scores")
        return
    rest = len(found.units) - most
    title = "importance of filters, lowest first" + (f" (of {len(found.units)}; all with -v)" if rest > 0 else "")
    table = _table("group", "filter", "importance", *found.terms, title=title)
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


def _names(names: Sequence[str], most: int) -> str:
    more = [f"  … {len(names) - most} more"] if len(names) > most else []
    return "\n".join([names[0], *(f"  + {name}" for name in names[1:most]), *more])


def _count(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.2f} {unit}"
    return f"{value:.0f}"


def _size(value: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def _percent(new: float, old: float) -> str:
    return f"{new / old:.1%}" if old else "-"


class Progress:
    """Bars for steps that take over a second, on a terminal only.

    Used as a context manager, and called with the name of a step, how much of it is done, and how
    much there is in all (None where that is not known).
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._bars: Any = None
        self._started: dict[str, float] = {}
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: float, total: float | None = None) -> None:
        """Say how far a step has come."""
        if not self._enabled:
            return
        started = self._started.setdefault(stage, time.monotonic())
        if stage not in self._tasks:
            if time.monotonic() - started < _PATIENCE:
                return
            self._tasks[stage] = self._drawn().add_task(stage, total=total)
        self._drawn().update(self._tasks[stage], completed=done, total=total)

    def _drawn(self) -> Any:
        if self._bars is None:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(),
                progress.TaskProgressColumn(), progress.TimeRemainingColumn(),
                console=_console(error=True), transient=True,
            )  # fmt: skip
            self._bars.start()
        return self._bars
