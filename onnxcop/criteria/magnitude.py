"""Magnitude of filters: the baselines `l1` and `l2`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxcop.criteria.base import PruningContext, Ranking, StaticRanking
from onnxcop.criteria.filters import filter_norms

SUMMARIES = {
    "l1": "sum of the magnitudes of a filter's weights",
    "l2": "Euclidean norm of a filter's weights",
}


@dataclass(frozen=True)
class WeightNorm:
    """Magnitude of a filter: ‖F_i‖_p = (Σ|w|^p)^(1/p), over its layer's mean; p = 1 or 2.

    Source: H. Li et al., "Pruning Filters for Efficient ConvNets", 2017. Coupled layers share the mean.
    """

    name: str
    order: int
    needs_stats: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Score by norm."""
        return StaticRanking(filter_norms(context, self.order))

    def parameters(self) -> dict[str, Any]:
        """No parameters."""
        return {}


CRITERIA = (WeightNorm("l1", 1), WeightNorm("l2", 2))
