"""Which channels a layer can best do without, and what compensates for them.

Let x be a layer's input channels with covariance Σ, W its outgoing weights and P = (Σ + λD)⁻¹, D the diagonal of Σ. The
least that removing channel i costs, when all others take over its part as well as linear regression
can, is ‖W_i‖² / P_ii: what is left of i after its multiple correlation with the others. This is pairwise
correlation taken to its end, and the form of Optimal Brain Surgeon (Hassibi & Stork 1993) with the
covariance as Hessian. The compensation is W ← W - P_i W_i / P_ii, and removing channels one after
another keeps P and W exact.

Where the moments are those of whole patches, a channel is a block of features, one for each tap of the
kernel: i is then a set of indices, P_ii a matrix, and all else the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.statistics import Moments
from onnxcop.reconstruction.ridge import as_features, features_of, regularized_inverse, variances

_ROUNDS = 96  # a group is emptied in about this many steps; few channels at a time
_MEMORY = 1 << 30  # bytes of inverses that are kept


@dataclass
class InverseCache:
    """(Σ + λD)⁻¹ by layer, for as long as a network stays as it is; as many as `_MEMORY` holds."""

    kept: dict[int, FloatArray] = field(default_factory=dict)

    def of(self, layer: Layer, moments: Moments, ridge: float, alive: BoolArray) -> FloatArray:
        """float64 [features, features], zero where a channel is not there; not to be changed."""
        if layer.node in self.kept:
            return self.kept[layer.node]
        covariance = moments.covariance
        found = np.zeros_like(covariance)
        live = np.flatnonzero(np.repeat(alive, len(covariance) // len(alive)))
        found[np.ix_(live, live)] = regularized_inverse(covariance[np.ix_(live, live)], ridge)
        if found.nbytes + sum(one.nbytes for one in self.kept.values()) <= _MEMORY:
            self.kept[layer.node] = found
        return found


@dataclass
class LayerObs:
    """One layer while channels leave it.

    What the channels of a group cost depends on the part of P that is theirs, and on nothing else while only they
    leave; so only that part is worked on, however many others there are.

    Attributes:
        layer: The layer.
        before: float64 [features, outputs × taps], its weights; a feature is a channel, or a tap of one where the
            moments are of patches.
        moments: Of the features.
        inverse: float64 [features, features], (Σ + λD)⁻¹ of those that are there at first; not changed.
        matter: float64 [outputs × taps], how much an error in each output counts.
        channels: int64, those that may leave, ascending.
        alive: bool [channels], which are still there.
    """

    layer: Layer
    before: FloatArray
    moments: Moments
    inverse: FloatArray
    matter: FloatArray
    channels: IntArray
    alive: BoolArray
    _gone: list[int] = field(default_factory=list)
    _part: _Part | None = None

    @classmethod
    def of(
        cls, layer: Layer, weights: FloatArray, moments: Moments, ridge: float, alive: BoolArray, *,
        importance: FloatArray | None = None, channels: IntArray | None = None, inverses: InverseCache | None = None,
    ) -> LayerObs:  # fmt: skip
        """Start from a layer's weights [channels, outputs, taps] and input moments.

        Args:
            layer: The layer.
            weights: Its weights.
            moments: Of its input channels, or of their patches.
            ridge: λ relative to the variance of every feature.
            alive: bool [channels], which are there.
            importance: float64 [outputs], how much an error in each counts; by default all alike.
            channels: int64, those that may leave; by default all of them.
            inverses: Those of the network as it is, at these ridges.
        """
        flat, outputs = as_features(weights, len(moments.mean)), weights.shape[1]
        inverse = (inverses or InverseCache()).of(layer, moments, ridge, alive)
        matter = np.repeat(np.ones(outputs) if importance is None else importance, flat.shape[1] // outputs)
        leaving = np.arange(len(alive)) if channels is None else np.sort(channels)
        return cls(layer, flat, moments, inverse, matter, leaving[alive[leaving]], alive.copy())

    @property
    def units(self) -> IntArray:
        """int64 [channels], the unit of every channel."""
        return self.layer.units

    @property
    def block(self) -> int:
        """Features of a channel."""
        return len(self.before) // len(self.alive)

    @cached_property
    def energy(self) -> float:
        """What the layer's output varies by in all, the unit of its errors."""
        return max(float(variances(self.before, self.moments.covariance) @ self.matter), 1e-30)

    @property
    def weights(self) -> FloatArray:
        """The weights after what has left was compensated for, float64 [features, outputs × taps]."""
        result = self.before.copy()
        if self._gone:
            gone = features_of(np.sort(self._gone), self.block)
            rows = self.inverse[gone]
            result -= rows.T @ np.linalg.solve(rows[:, gone], self.before[gone])
        result[np.repeat(~self.alive, self.block)] = 0.0
        return result

    def errors(self) -> FloatArray:
        """Output error of removing each channel, float64 [channels]; infinite for those that cannot leave."""
        if self._part is None:
            self._part = _Part.of(self)
        error = np.full(len(self.alive), np.inf)
        error[self._part.channels] = self._part.errors(self.matter)
        return error

    def costs(self) -> FloatArray:
        """The same relative to what the layer's output varies by."""
        return self.errors() / self.energy

    def remove(self, channels: IntArray) -> None:
        """Take channels out and let the others compensate for them."""
        channels = np.unique(channels[self.alive[channels]])
        if not len(channels):
            return
        self.alive[channels] = False
        self._gone += channels.tolist()
        if self._part is not None:
            self._part.remove(channels)


@dataclass
class _Part:
    """What is theirs of P and of the weights, of the channels that may still leave."""

    channels: IntArray
    block: int
    inverse: FloatArray
    weights: FloatArray

    @classmethod
    def of(cls, solver: LayerObs) -> _Part:
        places = features_of(solver.channels, solver.block)
        part = cls(solver.channels, solver.block, solver.inverse[np.ix_(places, places)], solver.before[places])
        part.remove(solver.channels[~solver.alive[solver.channels]])
        return part

    def errors(self, matter: FloatArray) -> FloatArray:
        if self.block == 1:  # many systems of one equation each: a division
            return np.asarray(self.weights**2 @ matter / np.diagonal(self.inverse))
        count, size = len(self.channels), self.block
        own = np.einsum("cfcg->cfg", self.inverse.reshape(count, size, count, size))
        weights = self.weights.reshape(count, size, -1)
        return np.asarray(np.einsum("cfo,cfo,o->c", weights, np.linalg.solve(own, weights), matter))

    def remove(self, channels: IntArray) -> None:
        leaving = np.isin(self.channels, channels)
        if not leaving.any():
            return
        gone, rest = (np.flatnonzero(np.repeat(which, self.block)) for which in (leaving, ~leaving))
        rows = self.inverse[np.ix_(gone, rest)]
        right = np.concatenate([self.weights[gone], rows], axis=1)
        solved = np.linalg.solve(self.inverse[np.ix_(gone, gone)], right)
        width = self.weights.shape[1]
        self.weights = self.weights[rest] - rows.T @ solved[:, :width]
        self.inverse = self.inverse[np.ix_(rest, rest)]
        self.inverse -= rows.T @ solved[:, width:]
        self.channels = self.channels[~leaving]


class Loss(Protocol):
    """What a sum over channels loses while they leave it; `units` and `alive` are by channel."""

    @property
    def units(self) -> IntArray: ...
    @property
    def alive(self) -> BoolArray: ...
    def costs(self) -> FloatArray: ...
    def remove(self, channels: IntArray) -> None: ...


def removal_order(
    solvers: Sequence[Loss], units: IntArray, fallback: FloatArray, leave: int,
    on_step: Callable[[list[int]], None] | None = None, exact: int = 0,
) -> list[int]:  # fmt: skip
    """Order a group's units by what their removal costs, cheapest first.

    Args:
        solvers: The sums over the group; they are emptied on the way.
        units: int64, the group's units that are still there.
        fallback: float64 [units of the model], for units that no sum with statistics consumes.
        leave: How many units to leave at the end.
        on_step: Called after every step with the units removed so far.
        exact: A number of units at which a step ends.
    """
    position = {int(unit): i for i, unit in enumerate(units.tolist())}
    places = [[(i, position[int(u)]) for i, u in enumerate(s.units.tolist()) if int(u) in position] for s in solvers]
    order: list[int] = []
    gone = np.zeros(len(units), dtype=np.bool_)
    step = max(1, len(units) // _ROUNDS)
    while len(order) < len(units) - leave:
        if solvers:
            cost = np.zeros(len(units))
            for solver, pairs in zip(solvers, places, strict=True):
                channel_costs = solver.costs()
                rows = np.array([i for i, _ in pairs], dtype=np.int64)
                columns = np.array([j for _, j in pairs], dtype=np.int64)
                live = ~gone[columns]
                np.add.at(cost, columns[live], channel_costs[rows[live]])
        else:
            cost = fallback[units].copy()
        cost[gone] = np.inf
        count = min(step, len(units) - leave - len(order))
        if len(order) < exact < len(order) + count:
            count = exact - len(order)
        chosen = np.argsort(cost, kind="stable")[:count]
        gone[chosen] = True
        order += units[chosen].tolist()
        for solver, pairs in zip(solvers, places, strict=True):
            solver.remove(np.array([i for i, j in pairs if gone[j] and solver.alive[i]], dtype=np.int64))
        if on_step is not None:
            on_step(order)
    return order
