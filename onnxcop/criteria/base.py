"""Importance of filters: the `Criterion` protocol, and the data that a criterion may use.

A criterion turns a traced model (and optionally calibration statistics) into a `Ranking`: an importance per unit that
is comparable over the whole network. The allocator removes the least important unit, updates the ranking, and
continues.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.analysis.cost import CostModel
from onnxcop.analysis.layers import Layer, layers_of
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.coupling.groups import Structure
from onnxcop.graph.constants import Weights


@dataclass(frozen=True)
class PruningContext:
    """The data that a criterion may use.

    Attributes:
        model: The original model.
        structure: Its units and groups.
        cost: Its cost model.
        layers: The layers that consume units.
        weights: Access to weight values.
        stats: Statistics of the calibration run, None without data.
        seed: Random seed, for random criteria.
    """

    model: onnx.ModelProto
    structure: Structure
    cost: CostModel
    layers: tuple[Layer, ...]
    weights: Weights
    stats: CalibrationStats | None = None
    seed: int = 0

    @classmethod
    def of(
        cls, model: onnx.ModelProto, structure: Structure, cost: CostModel,
        stats: CalibrationStats | None = None, seed: int = 0,
    ) -> PruningContext:  # fmt: skip
        """Gather the layers and weights of a traced model."""
        layers, weights = tuple(layers_of(model, structure)), Weights.of(model)
        return cls(model, structure, cost, layers, weights=weights, stats=stats, seed=seed)


class Ranking(Protocol):
    """Importance of units, updated as units are removed."""

    def importance(self, kept: IntArray) -> FloatArray:
        """float64 [units], the lowest is removed first, if axis a keeps `kept[a]` indices."""
        ...

    def remove(self, unit: int) -> None:
        """Update after a unit has been removed."""
        ...

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """The terms that make up the importance, by name, each float64 [units]."""
        ...


class Criterion(Protocol):
    """A way of ranking units.

    Attributes:
        name: Its value for `--criterion`.
        needs_stats: Whether it needs calibration data.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_stats(self) -> bool: ...

    def rank(self, context: PruningContext) -> Ranking:
        """Score the units of a model."""
        ...

    def parameters(self) -> dict[str, Any]:
        """The parameters to record in a plan."""
        ...


@dataclass
class StaticRanking:
    """An importance that does not change while units are removed."""

    scores: FloatArray
    parts: dict[str, FloatArray] = field(default_factory=dict)

    def importance(self, kept: IntArray) -> FloatArray:
        """The fixed scores."""
        return self.scores

    def remove(self, unit: int) -> None:
        """Do nothing: the scores are fixed."""

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """The named parts."""
        return self.parts or {"score": self.scores}
