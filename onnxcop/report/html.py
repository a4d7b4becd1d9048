"""The report as one page that loads nothing: markup, style, charts, matrices and the script that draws them.

Everything that a model brings along, names above all, is escaped, and the page's own policy forbids it to
load or run anything but what is written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from onnxcop._base.formatting import counted
from onnxcop.report import text as story
from onnxcop.report.charts import curve, histogram, meter
from onnxcop.report.document import ReportData

_MOST_LAYERS = 400  # rows of a chart
_SECTIONS = (
    ("summary", "Summary"), ("widths", "Widths"), ("costs", "Where cost went"), ("curve", "Divergence"),
    ("importance", "Importance"),
    ("correlation", "Correlation"), ("frozen", "Frozen"), ("made", "How it was made"),
)  # fmt: skip


def page(data: ReportData) -> str:
    """Write a report as HTML."""
    style, script = _resource("style.css"), _resource("script.js")
    title = escape(f"{PurePath(data.report.model).name}: pruned")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}"
    bodies = (
        _summary(data),
        _widths(data),
        _costs(data),
        _curve(data),
        _importance(data),
        _correlation(data),
        _frozen(data),
        _made(data),
    )
    sections = "\n".join(
        f'<section id="{key}"><h2>{name}</h2>\n{"".join(body)}</section>'
        for (key, name), body in zip(_SECTIONS, bodies, strict=True)
    )
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in _SECTIONS)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="onnxcop {escape(data.versions.get("onnxcop", ""))}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{_name(PurePath(data.report.model).name)}</h1>
<p class="soft">{escape(_headline(data))}</p>
{_cards(data)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{sections}
</main>
<footer>{escape(" · ".join(f"{name} {version}" for name, version in data.versions.items()))}</footer>
<script type="application/json" id="matrices">{_json([m.to_dict() for m in data.correlations])}</script>
{f"<script>{script}</script>" if data.correlations else ""}
</body>
</html>
"""


def _headline(data: ReportData) -> str:
    report = data.report
    return f"Pruned with onnxcop: {story.found(report)}; cut {story.cut(report, data.settings)}."


def _cards(data: ReportData) -> str:
    """The final table once more, as numbers to be seen from afar."""
    cards = []
    for row in story.rows(data.report):
        before, after = (part.replace(" ", "\u00a0") for part in (row.before, row.after))
        head = row.kept or after
        text = f"{before} → {after}" if row.kept else f"{before} before" if before else ""
        cards.append(
            f'<div class="card"><span>{escape(row.name)}</span><b>{escape(head)}</b><span>{escape(text)}</span></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _summary(data: ReportData) -> Iterator[str]:
    for warning in data.report.warnings:
        yield f'<p class="warning">{escape(warning)}</p>'
    yield _list(story.sentences(data.report, data.settings))
    yield _table(
        ("", "before", "after", "kept"), ((r.name, r.before, r.after, r.kept) for r in story.rows(data.report))
    )


def _widths(data: ReportData) -> Iterator[str]:
    layers = [layer for layer in data.layers if layer.width is not None and layer.kept is not None]
    # A wide layer that stays as it is, an embedding's or a classifier's, would make dots of all others.
    cut = [layer.width or 0 for layer in layers if layer.kept != layer.width]
    widest = max((layer.width or 0 for layer in layers), default=0)
    most = max(cut, default=widest)
    note = "" if most == widest else f" Bars end at {most}, the widest layer that lost channels."
    yield f"<p>The channels that every layer makes.{note} {_KEY}</p>"
    yield '<table class="bars"><thead><tr><th>layer</th><th></th><th class="number">channels</th></tr></thead><tbody>'
    for layer in layers[:_MOST_LAYERS]:
        width, kept = layer.width or 0, layer.kept or 0
        yield (
            f'<tr><th scope="row">{_name(layer.name)}</th><td class="bar">{meter(width, kept, most)}</td>'
            f'<td class="number">{_change(width, kept)}</td></tr>'
        )
    yield "</tbody></table>" + _more(layers)


def _costs(data: ReportData) -> Iterator[str]:
    layers = [layer for layer in data.layers if layer.macs or layer.params]
    macs, params = max((x.macs for x in layers), default=0), max((x.params for x in layers), default=0)
    yield f"<p>The multiply-accumulates (of one sample) and parameters of every layer. {_KEY}</p>"
    yield _largest("multiply-accumulates", [(layer.macs - layer.macs_after, layer.name) for layer in layers])
    yield _largest("parameters", [(layer.params - layer.params_after, layer.name) for layer in layers])
    yield (
        '<table class="bars two"><thead><tr><th>layer</th><th>MACs</th><th></th>'
        "<th>parameters</th><th></th></tr></thead><tbody>"
    )
    for layer in layers[:_MOST_LAYERS]:
        yield (
            f'<tr><th scope="row">{_name(layer.name)}</th>'
            f'<td class="bar">{meter(layer.macs, layer.macs_after, macs)}</td>'
            f'<td class="number">{_change(layer.macs, layer.macs_after)}{_unit("MACs")}</td>'
            f'<td class="bar">{meter(layer.params, layer.params_after, params)}</td>'
            f'<td class="number">{_change(layer.params, layer.params_after)}{_unit("params")}</td></tr>'
        )
    yield "</tbody></table>" + _more(layers)


def _largest(what: str, savings: Sequence[tuple[float, str]]) -> str:
    """Which layers gave most of what was removed."""
    total = sum(saved for saved, _ in savings)
    if total <= 0:
        return f"<p>No {what} were removed.</p>"
    best = sorted(savings, reverse=True)[:3]
    named = ", ".join(f"{saved / total:.0%} from {_name(name)}" for saved, name in best if saved)
    return f"<p>Of the {what} that were removed, {named}.</p>"


def _curve(data: ReportData) -> Iterator[str]:
    value = data.report.quality.get("divergence")
    if not data.way or value is None or not math.isfinite(value):
        yield f"<p>{escape(story.NO_CURVE)}</p>"
        return
    yield (
        "<p>How far the outputs on held-out samples were from the original's, after every step that was tried "
        "on the way to the budget. The line joins the best at each share; a broken line is the budget. The result is "
        "marked at what was measured on samples that no choice has seen.</p>"
    )
    share = data.report.after.macs / max(data.report.before.macs, 1.0)
    yield curve(data.way, (share, value), data.budget.get("macs"), data.budget.get("divergence"))
    steps = (
        (p.name, f"{p.macs:.1%}", f"{p.divergence:.4g}", "" if p.agreement is None else f"{p.agreement:.1%}")
        for p in data.way
    )
    table = _table(("step", "MACs left", "divergence", "agreement"), steps)
    yield f"<details><summary>Every step in numbers</summary>{table}</details>"


def _importance(data: ReportData) -> Iterator[str]:
    found = data.importance
    if found is None:
        yield "<p>COP's importance was not computed: the model is large, or the statistics are missing.</p>"
        return
    alpha, beta, gamma = found.weights
    chosen = "chose the filters" if found.decided else "did not choose the filters; its importance is for comparison"
    dead = f" {counted(found.dead)} with outgoing weights near zero are not counted." if found.dead else ""
    yield (
        f"<p>COP's importance of all filters (with what is coupled to them) before any was removed, by correlation "
        f"alone and with the terms of arithmetic and parameters. {escape(found.criterion)} {chosen}.{dead} "
        '<span class="small soft"><span class="key kept"></span>left<span class="key out"></span>removed</span></p>'
    )
    yield f'<div class="pair">{histogram(found.correlation, f"{alpha:g} (1 - s)")}'
    label = f"{alpha:g} (1 - s) + {beta:g} (1 - log C / max) + {gamma:g} (1 - log P / max)"
    yield f"{histogram(found.regularized, label)}</div>"


def _correlation(data: ReportData) -> Iterator[str]:
    if not data.correlations:
        yield "<p>No layer has channels whose correlation could be shown.</p>"
    else:
        yield _CHOOSER
    for note in data.left_out:
        yield f'<p class="soft small">Left out: {escape(note)}.</p>'


def _frozen(data: ReportData) -> Iterator[str]:
    report = data.report
    if not data.frozen:
        yield "<p>Nothing is frozen: every filter may be removed.</p>"
    else:
        yield f"<p>{sum(report.frozen.values())} of {report.filters} filters may not be removed.</p>"
        yield _table(
            ("layer", "why", "frozen"),
            ((f.name, "; ".join(f.reasons), f"{f.filters - f.prunable} of {f.filters}") for f in data.frozen),
            text=2,
        )
    if report.declined:
        yield "<p>Nodes that could not be followed, so that what touches them is frozen:</p>" + _list(report.declined)


def _made(data: ReportData) -> Iterator[str]:
    if data.command:
        yield f"<pre>{escape(data.command)}</pre>"
    entries = (
        f"<dt>{escape(name)}</dt><dd>{escape(', '.join(f'{key} {value}' for key, value in parts))}</dd>"
        for name, parts in story.provenance(data)
        if parts
    )
    yield f"<dl>{''.join(entries)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first `text` columns are not numbers."""
    kinds = ["" if place < text else ' class="number"' for place in range(len(head))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{_name(cell)}</th>' if place == 0 else f"<td{kinds[place]}>{escape(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _change(before: float, after: float) -> str:
    return counted(before) if before == after else f"{counted(before)} → {counted(after)}"


def _unit(name: str) -> str:
    """What a number counts, for narrow screens, where the head of the table is gone."""
    return f'<span class="unit"> {name}</span>'


def _more(layers: Sequence[Any]) -> str:
    rest = len(layers) - _MOST_LAYERS
    return f'<p class="soft small">Left out: {rest} more layers; the JSON report has all.</p>' if rest > 0 else ""


def _name(text: str) -> str:
    """A name of whoever made the model: it may be broken at its joints, and does not turn the text around it."""
    return "<bdi>" + re.sub(r"(?<=\w)/", "<wbr>/", escape(text)) + "</bdi>"


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return (files("onnxcop.report") / "page" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_KEY = '<span class="small soft"><span class="key kept"></span>left<span class="key gone"></span>removed</span>'
_CHOOSER = """<p>How alike the channels are that a layer reads: |ρ|, the magnitude of Pearson's correlation, of
their outgoing weights (averaged over kernel taps, as in the COP paper) or, where there was calibration data, of
what flowed through them. Removed channels are marked at the edges.</p>
<noscript><p class="warning">The matrices are drawn by a script, which is switched off here.</p></noscript>
<div id="chooser" hidden>
<div class="chooser">
<label>Layer that reads them<select id="layer"></select></label>
<label>Measured on<select id="measure">
<option value="weights">outgoing weights</option><option value="activations">activations</option>
</select></label>
<label class="tick"><input type="checkbox" id="last"> removed channels last</label>
</div>
<div class="heat">
<canvas id="heat" role="img" width="512" height="512"></canvas>
<div class="legend">
<p id="about" aria-live="polite"></p>
<p id="reading"></p>
<p class="small soft">0 <canvas class="ramp" id="ramp" width="128" height="8" aria-hidden="true"></canvas> 1</p>
</div>
</div>
</div>
"""
