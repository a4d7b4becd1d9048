"""Histograms of COP's importance over all units, without and with its cost terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.cop import Cop
from onnxcop.criteria.registry import CRITERIA, criterion_named

_BINS = 24
_MOST_PARAMS = 5e7  # weights of a model; larger ones get no histogram that is only for display


@dataclass(frozen=True, slots=True)
class Histogram:
    """Number of units by importance, in bins of equal width.

    Attributes:
        low: Start of the first bin.
        high: End of the last bin.
        kept: Remaining units, bin by bin.
        removed: Removed units, bin by bin.
    """

    low: float
    high: float
    kept: tuple[int, ...]
    removed: tuple[int, ...]

    @classmethod
    def of(cls, values: FloatArray, is_removed: BoolArray) -> Histogram:
        """Count values [units]; at least one of them."""
        low, high = float(values.min()), float(values.max())
        high = high if high > low else low + 1.0
        parts = (values[~is_removed], values[is_removed])
        kept, removed = (np.histogram(part, _BINS, (low, high))[0].tolist() for part in parts)
        return cls(low, high, tuple(kept), tuple(removed))


@dataclass(frozen=True, slots=True)
class Importance:
    """COP's importance of every unit before anything is removed.

    Attributes:
        criterion: Name of the criterion.
        decided: Whether it chose the units; otherwise it is shown for comparison.
        weights: alpha, beta and gamma.
        correlation: The importance by correlation alone, α (1 - s).
        regularized: With the terms of arithmetic and parameters.
        dead: Units whose outgoing weights are (nearly) zero; they are in neither histogram.
    """

    criterion: str
    decided: bool
    weights: tuple[float, float, float]
    correlation: Histogram
    regularized: Histogram
    dead: int


def importance(
    analysis: Analysis, removed: IntArray, stats: CalibrationStats | None, criterion: Mapping[str, Any], ranked: bool
) -> Importance | None:
    """Compute the histograms; None if unavailable, or if only for display and the model is large.

    Args:
        analysis: The model.
        removed: int64, units.
        stats: Statistics of the original, if there are any.
        criterion: Name and parameters, as the plan has them.
        ranked: Whether a criterion chose the units; if not one of the COP family, COP is shown for comparison.
    """
    chosen = _criterion(criterion) if ranked else None
    used, decided = chosen or Cop(), chosen is not None
    if used.needs_stats and stats is None:
        return None
    if not decided and float(analysis.cost.original()[1]) > _MOST_PARAMS:
        return None
    context = PruningContext.of(analysis.model, analysis.structure, analysis.cost, stats)
    ranking, kept = used.rank(context), analysis.structure.axis_sizes
    terms, total = ranking.terms(kept), ranking.importance(kept)
    dead = terms.get("dead", np.zeros(len(total))) > 0
    if dead.all():
        return None
    is_removed = np.zeros(len(total), dtype=np.bool_)
    is_removed[removed] = True
    alone = used.alpha * terms["correlation"]
    return Importance(
        criterion=used.name,
        decided=decided,
        weights=(used.alpha, used.beta, used.gamma),
        correlation=Histogram.of(alone[~dead], is_removed[~dead]),
        regularized=Histogram.of(total[~dead], is_removed[~dead]),
        dead=int(dead.sum()),
    )


def _criterion(recorded: Mapping[str, Any]) -> Cop | None:
    """A criterion of the COP family from what a plan records of it."""
    name = str(recorded.get("name"))
    if not isinstance(CRITERIA.get(name), Cop):
        return None
    criterion = criterion_named(name, **{key: value for key, value in recorded.items() if key != "name"})
    return criterion if isinstance(criterion, Cop) else None
