"""Hints on surprising results: why nothing was removed, why the file is hardly smaller.

Longer answers are in docs/faq.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnxcop.report.summary import Report

_APART = 0.15  # shares of MACs and of the file that differ this much deserve a hint
_FEW = 64  # samples; with fewer, statistics of wide layers are unreliable


def hints(report: Report, budget: Mapping[str, float], *, samples: int = 0, quantized: bool = False) -> Iterator[str]:
    """Remarks on a finished run.

    Args:
        report: Its numbers.
        budget: The requested budget, by name.
        samples: Number of calibration samples; 0 without data.
        quantized: Whether the original is quantized.
    """
    if all(group.kept == group.width for group in report.groups):
        if budget:
            yield "nothing was removed: the original is within the budget already; ask for less, e.g. --macs 0.7"
        return
    macs = report.after.macs / max(report.before.macs, 1)
    size = report.after.bytes / max(report.before.bytes, 1)
    params = report.after.params / max(report.before.params, 1)
    if set(budget) == {"macs"} and size > macs + _APART:
        yield (
            f"{size:.0%} of the file are left with {macs:.0%} of the arithmetic: --macs bounds only that; "
            "for a smaller file give --params or --size, or --prefer smaller"
        )
    if set(budget) and set(budget) <= {"params", "size"} and macs > params + _APART:
        yield (
            f"{macs:.0%} of the arithmetic are left with {params:.0%} of the parameters: --params and --size bound "
            "only those; for a faster model give --macs, or --prefer faster"
        )
    if quantized:
        yield (
            "the model is already quantized, and integer weights cannot compensate for removed filters: prune the "
            "model that it was made from, and quantize the result"
        )
    if 0 < samples < _FEW:
        yield f"{samples} samples are few: with some hundreds, accuracy is higher"
    bound = budget.get("divergence")
    if bound is not None and report.figures is not None and (report.figures.divergence.low or 0.0) > bound:
        yield (
            f"the divergence is {report.figures.divergence.number()}, above the bound of {bound:g}: that holds on the "
            "samples that the run chose by; more of them, or a lower bound, bring it down"
        )
    if report.figures is not None and report.figures.warnings:
        yield (
            "if outputs differ this much, give more samples, cut less, or bound the loss with --divergence or "
            "--max-drop; is the preprocessing right?"
        )
