"""Short codes for the reasons that freeze filters, for programs; the words beside them are for people."""

from __future__ import annotations

from collections.abc import Mapping

_PHRASES: Mapping[str, tuple[str, ...]] = {
    "output": ("reaches a graph output",),
    "single-channel": ("makes a single channel", "is the only channel", "feeds groups of a single channel"),
    "no-rule": ("no rule for",),
    "unknown-shape": ("unknown shape",),
    "computed-weights": ("has weights that the graph computes", "whose weights are not constant"),
    "whole-axis": ("all of the axis goes together", "one group's channels", "one value per group"),
    "reduced-axis": ("over this axis", "is pooled over"),
    "statistic": ("statistics over", "mean over the pruned axis", "by the range of the whole tensor"),
    "indexed": (
        "indexed by", "is picked by its index", "is sampled by data", "is numbered across", "tells values of the data",
        "holds indices", "holds positions", "holds lengths", "holds coordinates", "holds sizes",
        "is a mask or a length",
    ),
    "fixed-partner": (
        "never pruned", "is merged with another prunable axis", "against what is not a matrix of weights",
    ),
    "size": ("has its size copied", "takes its size", "known only at run time"),
    "spatial": (
        "is convolved over", "spatial axis", "is resized", "is stretched", "is folded into", "is interleaved with",
        "is padded from", "is added to what",
    ),
    "sequence": ("is a sequence", "is a batch", "is a direction"),
    "control-flow": ("control flow", "an axis that the body runs along"),
}  # fmt: skip
OTHER = "unsupported-form"
CODES = (*_PHRASES, OTHER)


def code_of(reason: str) -> str:
    """The code of a reason in words; `unsupported-form` for an operator in a form that has no rule."""
    return next((code for code, phrases in _PHRASES.items() if any(phrase in reason for phrase in phrases)), OTHER)


def coded(reasons: Mapping[str, int]) -> list[dict[str, str | int]]:
    """Reasons with their codes and numbers of filters, as in the JSON output."""
    return [{"code": code_of(reason), "reason": reason, "filters": count} for reason, count in reasons.items()]
