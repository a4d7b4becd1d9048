"""Distance from the geometric median of a layer's filters: the baseline `fpgm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.criteria.base import PruningContext, Ranking, StaticRanking
from onnxcop.criteria.filters import per_filter

SUMMARIES = {"fpgm": "distance from the geometric median of the layer's filters"}


@dataclass(frozen=True)
class GeometricMedian:
    """Distance from the geometric median: Σ_j ‖F_i - F_j‖₂ over the filters j of a layer, over its mean.

    Source: Y. He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration", 2019. Coupled layers share the mean.
    """

    name: str = "fpgm"
    needs_stats: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Score by distance to the other filters."""

        def distances(filters: FloatArray) -> FloatArray:
            squares = (filters**2).sum(axis=1)
            gram = squares[:, None] + squares[None, :] - 2 * filters @ filters.T
            return np.asarray(np.sqrt(np.maximum(gram, 0)).sum(axis=1))

        return StaticRanking(per_filter(context, distances))

    def parameters(self) -> dict[str, Any]:
        """No parameters."""
        return {}


CRITERIA = (GeometricMedian(),)
