"""Short codes of the reasons that freeze filters, for programs; the texts are for people."""

from __future__ import annotations

from collections.abc import Mapping

_PHRASES: Mapping[str, tuple[str, ...]] = {
    "output": ("reaches a graph output",),
    "single-channel": ("makes a single channel", "is the only channel", "feeds groups of a single channel"),
    "no-rule": ("no rule for",),
    "unknown-shape": ("unknown shape",),
    "computed-weights": ("has weights that are computed in the graph", "whose weights are not constant"),
    "whole-axis": ("the whole axis would have to be removed", "one group's channels", "one value per group"),
    "reduced-axis": ("over this axis", "spatial axis of a pooling"),
    "statistic": ("statistics over", "mean over the pruned axis", "by the range of the whole tensor"),
    "indexed": (
        "indexed by", "is selected by its index", "is sampled at positions computed from data",
        "MaxPool returns indices",
        "one-hot encoding",
        "holds indices", "holds positions", "holds lengths", "holds coordinates", "holds sizes",
        "is a mask or a length",
    ),
    "fixed-partner": (
        "never pruned", "is merged with another prunable axis", "with something other than a weight matrix",
    ),
    "size": ("has its size copied", "takes its size", "known only at run time"),
    "spatial": (
        "spatial axis of a convolution", "spatial axis", "is resized", "is broadcast to a larger size",
        "is folded into", "is interleaved with",
        "is padded with", "is added to what",
    ),
    "sequence": ("is a sequence", "is a batch", "is a direction"),
    "control-flow": ("control flow", "the axis that control flow runs along"),
}  # fmt: skip
OTHER = "unsupported-form"
CODES = (*_PHRASES, OTHER)


def code_of(reason: str) -> str:
    """The code of a reason in words; `unsupported-form` for an operator in a form that has no rule."""
    return next((code for code, phrases in _PHRASES.items() if any(phrase in reason for phrase in phrases)), OTHER)


def coded(reasons: Mapping[str, int]) -> list[dict[str, str | int]]:
    """Reasons with their codes and numbers of filters, as in the JSON output."""
    return [{"code": code_of(reason), "reason": reason, "filters": count} for reason, count in reasons.items()]
