"""Output of `compare` and `sweep`: two models side by side, and trade-off curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from onnxcop._base.formatting import counted, new_table, percent, sized, terminal
from onnxcop.report.figures import figure_lines

if TYPE_CHECKING:
    from rich.table import Table

    from onnxcop.pipeline.compare import Comparison, OperatorCost
    from onnxcop.pipeline.gate import Verdict
    from onnxcop.report.curve import CurveRow
    from onnxcop.runtime.latency import Latency
    from onnxcop.verification.agreement import Agreement


def show_comparison(comparison: Comparison, *, verbose: bool = False) -> None:
    """Print two models side by side: cost, latency, operators, and agreement of the outputs."""
    from rich.text import Text

    console, a, b = terminal(), comparison.a, comparison.b
    console.print(f"A  {a.model}\nB  {b.model}")
    table = new_table("", "A", "B", "B/A")
    for name, one, two, form in (
        ("filters", a.filters, b.filters, counted),
        ("MACs", a.cost.macs, b.cost.macs, counted),
        ("parameters", a.cost.params, b.cost.params, counted),
        ("file size", a.cost.bytes, b.cost.bytes, sized),
    ):
        table.add_row(name, form(one), form(two), percent(two, one))
    if comparison.latency is not None:
        times = comparison.latency
        share = Text(times.share + (", undecided" if times.undecided else ""), _colour(times))
        table.add_row("latency", str(times.before), str(times.after), share)
    console.print(table)
    operators = _operators(comparison, verbose=verbose)
    if operators.row_count:
        console.print(operators)
    if comparison.agreement is not None:
        console.print(_outputs(comparison.agreement))
        for line in _agreement(comparison.agreement, comparison.data):
            console.print(line)
    for note in comparison.notes:
        console.print(note)


def _colour(times: Latency) -> str:
    """Colour of a latency: green if it is clearly shorter, red if clearly longer."""
    return "" if times.undecided else "red" if times.slower else "green"


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print the conditions of a gate, if there are any."""
    if not verdicts:
        return
    table = new_table("gate", "measured", "")
    for verdict in verdicts:
        table.add_row(verdict.condition, verdict_text(verdict), "holds" if verdict.holds else "fails")
    terminal().print(table)


def verdict_text(verdict: Verdict) -> str:
    """The measured value for a condition."""
    return "not measured" if verdict.value is None else f"{verdict.value:.4g}"


_TIME, _TIME_WIDTH = "latency_kept", len("99.9% ±9% undecided")
_COLUMNS = {
    "budget": ("budget", "{:.4g}"),
    "macs_kept": ("MACs", "{:.1%}"),
    "params_kept": ("params", "{:.1%}"),
    "bytes_kept": ("file", "{:.1%}"),
    "latency_ms": ("ms", "{:.4g}"),
    _TIME: ("time kept", "{:.1%}"),
    "latency_expected": ("time expected", "{:.1%}"),
    "divergence": ("divergence", "{:.3g}"),
    "agreement": ("agreement", "{:.2%}"),
}
_NO_COLUMN = {"macs", "params", "bytes", "latency_low_ms", "latency_high_ms", "seconds", "file"}
_ENDS = ("_low", "_high")


def curve_head(row: CurveRow) -> str:
    """The line above the rows of a trade-off curve, with the columns of the first row."""
    return "  ".join(f"{_column(name)[0]:>{_width(name)}}" for name in _shown(row))


def curve_line(row: CurveRow, first: CurveRow) -> str:
    """A point of a trade-off curve, in the columns of the first row; the time of a slower model in red."""
    cells = []
    for name in _shown(first):
        value = row.get(name)
        text = "" if value is None else _column(name)[1].format(value)
        if name != _TIME:
            cells.append(f"{text:>{_width(name)}}")
            continue
        low, high = row.get(f"{_TIME}_low"), row.get(f"{_TIME}_high")
        slower = False
        if isinstance(low, float) and isinstance(high, float) and low < high:
            text += f" ±{50 * (high - low):.0f}%" + (" undecided" if low <= 1 <= high else "")
            slower = low > 1
        text = f"{text:>{_width(name)}}"
        cells.append(click.style(text, fg="red") if slower else text)
    return "  ".join(cells)


def _shown(row: CurveRow) -> list[str]:
    return [
        name for name, value in row.items()
        if value is not None and name not in _NO_COLUMN and not name.endswith(_ENDS)
    ]  # fmt: skip


def _column(name: str) -> tuple[str, str]:
    return _COLUMNS.get(name, (name, "{:.4g}"))


def _width(name: str) -> int:
    return _TIME_WIDTH if name == _TIME else max(len(_column(name)[0]), 7)


def _operators(comparison: Comparison, *, verbose: bool) -> Table:
    """Operators that compute something, or that differ in number between the models; all on request."""
    a, b = comparison.a.operators, comparison.b.operators
    table = new_table("operator", "nodes A", "nodes B", "MACs A", "MACs B", "B/A")
    for name in dict.fromkeys((*a, *b)):
        one, two = a.get(name), b.get(name)
        nodes = [0 if side is None else side.nodes for side in (one, two)]
        macs = [_macs(one), _macs(two)]
        if verbose or any(macs) or nodes[0] != nodes[1]:
            shown = [counted(value) if value else "" for value in macs]
            table.add_row(name, *map(str, nodes), *shown, percent(macs[1], macs[0]) if any(macs) else "")
    return table


def _macs(cost: OperatorCost | None) -> float:
    return 0.0 if cost is None else cost.macs


def _outputs(agreement: Agreement) -> Table:
    """One line per output; empty columns are left out."""
    columns = {
        "relative error": [_written(gap.error, "{:.3g}") for gap in agreement.outputs],
        "largest": [_written(gap.worst, "{:.3g}") for gap in agreement.outputs],
        "equal": [_written(gap.equal, "{:.2%}") for gap in agreement.outputs],
        "": [gap.note for gap in agreement.outputs],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = new_table("output", *shown)
    for row, gap in enumerate(agreement.outputs):
        table.add_row(gap.name, *(cells[row] for cells in shown.values()))
    return table


def _written(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _agreement(agreement: Agreement, data: str) -> Iterator[str]:
    if agreement.figures is not None:
        yield from figure_lines(agreement.figures)
    yield f"on {agreement.samples} samples: {data}"
