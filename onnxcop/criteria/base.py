"""What a filter is worth: the `Criterion` protocol and the baselines.

A criterion turns a traced model (and, if it wants, calibration statistics) into a `Ranking`: an
importance per unit, comparable over the whole network. The allocator removes the least important
unit, tells the ranking, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx

from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.analysis.cost import CostModel
from onnxcop.analysis.layers import Layer, layer_weights, layers_of
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.coupling.groups import Structure
from onnxcop.errors import CalibrationError
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
        """float64 [units], lowest goes first, when axis a keeps `kept[a]` indices."""
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


def produced_filters(context: PruningContext) -> list[tuple[IntArray, FloatArray]]:
    """Filters of every layer that produces units: (unit per filter, float64 [filters, weights])."""
    structure, found = context.structure, []
    for contraction in structure.coupling.findings.contractions:
        kernel = contraction.kernel
        if kernel is None or contraction.produced is None:
            continue
        units = structure.units_on(contraction.produced)
        if not (units >= 0).any():
            continue
        name = context.weights.nodes[contraction.node].input[kernel.input]
        values = context.weights.read(name)
        if values is None:
            continue
        filters = np.moveaxis(values.astype(np.float64), kernel.out_axis, 0)
        filters = filters.reshape(values.shape[kernel.out_axis], -1)
        if len(units) != len(filters):  # one group's outputs of a transposed convolution
            filters = np.tile(filters, (len(units) // len(filters), 1))
        found.append((units, filters))
    return found


def produced_filter_counts(context: PruningContext) -> FloatArray:
    """How many filters every unit stands for, float64 [units]: depthwise ones do not count."""
    structure = context.structure
    counts = np.zeros(len(structure.unit_class))
    for contraction in structure.coupling.findings.contractions:
        if contraction.kernel is None or contraction.produced is None:
            continue
        depthwise = contraction.kernel.groups > 1 and not contraction.operands
        if depthwise and contraction.kernel.groups == len(contraction.produced):
            continue
        units = structure.units_on(contraction.produced)
        np.add.at(counts, units[units >= 0], 1.0)
    return counts


def _per_filter(context: PruningContext, measure: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """Average a measure of filters over the coupled layers, each relative to its layer's mean.

    Units that no layer makes (frequencies of an encoding of positions, say) are measured by the weights
    that read them.
    """
    made, seen = _averaged(context, produced_filters(context), measure)
    if seen.all():
        return made
    read, _ = _averaged(context, _reading_weights(context), measure)
    return np.where(seen, made, read)


def _averaged(
    context: PruningContext, rows: Iterable[tuple[IntArray, FloatArray]], measure: Callable[[FloatArray], FloatArray]
) -> tuple[FloatArray, BoolArray]:
    """A measure of rows of weights averaged by unit, and which units have any."""
    count = len(context.structure.unit_class)
    total, seen = np.zeros(count), np.zeros(count)
    for units, weights in rows:
        scores = measure(weights)
        scores = scores / max(float(scores.mean()), np.finfo(np.float64).tiny)
        live = units >= 0
        np.add.at(total, units[live], scores[live])
        np.add.at(seen, units[live], 1)
    return np.divide(total, seen, out=np.zeros(count), where=seen > 0), seen > 0


def _reading_weights(context: PruningContext) -> Iterator[tuple[IntArray, FloatArray]]:
    """Weights of every layer that reads units: (unit per channel, float64 [channels, weights])."""
    for layer in context.layers:
        weights = layer_weights(context.weights, layer)
        if weights is not None:
            yield layer.units, np.tile(weights.reshape(len(weights), -1), (layer.groups, 1))


def produced_norms(context: PruningContext) -> FloatArray:
    """L2 norm of the filters that make each unit, relative to their layer's mean, float64 [units]."""
    return _per_filter(context, lambda filters: np.linalg.norm(filters, 2, axis=1))


@dataclass(frozen=True)
class Norm:
    """Magnitude of a filter: ‖F_i‖_p = (Σ|w|^p)^(1/p), over its layer's mean; p = 1 or 2.

    Source: H. Li et al., "Pruning Filters for Efficient ConvNets", 2017. Coupled layers share the mean.
    """

    name: str
    order: int
    needs_stats: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Score by norm."""
        order = self.order
        return StaticRanking(_per_filter(context, lambda f: np.linalg.norm(f, order, axis=1)))

    def parameters(self) -> dict[str, Any]:
        """No parameters."""
        return {}


@dataclass(frozen=True)
class GeometricMedian:
    """Distance from the geometric median: Σ_j ‖F_i - F_j‖₂ over the filters j of a layer, over its mean.

    Source: Y. He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration", 2019. Coupled layers share the mean.
    """

    name: str = "fpgm"
    needs_stats: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Score by distance to the others."""

        def distances(filters: FloatArray) -> FloatArray:
            squares = (filters**2).sum(axis=1)
            gram = squares[:, None] + squares[None, :] - 2 * filters @ filters.T
            return np.asarray(np.sqrt(np.maximum(gram, 0)).sum(axis=1))

        return StaticRanking(_per_filter(context, distances))

    def parameters(self) -> dict[str, Any]:
        """No parameters."""
        return {}


@dataclass(frozen=True)
class Wanda:
    """Outgoing weights times the size of what flows into them: Σ|W_i| · √E[x_i²], over the layer's mean.

    Source: after M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    2024, who score single weights by |w| · ‖x‖. Layers that read the same channels share the mean. Units
    that only layers without statistics read are scored by the norm of their filters.
    """

    name: str = "wanda"
    needs_stats: bool = True

    def rank(self, context: PruningContext) -> Ranking:
        """Score by weights times activations."""
        if context.stats is None:
            raise CalibrationError("criterion wanda needs calibration data; give --data")
        count = len(context.structure.unit_class)
        total, seen = np.zeros(count), np.zeros(count)
        for layer in context.layers:
            weights = layer_weights(context.weights, layer)
            moments = context.stats.moments(layer)
            if weights is None or moments is None:
                continue
            flow = np.sqrt(np.maximum(np.diag(moments.second), 0))
            outgoing = np.tile(np.abs(weights).sum(axis=(1, 2)), layer.groups)
            scores = outgoing * flow
            scores = scores / max(float(scores.mean()), np.finfo(np.float64).tiny)
            live = layer.units >= 0
            np.add.at(total, layer.units[live], scores[live])
            np.add.at(seen, layer.units[live], 1)
        unseen = produced_norms(context)  # what no layer with statistics reads
        return StaticRanking(np.divide(total, seen, out=unseen, where=seen > 0))

    def parameters(self) -> dict[str, Any]:
        """No parameters."""
        return {}


@dataclass(frozen=True)
class Random:
    """Seeded uniform scores, I_i ~ U(0, 1): the baseline every criterion must beat."""

    name: str = "random"
    needs_stats: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Draw scores."""
        rng = np.random.default_rng(context.seed)
        return StaticRanking(rng.random(len(context.structure.unit_class)))

    def parameters(self) -> dict[str, Any]:
        """The seed is recorded by the plan."""
        return {}
