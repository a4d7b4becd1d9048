"""Output on the terminal: log lines, and the tables of results.

Results go to standard output; log lines, warnings, errors and progress go to standard error.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcop._base.formatting import new_table, plural, terminal
from onnxcop._version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from onnxcop.report.result import PruneResult
    from onnxcop.report.summary import Report

_MOST_REASONS, _MOST_GROUPS = 4, 3  # so that the summary of a run fits on one screen

_ASCII = {"→": "->", "±": "+-", "…": "...", "µ": "u", "×": "x", "≡": "==", "–": "-", "─": "-"}

log = logging.getLogger("onnxcop")


class _EchoHandler(logging.Handler):
    """Writes records to standard error, with a mark on warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            say(f"{record.levelname.lower()}: {text}")
        else:
            _to_stderr(text)


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
    """Write one line to standard error; on a terminal the part before its colon is coloured."""
    head, colon, rest = line.partition(":")
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    style = {"error": "red", "warning": "yellow"}.get(head)
    start = click.style(head + colon, fg=style, bold=True) if coloured and style else head + colon
    _to_stderr(start + rest)


def _to_stderr(line: str) -> None:
    """Write to the current standard error; above a bar while one is drawn."""
    click.echo(line, file=sys.stderr, color=True)


def write_anything() -> None:
    """Let standard output and error accept any text in any encoding: → becomes -> if there is no arrow."""
    codecs.register_error("onnxcop", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="onnxcop")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def show_json(kind: str, document: Mapping[str, Any]) -> None:
    """Write one JSON object to standard output; its kind, schema version and release come first."""
    from onnxcop._base.records import JSON_VERSION, finite

    head = {"format": f"onnxcop-{kind}", "version": JSON_VERSION, "onnxcop": __version__}
    click.echo(json.dumps(finite(head | dict(document)), indent=1, allow_nan=False, default=str))


def show_result(result: PruneResult, written: Sequence[Path], *, verbose: bool = False) -> None:
    """Show the result of a run: model, data, cut and figures."""
    from rich.text import Text

    from onnxcop.report import text as story

    console, report = terminal(), result.report
    if verbose:
        console.print(_group_table(report))
    _print(console, f"{report.model}: {story.found(report)}", *story.frozen(report, _MOST_REASONS))
    if report.declined:
        _print(console, f"not analysed: {plural(len(report.declined), 'node')}, {report.declined[0]}")
    calibration = f"calibrated on {report.calibration}" if report.calibration else "not calibrated: no data was given"
    _print(console, calibration)
    if report.inputs:
        _print(console, f"  {story.fed_with(report)}")
    _print(console, f"cut {story.cut(report, result.plan.settings)}")
    most = story.most_cut(report, _MOST_GROUPS)
    if most:
        _print(console, f"  {most}")
    _print(console, *report.choices)
    table = new_table(*story.head(report))
    table.columns[0].no_wrap = True
    for row in story.rows(report):
        name, before, after, said, *rest = story.cells(row, report)
        table.add_row(name, before, after, Text(said, "green" if row.better else "red" if row.worse else ""), *rest)
    console.print(table)
    _print(console, *story.quality_lines(report), *story.int8_lines(report))
    notes = () if report.verification is None else report.verification.notes
    _print(console, f"verified: {story.verified(report)}", *(f"  {note}" for note in notes))
    _print(console, f"wrote {', '.join(map(str, written))} in {story.times(report)}")
    if verbose:
        _print(console, *(f"  {seconds:8.2f} s {name}" for name, seconds in report.seconds.items()))


def _print(console: Console, *lines: str) -> None:
    """Print prose with the first word in bold; in a pipe a line stays one line, for other programs."""
    from rich.padding import Padding
    from rich.text import Text

    for line in lines:
        indent = len(line) - len(line.lstrip())
        text = Text(line.lstrip())
        if not indent:
            text.stylize("bold", 0, len(line.split()[0]))
        if console.is_terminal:
            console.print(Padding(text, (0, 0, 0, indent), expand=False))
        else:
            console.print(Text(" " * indent) + text, soft_wrap=True)


def _group_table(report: Report) -> Table:
    table = new_table("group", "width", "kept", "", title="dependency groups")
    for group in report.groups:
        table.add_row(group.name, str(group.width), str(group.kept), "" if group.exact else "inexact")
    return table
