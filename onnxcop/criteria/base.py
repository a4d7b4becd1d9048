"""What a filter is worth: the `Criterion` protocol, and what a criterion may look at.

A criterion turns a traced model (and, if it wants, calibration statistics) into a `Ranking`: an
importance per unit, comparable over the whole network. The allocator removes the least important
unit, updates the ranking, and continues.
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
    """Everything a criterion may look at.

    Attributes:
        model: The original model.
        structure: Its units and groups.
        cost: Its cost model.
        layers: The layers that consume units.
        weights: Access to weight values.
        stats: Statistics of the calibration run, None without data.
        seed: For criteria that draw.
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
        return cls(model, structure, cost, tuple(layers_of(model, structure)), Weights.of(model), stats, seed)


class Ranking(Protocol):
    """Importance of units while a selection grows."""

    def importance(self, kept: IntArray) -> FloatArray:
        """float64 [units], lowest is removed first, when axis a keeps `kept[a]` indices."""
        ...

    def remove(self, unit: int) -> None:
        """Learn that a unit has been removed."""
        ...

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """The parts that the importance is made of, by name, each float64 [units]."""
        ...


class Criterion(Protocol):
    """A way of ranking units.

    Attributes:
        name: How users call it.
        needs_stats: Whether it cannot work without calibration data.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_stats(self) -> bool: ...

    def rank(self, context: PruningContext) -> Ranking:
        """Score the units of a model."""
        ...

    def parameters(self) -> dict[str, Any]:
        """What a plan records, so that a result can be explained."""
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
        """Nothing to learn."""

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """The named parts."""
        return self.parts or {"score": self.scores}
