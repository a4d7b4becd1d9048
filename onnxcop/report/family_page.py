"""The report of a family: a table of all results, and which of them no other result beats.

Page and chart are made from templates in `page/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import PurePath
from typing import TYPE_CHECKING, Protocol

from markupsafe import Markup

from onnxcop._version import __version__
from onnxcop.report.pages import from_template

if TYPE_CHECKING:
    from onnxcop.report.curve import CurveRow


class JobRecordLike(Protocol):
    """A finished job; see :class:`onnxcop.pipeline.family.jobs.JobRecord`."""

    @property
    def model(self) -> str: ...
    @property
    def original(self) -> CurveRow: ...
    @property
    def row(self) -> CurveRow: ...
    @property
    def error(self) -> str: ...


_SIZE, _EDGE = (640, 400), 56  # pixels of the chart, and of its edge
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
_SHOWN = {
    "model": "model", "criterion": "criterion", "seed": "seed", "budget": "budget", "macs": "MACs",
    "macs_kept": "MACs kept", "params_kept": "parameters kept", "bytes": "bytes", "latency_ms": "ms",
    "divergence": "divergence", "agreement": "agreement", "pareto": "Pareto", "error": "error",
}  # fmt: skip
_LABELS = {"macs": "multiply-accumulates", "latency_ms": "time of a run, ms"}


def family_rows(records: Sequence[JobRecordLike]) -> list[CurveRow]:
    """The rows of a table: the originals, and then the results, with the model's name.

    Args:
        records: Finished jobs, in order.
    """
    rows: list[CurveRow] = []
    for place, record in enumerate(records):
        first = not any(other.model == record.model and other.original for other in records[:place])
        own = [record.original] if record.original and first else []
        rows += [{"model": record.model, **row, "error": ""} for row in own]
        rows.append({"model": record.model, **record.row, "error": record.error})
    return marked_fronts(rows)


def marked_fronts(rows: Sequence[CurveRow]) -> list[CurveRow]:
    """Rows with a column `pareto`: 1 if no other row has at most the cost and at least the quality, and one better.

    The cost is the latency if all rows have one, else the multiply-accumulates. The quality is the agreement, or the
    negative divergence; rows without either are 0.

    Args:
        rows: Figures by name, with `model`.
    """
    cost, quality = front_axes(rows)
    measured = [(_number(row, cost), _quality(row, quality)) for row in rows]
    known = [pair for pair in measured if None not in pair]
    marks = [None not in own and not any(_beats(other, own) for other in known) for own in measured]
    return [{**row, "pareto": int(mark)} for row, mark in zip(rows, marks, strict=True)]


def front_axes(rows: Sequence[Mapping[str, object]]) -> tuple[str, str]:
    """The columns of cost and quality that all finished rows have."""
    done = [row for row in rows if row.get("macs") is not None]
    cost = "latency_ms" if done and all(row.get("latency_ms") is not None for row in done) else "macs"
    quality = "agreement" if done and all(row.get("agreement") is not None for row in done) else "divergence"
    return cost, quality


def _beats(other: Sequence[float | None], own: Sequence[float | None]) -> bool:
    (cost, quality), (own_cost, own_quality) = other, own
    assert cost is not None and quality is not None and own_cost is not None and own_quality is not None
    return cost <= own_cost and quality >= own_quality and (cost < own_cost or quality > own_quality)


def _number(row: Mapping[str, object], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _quality(row: Mapping[str, object], name: str) -> float | None:
    value = _number(row, name)
    return value if value is None or name == "agreement" else -value


@dataclass(frozen=True, slots=True)
class _Dot:
    """A result in the chart: its place in pixels, whether no other beats it, its colour and its title."""

    x: float
    y: float
    first: bool
    color: str
    title: str


def pareto_chart(rows: Sequence[CurveRow]) -> str:
    """All results over their cost, with a line through those that no other beats; as SVG."""
    cost, quality = front_axes(rows)
    points = [
        (_named(row), float(row[cost] or 0), float(row[quality] or 0), bool(row.get("pareto")))
        for row in rows if _number(row, cost) is not None and _number(row, quality) is not None
    ]  # fmt: skip
    width, height = _SIZE
    across, up = _span([x for _, x, _, _ in points]), _span([y for _, _, y, _ in points])
    colors = dict(zip(dict.fromkeys(point[0] for point in points), cycle(_COLORS), strict=False))
    dots = [
        _Dot(
            x=round(_EDGE + (x - across[0]) / (across[1] - across[0]) * (width - 2 * _EDGE), 1),
            y=round(height - _EDGE - (y - up[0]) / (up[1] - up[0]) * (height - 2 * _EDGE), 1),
            first=first,
            color=colors[name],
            title=f"{name}: {cost} {x:.4g}, {quality} {y:.4g}",
        )
        for name, x, y, first in points
    ]
    return from_template(
        "pareto.svg.j2", width=width, height=height, edge=_EDGE, dots=dots, colors=colors, quality=quality,
        front=sorted((dot for dot in dots if dot.first), key=lambda dot: dot.x), across=across, up=up,
        label=_LABELS[cost],
    )  # fmt: skip


def _named(row: Mapping[str, object]) -> str:
    """The model of a row, and its criterion if there are several."""
    return " ".join([PurePath(str(row["model"])).name, *([str(row["criterion"])] if row.get("criterion") else [])])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    margin = (high - low or abs(high) or 1.0) * 0.05
    return low - margin, high + margin


def family_page(rows: Sequence[CurveRow], jobs: int) -> str:
    """The report as an HTML page that loads nothing.

    Args:
        rows: Figures by name, with `model`, `pareto` and `error`.
        jobs: Number of jobs of the family.
    """
    names = [name for name in _SHOWN if any(row.get(name) not in (None, "") for row in rows)]
    return from_template(
        "family.html.j2", jobs=jobs, done=sum(row.get("budget") != 1.0 for row in rows), version=__version__,
        titles=[_SHOWN[name] for name in names], chart=Markup(pareto_chart(rows)),
        rows=[(bool(row.get("pareto")), [(name, _cell(name, row.get(name))) for name in names]) for row in rows],
    )  # fmt: skip


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name == "pareto":
        return "✓" if value else ""
    if name == "model":
        return PurePath(str(value)).name
    if isinstance(value, float):
        return f"{value:.1%}" if name.endswith("_kept") or name == "agreement" else f"{value:.4g}"
    return str(value)
