"""The points of a trade-off curve, and the rows of its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxcop.outputs.intervals import Estimate
from onnxcop.reconstruction.divergence import Figures
from onnxcop.report.result import PruneResult

CurveRow = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Point:
    """One point of a trade-off curve.

    Attributes:
        macs: The budget: fraction of the multiply-accumulates to keep at most.
        result: The result.
        file: Path of the written model, if it was written.
    """

    macs: float
    result: PruneResult
    file: Path | None = None

    def row(self) -> CurveRow:
        """The figures by name; shares are of the original's, None was not measured."""
        report = self.result.report
        before, after, times = report.before, report.after, report.latency
        quality = dict(report.quality)
        agreement = _agreement(report.figures)
        milliseconds = None if times is None else times.after
        return {
            "budget": self.macs,
            "macs": after.macs,
            "macs_kept": after.macs / max(before.macs, 1),
            "params": after.params,
            "params_kept": after.params / max(before.params, 1),
            "bytes": after.bytes,
            "bytes_kept": after.bytes / max(before.bytes, 1),
            "latency_ms": None if milliseconds is None else 1e3 * milliseconds.median,
            "latency_low_ms": None if milliseconds is None else 1e3 * milliseconds.low,
            "latency_high_ms": None if milliseconds is None else 1e3 * milliseconds.high,
            "latency_kept": None if times is None else times.ratio,
            "latency_kept_low": None if times is None else times.interval[0],
            "latency_kept_high": None if times is None else times.interval[1],
            "latency_expected": None if report.expected is None else report.expected.ratio,
            "divergence": quality.get("divergence"),
            **_interval("divergence", None if report.figures is None else report.figures.divergence),
            "agreement": None if agreement is None else agreement.value,
            **_interval("agreement", agreement),
            **{name.removesuffix(" after"): value for name, value in quality.items() if name.endswith(" after")},
            "seconds": sum(report.seconds.values()),
            "file": None if self.file is None else str(self.file),
        }


def _agreement(figures: Figures | None) -> Estimate | None:
    """The agreement of the first output that has one."""
    outputs = () if figures is None else figures.outputs
    return next((output.agreement for output in outputs if output.agreement is not None), None)


def _interval(name: str, estimate: Estimate | None) -> CurveRow:
    return {
        f"{name}_low": None if estimate is None else estimate.low,
        f"{name}_high": None if estimate is None else estimate.high,
    }


def original_row(point: Point) -> CurveRow:
    """The row of the original, which comes before those of the points."""
    report = point.result.report
    times, quality = report.latency, report.quality
    known: CurveRow = {
        "budget": 1.0, "macs": report.before.macs, "macs_kept": 1.0, "params": report.before.params,
        "params_kept": 1.0, "bytes": report.before.bytes, "bytes_kept": 1.0,
        "latency_ms": None if times is None else 1e3 * times.before.median,
        "latency_low_ms": None if times is None else 1e3 * times.before.low,
        "latency_high_ms": None if times is None else 1e3 * times.before.high,
        "latency_kept": None if times is None else 1.0,
        "latency_kept_low": None if times is None else 1.0,
        "latency_kept_high": None if times is None else 1.0,
        "latency_expected": None if report.expected is None else 1.0,
        "divergence": 0.0 if "divergence" in quality else None,
        "agreement": None if _agreement(report.figures) is None else 1.0,
    }  # fmt: skip
    scores = {name.removesuffix(" before"): value for name, value in quality.items() if name.endswith(" before")}
    return {**known, **scores, "seconds": None, "file": report.model}
