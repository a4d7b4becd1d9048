"""The text of a report, for any display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from onnxcop._base.formatting import counted, duration, percent, plural, shortened, sized
from onnxcop.allocation.limits import Limits
from onnxcop.report.figures import figure_lines, figure_rows, quality_of
from onnxcop.report.summary import GroupReport, Report

if TYPE_CHECKING:
    from onnxcop.report.document import ReportData

NO_CURVE = (
    "There is no curve: it needs calibration data (--data) and recovery, and outputs that are finite. The divergence "
    "is measured on held-out samples after every step."
)

_NAME = 40  # letters of a group's name in a sentence
_BEFORE, _AFTER = " before", " after"


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of the final table: a quantity before and after, the kept share, and whether it is good or bad.

    `int8` is the quantity in the int8 model, with its share of the original's.
    """

    name: str
    before: str
    after: str
    kept: str = ""
    better: bool = False
    worse: bool = False
    int8: str = ""

    @property
    def said(self) -> str:
        """The kept share, with a remark if it is bad: "104 ±2%, slower"."""
        if not self.worse:
            return self.kept
        return f"{self.kept}, slower" if self.kept else "too low" if self.name != "divergence" else "too high"


def head(report: Report) -> tuple[str, ...]:
    """The names of the columns of the final table; what is in int8 has one of its own."""
    return ("", "before", "after", "kept") if report.int8 is None else ("", "before", "after", "kept", "int8")


def cells(row: TableRow, report: Report) -> tuple[str, ...]:
    """A line of the final table, as wide as its head."""
    return (row.name, row.before, row.after, row.said, row.int8)[: len(head(report))]


def rows(report: Report) -> Iterator[TableRow]:
    """The final table."""
    in_int8 = _in_int8(report)
    for row in _rows(report):
        yield replace(row, int8=in_int8.get(row.name, ""))


def _in_int8(report: Report) -> dict[str, str]:
    """The column of the int8 model in the table, by quantity."""
    int8 = report.int8
    if int8 is None:
        return {}
    cells = {"file size": f"{sized(int8.bytes)}, {percent(int8.bytes, report.before.bytes)}"}
    if int8.latency is not None:
        cells["latency"] = f"{int8.latency.after}, {int8.latency.share}{', slower' if int8.latency.slower else ''}"
    return cells | {name: text for name, text, _ in figure_rows(int8.figures)}


def _rows(report: Report) -> Iterator[TableRow]:
    before, after = report.before, report.after
    for name, old, new, form in (
        ("filters", report.filters, report.filters - filters_cut(report), counted),
        ("MACs", before.macs, after.macs, counted),
        ("parameters", before.params, after.params, counted),
        ("file size", before.bytes, after.bytes, sized),
    ):
        yield TableRow(name=name, before=form(old), after=form(new), kept=percent(new, old), better=new < old)
    if report.latency is not None:
        times = report.latency
        yield TableRow(
            name="latency",
            before=str(times.before),
            after=str(times.after),
            kept=times.share,
            better=times.ratio < 1 and not times.undecided,
            worse=times.slower,
        )
    if report.expected is not None:
        there = report.expected
        yield TableRow(
            name="latency (expected)",
            before=duration(there.before),
            after=duration(there.before * there.ratio),
            kept=f"{100 * there.ratio:.0f}%",
            better=there.ratio < 1,
        )
    yield from (TableRow(name, "", text, worse=bad) for name, text, bad in figure_rows(report.figures))
    quality, quality_lines = report.quality, quality_of(report.figures)
    for name, value in quality.items():
        if name in quality_lines:
            continue
        if name.endswith(_BEFORE) and name.removesuffix(_BEFORE) + _AFTER in quality:
            bare = name.removesuffix(_BEFORE)
            yield TableRow(bare, _score(value), _score(quality[bare + _AFTER]))
        elif not (name.endswith(_AFTER) and name.removesuffix(_AFTER) + _BEFORE in quality):
            yield TableRow(name, "", _score(value))


def filters_cut(report: Report) -> int:
    """Number of removed filters, over all layers."""
    return sum(group.filters * (group.width - group.kept) for group in report.groups)


def found(report: Report) -> str:
    """Description of the prunable model."""
    inexact = sum(not group.exact for group in report.groups)
    text = f"{report.filters} filters, {report.prunable:.1%} prunable, in {plural(len(report.groups), 'group')}"
    return text + (f" ({inexact} inexact)" if inexact else "")


def cut(report: Report, settings: Mapping[str, Any]) -> str:
    """Description of the cut, and of how it was chosen and compensated."""
    touched = [group for group in report.groups if group.kept < group.width]
    how = "by measurement" if settings.get("allocate") == "measured" else f"by {report.criterion}"
    text = f"{plural(filters_cut(report), 'filter')} from {len(touched)} of {plural(len(report.groups), 'group')}"
    inexact = sum(not group.exact for group in touched)
    text += f" {how}" + (f", {inexact} of them inexact" if inexact else "")
    return f"{text}; recovery: {settings.get('recover', 'none')}"


def fed_with(report: Report) -> str:
    """Description of the model's inputs, in a line."""
    return "; ".join(map(str, report.inputs))


def times(report: Report, most: int = 4) -> str:
    """Time of a run, its execution provider, and its longest phases, in order."""
    total = sum(report.seconds.values())
    longest = sorted(report.seconds, key=report.seconds.__getitem__, reverse=True)[:most]
    parts = [f"{name} {report.seconds[name]:.1f}" for name in report.seconds if name in longest]
    where = f" on {report.provider}" if report.provider else ""
    return f"{total:.1f} s{where}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")


def most_cut(report: Report, most: int) -> str:
    """The groups that lost the largest shares, "conv2 64→40, …"; empty if none was cut."""
    touched = sorted((g for g in report.groups if g.kept < g.width), key=_share_kept)
    text = ", ".join(f"{shortened(group.name, _NAME)} {group.width}→{group.kept}" for group in touched[:most])
    return text + (", …" if len(touched) > most else "")


def _share_kept(group: GroupReport) -> float:
    return group.kept / group.width


def sentences(report: Report, settings: Mapping[str, Any]) -> Iterator[str]:
    """The text of a report without the table."""
    yield f"Found {found(report)}."
    if report.frozen:
        yield f"Frozen: {sum(report.frozen.values())} of {report.filters} filters."
    seen = f"Calibrated on {report.calibration}" if report.calibration else "Not calibrated: no data was given"
    yield seen + (f"; {fed_with(report)}." if report.inputs else ".")
    yield f"Cut {cut(report, settings)}."
    yield from (f"{choice[:1].upper()}{choice[1:]}." for choice in report.choices)
    yield f"Verified: {verified(report)}."
    for line in (*quality_lines(report), *int8_lines(report)):
        yield f"{line.strip()[:1].upper()}{line.strip()[1:]}."


def origin(data: ReportData) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Settings and versions behind a result, under headings."""
    shapes = [(name, str(list(shape))) for name, shape in data.input_shapes.items()]
    yield "Model", [("file", data.report.model), ("SHA-256", data.sha256), *shapes]
    yield "Budget", [(name, str(value)) for name, value in data.budget.items()]
    if data.settings.get("allocate") != "measured":
        yield "Criterion", [(name, str(value)) for name, value in data.criterion.items()]
    limits, usual = data.settings.get("limits", {}), asdict(Limits(blocks=False))
    settings = {name: value for name, value in data.settings.items() if name != "limits"}
    settings |= {name: value for name, value in limits.items() if value != usual.get(name)}
    yield "Settings", [(name, str(value)) for name, value in settings.items()]
    times = data.report.latency
    if times is not None:
        how = "medians of turns ± half the distance between the quartiles; kept: the median of the shares in each turn"
        yield "Latency", [("ONNX Runtime with", times.provider), ("turns", str(times.turns)), ("shown:", how)]
    if data.report.expected is not None:
        yield "Latency", [("expected on", data.report.expected.device)]
    yield "Versions", list(data.versions.items())
    yield "Seconds", [(name, f"{seconds:.2f}") for name, seconds in data.report.seconds.items()]


def frozen(report: Report, most: int) -> Iterator[str]:
    """Number of frozen filters and the reasons, most frequent first."""
    if not report.frozen:
        return
    yield f"frozen: {sum(report.frozen.values())} of {report.filters} filters"
    listed = list(report.frozen.items())
    for reason, number in listed[:most]:
        yield f"  {number:6d}  {reason}"
    if len(listed) > most:
        rest = sum(number for _, number in listed[most:])
        yield f"  {rest:6d}  for {len(listed) - most} more reasons; see onnxcop inspect"


def quality_lines(report: Report) -> Iterator[str]:
    """Kinds of the outputs and their distance from the original's; lines after the first are indented."""
    if report.figures is None:
        why = "no output holds real numbers" if report.measured_on else "no data was given"
        yield f"not measured: how far the outputs are from the original's ({why})"
        return
    yield f"measured on {report.measured_on}, running both files"
    yield from (f"  {line}" for line in figure_lines(report.figures))


def int8_lines(report: Report) -> Iterator[str]:
    """How the int8 model was made, if one was, and what was measured of its outputs."""
    int8 = report.int8
    if int8 is None:
        return
    yield f"int8: {int8.mode} quantization by ONNX Runtime" + (f"; {int8.chosen}" if int8.chosen else "")
    if int8.figures is not None:
        yield from (f"  {line}" for line in figure_lines(int8.figures))


def verified(report: Report) -> str:
    """The checks in one line."""
    verification = report.verification
    if verification is None:
        return "nothing was verified"
    if verification.max_difference is None:
        text = "valid and runs" + (f", but not proven: {verification.unproven}" if verification.unproven else "")
    else:
        gap = "exactly" if verification.max_difference == 0 else f"to {verification.max_difference:.1e}"
        text = f"valid, runs, equals the masked original {gap}"
    if verification.other_shapes:
        text += ", at other input sizes too"
    if verification.inexact_units:
        text += f"; {verification.inexact_units} of the removed units are inexact"
    return text


def _score(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.4g}"
