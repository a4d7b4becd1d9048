"""The report of a family: a table of all results, and which of them no other result beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Protocol

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
    "model": "model", "budget": "budget", "macs": "MACs", "macs_kept": "MACs kept", "params_kept": "parameters kept",
    "bytes": "bytes", "latency_ms": "ms", "divergence": "divergence", "agreement": "agreement", "pareto": "Pareto",
    "error": "error",
}  # fmt: skip
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}.front{font-weight:600}.error{color:#b00;text-align:left}"
)


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


def pareto_chart(rows: Sequence[CurveRow]) -> str:
    """All results over their cost, with a line through those that no other beats; as SVG."""
    cost, quality = front_axes(rows)
    points = [
        (str(row["model"]), float(row[cost] or 0), float(row[quality] or 0), bool(row.get("pareto")))
        for row in rows if _number(row, cost) is not None and _number(row, quality) is not None
    ]  # fmt: skip
    width, height = _SIZE
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">']
    if points:
        (left, right), (low, high) = _span([point[1] for point in points]), _span([point[2] for point in points])

        def place(x: float, y: float) -> tuple[float, float]:
            across = _EDGE + (x - left) / (right - left) * (width - 2 * _EDGE)
            return round(across, 1), round(height - _EDGE - (y - low) / (high - low) * (height - 2 * _EDGE), 1)

        front = " ".join("{},{}".format(*place(x, y)) for _, x, y, first in sorted(points, key=lambda p: p[1]) if first)
        parts.append(f'<polyline points="{front}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
        models = list(dict.fromkeys(point[0] for point in points))
        for model, x, y, first in points:
            across, up = place(x, y)
            color = _COLORS[models.index(model) % len(_COLORS)]
            title = escape(f"{PurePath(model).name}: {cost} {x:.4g}, {quality} {y:.4g}")
            parts.append(f'<circle cx="{across}" cy="{up}" r="{6 if first else 4}" fill="{color}">'
                         f"<title>{title}</title></circle>")  # fmt: skip
        for number, model in enumerate(models):
            name, color = escape(PurePath(model).name), _COLORS[number % len(_COLORS)]
            parts.append(f'<text x="{_EDGE}" y="{16 + 14 * number}" font-size="12" fill="{color}">{name}</text>')
        for text, x, y in ((f"{left:.3g}", _EDGE, height - 34), (f"{right:.3g}", width - _EDGE, height - 34),
                           (f"{low:.3g}", 26, height - _EDGE), (f"{high:.3g}", 26, _EDGE)):  # fmt: skip
            parts.append(f'<text x="{x}" y="{y}" font-size="11" text-anchor="middle">{text}</text>')
    label = {"macs": "multiply-accumulates", "latency_ms": "time of a run, ms"}[cost]
    parts.append(f'<text x="{width / 2}" y="{height - 12}" font-size="12" text-anchor="middle">{label}</text>')
    parts.append(f'<text transform="translate(12 {height / 2}) rotate(-90)" font-size="12" text-anchor="middle">'
                 f"{quality}</text></svg>")  # fmt: skip
    return "\n".join(parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.05
    return low - margin, high + margin


def family_page(rows: Sequence[CurveRow], jobs: int) -> str:
    """The report as an HTML page that loads nothing.

    Args:
        rows: Figures by name, with `model`, `pareto` and `error`.
        jobs: Number of jobs of the family.
    """
    done = sum(row.get("budget") != 1.0 for row in rows)
    names = [name for name in _SHOWN if any(row.get(name) not in (None, "") for row in rows)]
    head = "".join(f"<th>{escape(_SHOWN[name])}</th>" for name in names)
    body = "\n".join(
        f"<tr{' class=front' if row.get('pareto') else ''}>"
        + "".join(f"<td{' class=error' if name == 'error' else ''}>{_cell(name, row.get(name))}</td>" for name in names)
        + "</tr>"
        for row in rows
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Pruned models</title>\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style></head><body><h1>Pruned models</h1><p>{done} of {jobs} jobs are done.</p>\n"
        f"{pareto_chart(rows)}\n<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></body></html>\n"
    )


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name == "pareto":
        return "✓" if value else ""
    if name == "model":
        return f"<bdi>{escape(PurePath(str(value)).name)}</bdi>"
    if isinstance(value, float):
        return f"{value:.1%}" if name.endswith("_kept") or name == "agreement" else f"{value:.4g}"
    return escape(str(value))
