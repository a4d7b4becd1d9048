"""COP with multiple instead of pairwise correlation: the part of a channel that all others do not predict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.analysis.layers import layer_weights
from onnxcop.criteria.base import PruningContext, Ranking
from onnxcop.criteria.filters import produced_norms
from onnxcop.errors import CalibrationError
from onnxcop.reconstruction.obs import LayerObs

SUMMARIES = {"cop-multiple": "multiple instead of pairwise correlation (needs data)"}


@dataclass(frozen=True)
class Multiple:
    """Conditional variance: ‖W_i‖² / [(Σ + λI)⁻¹]_ii over the layer's output energy, per MAC saved.

    Σ is the covariance of the layer's input channels. The greedy form (as channels are removed, the others take
    over their part) is Optimal Brain Surgeon with Σ as Hessian; see :mod:`onnxcop.reconstruction.obs`. For λ = 0 and
    one tap it is the error of the best linear prediction of the layer's output from all other channels.

    Source: the multiple correlation in place of COP's pairwise one; the update is that of B. Hassibi,
    D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993.

    Attributes:
        name: "cop-multiple".
        ridge: λ relative to the variance of every feature.
        per_cost: Divide by the MACs that a unit's removal saves.
    """

    name: str = "cop-multiple"
    ridge: float = 1e-2
    per_cost: bool = True
    needs_stats: bool = True

    def rank(self, context: PruningContext) -> Ranking:
        """Start from the statistics of the original."""
        if context.stats is None:
            raise CalibrationError("criterion cop-multiple needs calibration data; give --data")
        solvers = []
        for layer in context.layers:
            moments, weights = context.stats.moments(layer), layer_weights(context.weights, layer)
            if moments is None or weights is None or layer.groups != 1:
                continue
            alive = np.ones(layer.channels, dtype=np.bool_)
            solvers.append(LayerObs.of(layer, weights, moments, self.ridge, alive))
        return MultipleRanking(solvers, self._prices(context), produced_norms(context))

    def parameters(self) -> dict[str, Any]:
        """The parameters to record in a plan."""
        return {"ridge": self.ridge, "per_cost": self.per_cost}

    def _prices(self, context: PruningContext) -> FloatArray:
        """Fraction of the MACs that removing one unit saves, float64 [units]."""
        structure, cost = context.structure, context.cost
        prices = np.ones(len(structure.unit_class))
        if not self.per_cost:
            return prices
        total = max(float(cost.original()[0]), 1.0)
        for group in structure.groups:
            row = structure.incidence[[int(group.units[0])], :].tocoo()
            saved = cost.change(structure.axis_sizes, row.coords[1].astype(np.int64), row.data.astype(np.int64))
            prices[group.units] = max(float(saved[0]) / total, 1e-12)
        return prices


@dataclass
class MultipleRanking:
    """Conditional variances as channels are removed."""

    solvers: list[LayerObs]
    prices: FloatArray
    fallback: FloatArray
    _where: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._costs = [solver.costs() for solver in self.solvers]
        for number, solver in enumerate(self.solvers):
            for channel, unit in enumerate(solver.layer.units.tolist()):
                if unit >= 0:
                    self._where.setdefault(unit, []).append((number, channel))
        self._seen = np.zeros(len(self.prices), dtype=np.bool_)
        self._seen[list(self._where)] = True

    def importance(self, kept: IntArray) -> FloatArray:
        """Added relative output error per MAC; units without statistics by their norm, scaled to the median."""
        total = np.zeros(len(self.prices))
        for solver, costs in zip(self.solvers, self._costs, strict=True):
            live = (solver.layer.units >= 0) & np.isfinite(costs)
            np.add.at(total, solver.layer.units[live], costs[live])
        scores = total / self.prices
        if not self._seen.all():
            middle = float(np.median(scores[self._seen])) if self._seen.any() else 1.0
            scores[~self._seen] = middle * self.fallback[~self._seen]
        return scores

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """The conditional variance per MAC."""
        return {"conditional": self.importance(kept)}

    def remove(self, unit: int) -> None:
        """Let the other channels compensate."""
        for number, channel in self._where.get(unit, ()):
            self.solvers[number].remove(np.array([channel], dtype=np.int64))
            self._costs[number] = self.solvers[number].costs()


CRITERIA = (Multiple(),)
