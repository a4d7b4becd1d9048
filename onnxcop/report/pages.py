"""The report as an HTML page that loads nothing, and as GitHub-flavoured Markdown, from templates in `page/`.

All text from a model, above all names, is escaped. The HTML page's own content policy forbids loading or running
anything that is not part of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import BaseLoader, Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from onnxcop._base.formatting import counted
from onnxcop.report import charts, text
from onnxcop.report.document import ReportData
from onnxcop.report.layers import LayerChange

_MOST_LAYERS = 400  # rows of a chart
_SECTIONS = (
    ("summary", "Summary"), ("widths", "Widths"), ("costs", "Where cost went"), ("curve", "Divergence"),
    ("importance", "Importance"), ("correlation", "Correlation"), ("frozen", "Frozen"), ("made", "How it was made"),
)  # fmt: skip


def html(data: ReportData) -> str:
    """Write a report as HTML."""
    makers = [layer for layer in data.layers if layer.width is not None and layer.kept is not None]
    widest = max((layer.width or 0 for layer in makers), default=0)
    costly = [layer for layer in data.layers if layer.macs or layer.params]
    values = {
        "style": _resource("style.css"), "script": _resource("script.js"), "sections": _SECTIONS,
        "file": PurePath(data.report.model).name, "most_layers": _MOST_LAYERS,
        # A wide unchanged layer, such as an embedding or a classifier, would shrink all others to dots.
        "makers": makers, "widest": widest,
        "most": max((layer.width or 0 for layer in makers if layer.kept != layer.width), default=widest),
        "costly": costly, "savings": lambda what: _largest_savings(costly, what),
        "most_macs": max((layer.macs for layer in costly), default=0),
        "most_params": max((layer.params for layer in costly), default=0),
        "way_charts": _way_charts(data), "histograms": _histograms(data),
        "matrices": _json([matrix.to_dict() for matrix in data.correlations]),
    }  # fmt: skip
    return _render("report.html.j2", data, values)


def markdown(data: ReportData) -> str:
    """Write a report as Markdown."""
    return _render("report.md.j2", data, {}).rstrip() + "\n"


def _environment(name: str) -> Environment:
    """The templates of `page/`, for one of them: pages escape what authors of models wrote, Markdown by filters."""
    loader: BaseLoader = FunctionLoader(_resource)
    made = Environment(
        loader=loader,
        autoescape=name.endswith((".html.j2", ".svg.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(name=_name, digest=_digest)
    return made


def from_template(name: str, **values: Any) -> str:
    """A template of `page/` with values, and with the style of the report as `style`."""
    return _environment(name).get_template(name).render(style=_resource("style.css"), **values)


def _render(name: str, data: ReportData, values: Mapping[str, Any]) -> str:
    found = _environment(name)
    found.filters.update(
        unbroken=_unbroken, counted=counted, code=_code, plain=_plain, fence=_fence,
        cells=lambda row: text.cells(row, data.report),
    )  # fmt: skip
    found.globals.update(meter=lambda *shares: Markup(charts.meter(*shares)), change=_change, text=text)
    columns, steps = _steps(data)
    frozen = [(f.name, "; ".join(f.reasons), f"{f.filters - f.prunable} of {f.filters}") for f in data.frozen]
    provenance = [
        (title, ", ".join(f"{key} {value}" for key, value in entries)) for title, entries in text.origin(data)
    ]
    return found.get_template(name).render(
        data=data, report=data.report, rows=[*text.rows(data.report)], columns=columns, steps=steps, frozen=frozen,
        provenance=provenance, **values,
    )  # fmt: skip


def _largest_savings(layers: Sequence[LayerChange], what: str) -> list[tuple[float, str]]:
    """The layers with the largest shares of the savings."""
    savings = [(getattr(layer, what) - getattr(layer, f"{what}_after"), layer.name) for layer in layers]
    total = sum(saved for saved, _ in savings)
    return [(saved / total, name) for saved, name in sorted(savings, reverse=True)[:3] if saved] if total > 0 else []


def _steps(data: ReportData) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The measurements on the way to the budget as a table: its columns, without empty ones, and its rows."""
    columns = {
        "step": [point.name for point in data.way],
        "MACs left": [f"{point.macs:.1%}" for point in data.way],
        "time left": ["" if point.time is None else f"{point.time:.1%}" for point in data.way],
        "divergence": [f"{point.divergence:.4g}" for point in data.way],
        "agreement": ["" if point.agreement is None else f"{point.agreement:.1%}" for point in data.way],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return tuple(shown), list(zip(*shown.values(), strict=True))


def _way_charts(data: ReportData) -> list[Markup]:
    """Divergence against multiply-accumulates and, where it is known, against time."""
    report, value = data.report, data.report.quality.get("divergence")
    if not data.way or value is None or not math.isfinite(value):
        return []
    bound = data.budget.get("divergence")
    share = report.after.macs / max(report.before.macs, 1.0)
    drawn = [charts.way_chart(data.way, (share, value), data.budget.get("macs"), bound)]
    known = report.latency or report.expected
    if known is not None and any(point.time is not None for point in data.way):
        drawn.append(charts.way_chart(data.way, (known.ratio, value), data.budget.get("latency"), bound, charts.TIME))
    return [Markup(one) for one in drawn]


def _histograms(data: ReportData) -> list[Markup]:
    if data.importance is None:
        return []
    alpha, beta, gamma = data.importance.weights
    label = f"{alpha:g} (1 - s) + {beta:g} (1 - log C / max) + {gamma:g} (1 - log P / max)"
    shown = ((data.importance.correlation, f"{alpha:g} (1 - s)"), (data.importance.regularized, label))
    return [Markup(charts.histogram(*one)) for one in shown]


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return counted(before) if before == after else f"{counted(before)} → {counted(after)}"


def _name(name: str) -> Markup:
    """A name from the author of the model: it may be broken at separators, and cannot change the text direction."""
    return Markup("<bdi>{}</bdi>").format(Markup(re.sub(r"(?<=\w)/", "<wbr>/", escape(name))))


def _unbroken(number: str) -> str:
    return number.replace(" ", "\u00a0")


def _json(value: Any) -> Markup:
    """JSON that cannot end the element around it."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026"))


def _digest(content: str) -> Markup:
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")


def _resource(name: str) -> str:
    return (files("onnxcop.report") / "page" / name).read_text(encoding="utf-8")


def _code(name: Any) -> str:
    """Text as Markdown code, with any content, also in a table cell."""
    flat = " ".join(str(name).split()).replace("|", "\\|")
    fence = "`" * (1 + _longest_run(flat))
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def _plain(line: Any) -> str:
    """Text without Markdown markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(str(line).split()))


def _fence(code: str) -> str:
    """A fence of backticks that do not occur in a block of code."""
    return "`" * max(3, 1 + _longest_run(code))


def _longest_run(code: str) -> int:
    return max((len(run) for run in re.findall("`+", code)), default=0)
