"""Charts of the report page, as inline SVG with the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from onnxcop.reconstruction.divergence import Waypoint
from onnxcop.report.importance import Histogram

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 24, 16, 42
_WIDE_RANGE = 30  # ratio from which a logarithmic axis shows more


def meter(before: float, after: float, most: float) -> str:
    """A bar for the original amount, with the remaining amount in front.

    Args:
        before: The original amount.
        after: The remaining amount.
        most: The amount of a full bar; larger amounts are cut off.
    """
    scale = 100 / most if most > 0 else 0.0
    before, after = min(before, most), min(after, most)
    return (
        '<svg class="meter" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="before" width="{before * scale:.2f}" height="8"/>'
        f'<rect class="after" width="{after * scale:.2f}" height="8"/></svg>'
    )


@dataclass(frozen=True, slots=True)
class Across:
    """What a chart shows divergence against.

    Attributes:
        noun: Its name.
        short: Its name beside the axis.
        of: The share of it that remains at a measurement, None if that is not known.
    """

    noun: str
    short: str
    of: Callable[[Waypoint], float | None]


MACS = Across("multiply-accumulates", "MACs", lambda point: point.macs)
TIME = Across("the time of a run", "time", lambda point: point.time)


def way_chart(
    way: Sequence[Waypoint], chosen: tuple[float, float], bound: float | None, divergence: float | None,
    over: Across = MACS,
) -> str:  # fmt: skip
    """Divergence against a share that remains, by default of multiply-accumulates.

    Args:
        way: The measurements; points without a share or a finite divergence are left out.
        chosen: Share and divergence of the result.
        bound: The budget, if it bounds that share.
        divergence: The bound, if it is one on divergence.
        over: The share.
    """
    shares = ((over.of(point), point) for point in way if math.isfinite(point.divergence))
    points = [(share, point.divergence, point.name) for share, point in shares if share is not None]
    across, labels_x = _shares([*(x for x, _, _ in points), chosen[0], *([] if bound is None else [bound])])
    values = [*(y for _, y, _ in points), chosen[1], *([] if divergence is None else [divergence])]
    up, labels_y = _logarithmic(values) if _is_wide(values) else _linear(values)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Divergence from the original '
        f"against the share of {over.noun} that is left; the result keeps {chosen[0]:.1%} "
        f'at a divergence of {chosen[1]:.3g}">'
    ]
    for value, text in labels_y:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in labels_x:
        parts.append(f'<text x="{across(value):.1f}" y="{bottom + 19}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{over.short} left</text>')
    if bound is not None:
        place = f"{across(bound):.1f}"
        parts.append(f'<line class="bound" x1="{place}" x2="{place}" y1="{_TOP}" y2="{bottom}"/>')
    if divergence is not None:
        height = f"{up(divergence):.1f}"
        parts.append(f'<line class="bound" x1="{_LEFT}" x2="{right}" y1="{height}" y2="{height}"/>')
    best = _best(points)
    parts.append(f'<polyline class="path" points="{" ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in best)}"/>')
    for x, y, name in points:
        title = f"<title>{escape(name)}: {x:.1%} of the {over.short}, divergence {y:.4g}</title>"
        parts.append(f'<circle class="point" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5">{title}</circle>')
    parts.append(_result(across(chosen[0]), up(chosen[1]), chosen))
    return "".join(parts) + "</svg>"


def histogram(counts: Histogram, label: str) -> str:
    """Units by importance: bars of the remaining units, with the removed ones on top.

    Args:
        counts: The bins.
        label: Label of the axis.
    """
    most = max(1, *(k + r for k, r in zip(counts.kept, counts.removed, strict=True)))
    bottom, right, bins = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, len(counts.kept)
    across, up = _Scale(counts.low, counts.high, _LEFT, right), _Scale(0.0, float(most), bottom, _TOP)
    edges = [across(counts.low + (counts.high - counts.low) * place / bins) for place in range(bins + 1)]
    parts = [
        f'<svg class="curve histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Histogram of '
        f'{escape(label)}: {sum(counts.kept)} units left, {sum(counts.removed)} removed">'
    ]
    for value in (0, most):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value}</text>')
    for edge, anchor in ((counts.low, "start"), (counts.high, "end")):
        parts.append(f'<text x="{across(edge):.1f}" y="{bottom + 19}" text-anchor="{anchor}">{edge:.3g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>')
    for place, (kept, removed) in enumerate(zip(counts.kept, counts.removed, strict=True)):
        left, width = edges[place], max(edges[place + 1] - edges[place] - 1, 0.5)
        for name, low, high in (("after", 0, kept), ("gone", kept, kept + removed)):
            if high > low:
                height = up(low) - up(high)
                parts.append(
                    f'<rect class="{name}" x="{left:.1f}" y="{up(high):.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}"><title>{high - low}</title></rect>'
                )
    return "".join(parts) + "</svg>"


def _result(x: float, y: float, chosen: tuple[float, float]) -> str:
    side, anchor = (9, "start") if x < _WIDTH / 2 else (-9, "end")
    above = y - 9 if y > _TOP + 20 else y + 18
    return (
        f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
        f'<text class="chosen-label" x="{x + side:.1f}" y="{above:.1f}" text-anchor="{anchor}">'
        f"result: {chosen[0]:.1%}, {chosen[1]:.3g}</text>"
    )


def _best(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float]]:
    """The point of lowest divergence at each share (in whole percents), ascending."""
    lowest: dict[float, tuple[float, float]] = {}
    for x, y, _ in points:
        key = round(x, 2)
        if key not in lowest or y < lowest[key][1]:
            lowest[key] = (x, y)
    return sorted(lowest.values())


def _shares(values: Sequence[float]) -> tuple[_Scale, list[tuple[float, str]]]:
    low = math.floor(min(values) * 20) / 20 - 0.05 * (max(values) - min(values) < 0.01)
    step = 0.05 if 1 - low <= 0.3 else 0.1 if 1 - low <= 0.6 else 0.2
    low = max(0.0, math.floor(low / step + 1e-9) * step)
    ticks = [low + place * step for place in range(round((1 - low) / step) + 1)]
    return _Scale(low, 1.0, _LEFT, _WIDTH - _RIGHT), [(tick, f"{tick:.0%}") for tick in ticks]


def _is_wide(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > _WIDE_RANGE * min(positive)


def _linear(values: Sequence[float]) -> tuple[_Scale, list[tuple[float, str]]]:
    most = max(*values, 0.0) or 1.0
    step = 10 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.2, 0.5, 1.0, 2.0, 5.0) if most <= 5 * step * part)
    count = math.ceil(most / step - 1e-9)
    scale = _Scale(0.0, count * step, _HEIGHT - _BOTTOM, _TOP)
    return scale, [(place * step, f"{place * step:.3g}") for place in range(count + 1)]


def _logarithmic(values: Sequence[float]) -> tuple[_Scale, list[tuple[float, str]]]:
    positive = [value for value in values if value > 0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    step = max(1, math.ceil((high - low) / 6))
    scale = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, logarithmic=True)
    return scale, [(10.0**power, f"{10.0**power:g}") for power in range(low, high + 1, step)]


class _Scale:
    """Maps a quantity to a position on the chart; values out of range stay at the edge."""

    def __init__(self, low: float, high: float, start: float, end: float, *, logarithmic: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.logarithmic = low, high, start, end, logarithmic

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)
