"""Which channels a layer can best do without, and how the others compensate: Optimal Brain Surgeon.

Let Σ be the covariance of a layer's input channels x, W its outgoing weights, D the diagonal of Σ, and P = (Σ + λD)⁻¹.
If all other channels compensate for channel i as well as linear regression can, removing it costs ‖W_i‖² / P_ii. This
is the part of i that its multiple correlation with the others leaves. It has the form of Optimal Brain Surgeon (Hassibi
& Stork 1993) with the covariance as Hessian. The compensation is W ← W - P_i W_i / P_ii. If channels are removed one
after another, P and W stay exact.

If the moments are those of whole patches, a channel is a block of features, one for each tap of the kernel. Then i is a
set of indices, P_ii is a matrix, and everything else stays the same.
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

_ROUNDS = 96  # a group is emptied in about this many steps, a few channels at a time
_MEMORY = 1 << 30  # bytes of inverses to keep


@dataclass
class InverseCache:
    """(Σ + λD)⁻¹ by layer, valid while the network does not change; keeps as many as fit into `_MEMORY`."""

    kept: dict[int, FloatArray] = field(default_factory=dict)

    def of(self, layer: Layer, moments: Moments, ridge: float, alive: BoolArray) -> FloatArray:
        """float64 [features, features], zero for removed channels; read-only."""
        if layer.node in self.kept:
            return self.kept[layer.node]
        if alive.all():
            inverse = regularized_inverse(moments.covariance, ridge).T  # symmetric, so its rows may be its columns
        else:
            covariance = moments.covariance
            inverse = np.zeros_like(covariance)
            live = np.flatnonzero(np.repeat(alive, len(covariance) // len(alive)))
            inverse[np.ix_(live, live)] = regularized_inverse(covariance[np.ix_(live, live)], ridge)
        if inverse.nbytes + sum(one.nbytes for one in self.kept.values()) <= _MEMORY:
            self.kept[layer.node] = inverse
        return inverse


@dataclass
class LayerObs:
    """One layer, from which channels are removed.

    The cost of a group's channels depends only on their own block of P while no other channels are removed. So only
    that block is updated.
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
            alive: bool [channels], channels that are present.
            importance: float64 [outputs], weight of an error in each; by default equal.
            channels: int64, removable channels; by default all.
            inverses: Inverses of the current network at these ridges.
        """
        flat, outputs = as_features(weights, len(moments.mean)), weights.shape[1]
        inverse = (inverses or InverseCache()).of(layer, moments, ridge, alive)
        matter = np.repeat(np.ones(outputs) if importance is None else importance, flat.shape[1] // outputs)
        leaving = np.arange(len(alive)) if channels is None else np.sort(channels)
        return cls(
            layer, before=flat, moments=moments, inverse=inverse, matter=matter, channels=leaving[alive[leaving]],
            alive=alive.copy(),
        )  # fmt: skip

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
        """Total variance of the layer's output, the unit of its errors."""
        return max(float(variances(self.before, self.moments.covariance) @ self.matter), 1e-30)

    @property
    def weights(self) -> FloatArray:
        """Current weights after compensation, float64 [features, outputs × taps]."""
        result = self.before.copy()
        if self._gone:
            removed = features_of(np.sort(self._gone), self.block)
            rows = self.inverse[removed]
            result -= rows.T @ np.linalg.solve(rows[:, removed], self.before[removed])
        result[np.repeat(~self.alive, self.block)] = 0.0
        return result

    def errors(self) -> FloatArray:
        """Output error of removing each channel, float64 [channels]; infinite for channels that are not removable."""
        if self._part is None:
            self._part = _Part.of(self)
        error = np.full(len(self.alive), np.inf)
        error[self._part.channels] = self._part.errors(self.matter)
        return error

    def costs(self) -> FloatArray:
        """The same relative to the variance of the layer's output."""
        return self.errors() / self.energy

    def remove(self, channels: IntArray) -> None:
        """Remove channels and let the others compensate."""
        channels = np.unique(channels[self.alive[channels]])
        if not len(channels):
            return
        self.alive[channels] = False
        self._gone += channels.tolist()
        if self._part is not None:
            self._part.remove(channels)


@dataclass
class _Part:
    """The block of P and of the weights that belongs to the removable channels."""

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
        leaving_features, rest = (np.flatnonzero(np.repeat(which, self.block)) for which in (leaving, ~leaving))
        rows = self.inverse[np.ix_(leaving_features, rest)]
        right = np.concatenate([self.weights[leaving_features], rows], axis=1)
        solved = np.linalg.solve(self.inverse[np.ix_(leaving_features, leaving_features)], right)
        width = self.weights.shape[1]
        self.weights = self.weights[rest] - rows.T @ solved[:, :width]
        self.inverse = self.inverse[np.ix_(rest, rest)]
        self.inverse -= rows.T @ solved[:, width:]
        self.channels = self.channels[~leaving]


class Loss(Protocol):
    """Loss of a sum over channels as they are removed; `units` and `alive` are indexed by channel."""

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
    """Order a group's units by the cost of removing them, cheapest first.

    Args:
        solvers: The sums over the group; this consumes them.
        units: int64, the group's remaining units.
        fallback: float64 [units of the model], scores of units that no sum with statistics reads.
        leave: How many units to keep.
        on_step: Called after every step with the units removed so far.
        exact: A step ends at exactly this number of units.
    """
    position = {int(unit): i for i, unit in enumerate(units.tolist())}
    places = [[(i, position[int(u)]) for i, u in enumerate(s.units.tolist()) if int(u) in position] for s in solvers]
    order: list[int] = []
    removed = np.zeros(len(units), dtype=np.bool_)
    step = max(1, len(units) // _ROUNDS)
    while len(order) < len(units) - leave:
        if solvers:
            cost = np.zeros(len(units))
            for solver, pairs in zip(solvers, places, strict=True):
                channel_costs = solver.costs()
                rows = np.array([i for i, _ in pairs], dtype=np.int64)
                columns = np.array([j for _, j in pairs], dtype=np.int64)
                live = ~removed[columns]
                np.add.at(cost, columns[live], channel_costs[rows[live]])
        else:
            cost = fallback[units].copy()
        cost[removed] = np.inf
        count = min(step, len(units) - leave - len(order))
        if len(order) < exact < len(order) + count:
            count = exact - len(order)
        chosen = np.argsort(cost, kind="stable")[:count]
        removed[chosen] = True
        order += units[chosen].tolist()
        for solver, pairs in zip(solvers, places, strict=True):
            solver.remove(np.array([i for i, j in pairs if removed[j] and solver.alive[i]], dtype=np.int64))
        if on_step is not None:
            on_step(order)
    return order
