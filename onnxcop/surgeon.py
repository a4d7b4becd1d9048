"""Which channels a layer can best do without, and what makes up for them.

Let x be a layer's input channels with covariance Σ, W its outgoing weights and P = (Σ + λI)⁻¹. The
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
from dataclasses import dataclass

import numpy as np

from onnxcop.arrays import FloatArray, IntArray
from onnxcop.layers import Layer
from onnxcop.stats import Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # λ, relative to the mean variance
_ROUNDS = 96  # a group is emptied in about this many steps; few channels at a time
_JUDGES = 512  # sums over a layer's inputs that are enough to choose its λ by


@dataclass
class LayerSurgery:
    """One layer while channels leave it.

    Attributes:
        layer: The layer.
        weights: float64 [features, outputs × taps], compensated so far; a feature is a channel, or a tap of
            one where the moments are of patches.
        inverse: float64 [features, features], (Σ + λI)⁻¹ of those that remain.
        mean: float64 [features].
        matter: float64 [outputs × taps], how much an error in each output counts.
        energy: What the layer's output varies by in all, the unit of its errors.
        alive: bool [channels].
    """

    layer: Layer
    weights: FloatArray
    inverse: FloatArray
    mean: FloatArray
    matter: FloatArray
    energy: float
    alive: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @classmethod
    def of(
        cls, layer: Layer, weights: FloatArray, moments: Moments, ridge: float,
        alive: np.ndarray[tuple[int], np.dtype[np.bool_]], importance: FloatArray | None = None,
    ) -> LayerSurgery:  # fmt: skip
        """Start from a layer's weights [channels, outputs, taps] and input moments.

        Args:
            layer: The layer.
            weights: Its weights.
            moments: Of its input channels, or of their patches.
            ridge: λ relative to the mean variance.
            alive: bool [channels], which are there.
            importance: float64 [outputs], how much an error in each counts; all alike unless told.
        """
        flat = as_features(weights, len(moments.mean))
        covariance = moments.covariance
        inverse = np.zeros_like(covariance)
        live = np.flatnonzero(np.repeat(alive, len(flat) // len(weights)))
        inverse[np.ix_(live, live)] = regularized_inverse(covariance[np.ix_(live, live)], ridge)
        outputs = weights.shape[1]
        matter = np.repeat(np.ones(outputs) if importance is None else importance, flat.shape[1] // outputs)
        energy = float(variances(flat, covariance) @ matter)
        return cls(layer, flat.copy(), inverse, moments.mean, matter, max(energy, 1e-30), alive.copy())

    @property
    def block(self) -> int:
        """Features of a channel."""
        return len(self.weights) // len(self.alive)

    def costs(self) -> FloatArray:
        """Relative output error of removing each channel, float64 [channels]; infinite for dead ones."""
        block, live = self.block, np.flatnonzero(self.alive)
        cost = np.full(len(self.alive), np.inf)
        if block == 1:  # many systems of one equation each: a division
            cost[live] = self.weights[live] ** 2 @ self.matter / np.diagonal(self.inverse)[live] / self.energy
            return cost
        rows = live[:, None] * block + np.arange(block)
        weights, own = self.weights[rows], self.inverse[rows[:, :, None], rows[:, None, :]]
        cost[live] = np.einsum("cfo,cfo,o->c", weights, np.linalg.solve(own, weights), self.matter) / self.energy
        return cost

    def remove(self, channels: IntArray) -> None:
        """Take channels out and let the others make up for them."""
        channels = channels[self.alive[channels]]
        if not len(channels):
            return
        gone = (channels[:, None] * self.block + np.arange(self.block)).ravel()
        rows = self.inverse[gone]
        solved = np.linalg.solve(rows[:, gone], np.concatenate([self.weights[gone], rows], axis=1))
        width = self.weights.shape[1]
        self.weights -= rows.T @ solved[:, :width]
        self.inverse -= rows.T @ solved[:, width:]
        self.alive[channels] = False
        self.weights[np.repeat(~self.alive, self.block)] = 0.0
        self.inverse[gone, :] = 0.0
        self.inverse[:, gone] = 0.0


def as_features(weights: FloatArray, features: int) -> FloatArray:
    """Weights [channels, outputs, taps] as [features, rest]: by channel, or by tap of every channel."""
    if features == len(weights):
        return weights.reshape(features, -1)
    return weights.transpose(0, 2, 1).reshape(features, -1)


def as_weights(flat: FloatArray, like: FloatArray) -> FloatArray:
    """Inverse of :func:`as_features`, in the shape of `like` [channels, outputs, taps]."""
    if len(flat) == len(like):
        return flat.reshape(like.shape)
    channels, outputs, taps = like.shape
    return flat.reshape(channels, taps, outputs).transpose(0, 2, 1)


def mean_output(flat: FloatArray, mean: FloatArray, outputs: int) -> FloatArray:
    """What features [features, rest] of a given mean add to every output on average, float64 [outputs]."""
    return by_output(mean @ flat, outputs)


def by_output(values: FloatArray, outputs: int) -> FloatArray:
    """Sums over what belongs to the same output, float64 [outputs] of [outputs × taps]."""
    return np.asarray(values.reshape(outputs, -1).sum(axis=1))


def variances(flat: FloatArray, covariance: FloatArray) -> FloatArray:
    """How much every sum of features [features, sums] of a given covariance varies, float64 [sums]."""
    return np.asarray((flat * (covariance @ flat)).sum(axis=0))


def regularized(covariance: FloatArray, ridge: float) -> FloatArray:
    """Σ + λ·mean variance·I."""
    size = len(covariance)
    scale = max(float(np.trace(covariance)) / max(size, 1), 1e-12)
    return np.asarray(covariance + ridge * scale * np.eye(size))


def regularized_inverse(covariance: FloatArray, ridge: float) -> FloatArray:
    """(Σ + λ·mean variance·I)⁻¹, by Cholesky factorization where it is definite."""
    from scipy.linalg.lapack import dpotrf, dpotri

    loaded = regularized(covariance, ridge)
    factor, failed = dpotrf(loaded, lower=1)
    if not failed:
        inverse, failed = dpotri(factor, lower=1)
        if not failed:
            return np.asarray(np.tril(inverse) + np.tril(inverse, -1).T)
    return np.asarray(np.linalg.pinv(loaded))


def regularized_solve(covariance: FloatArray, ridge: float, right: FloatArray) -> FloatArray:
    """(Σ + λ·mean variance·I)⁻¹ times a matrix [features, sums], without the inverse where Σ + … is definite."""
    from scipy.linalg.lapack import dpotrf, dpotrs

    loaded = regularized(covariance, ridge)
    factor, failed = dpotrf(loaded, lower=1)
    if not failed:
        solved, failed = dpotrs(factor, right, lower=1)
        if not failed:
            return np.asarray(solved)
    return np.asarray(np.linalg.pinv(loaded) @ right)


def compensated(
    weights: FloatArray, moments: Moments, ridge: float, keep: IntArray, gone: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Merge removed channels into kept ones in closed form.

    W'_K = W_K + Bᵀ W_R with B = Σ_RK (Σ_KK + λI)⁻¹, and what the mean of the output loses goes to the bias.

    Args:
        weights: float64 [channels, outputs, taps].
        moments: Of the input channels, or of their patches.
        ridge: λ relative to the mean variance.
        keep: Channels that stay.
        gone: Channels that go.

    Returns:
        New weights (zero for `gone`), and the change of the bias, float64 [outputs].
    """
    covariance, flat = moments.covariance, as_features(weights, len(moments.mean))
    block = len(flat) // len(weights)
    kept, lost = (np.sort((c[:, None] * block + np.arange(block)).ravel()) for c in (keep, gone))
    shared = covariance[np.ix_(kept, lost)] @ flat[lost]
    merged = np.zeros_like(flat)
    merged[kept] = flat[kept] + regularized_solve(covariance[np.ix_(kept, kept)], ridge, shared)
    return as_weights(merged, weights), mean_output(flat - merged, moments.mean, weights.shape[1])


def deleted(weights: FloatArray, keep: IntArray) -> tuple[FloatArray, FloatArray]:
    """Plain deletion: the weights of the others stay as they are."""
    result = np.zeros_like(weights)
    result[keep] = weights[keep]
    return result, np.zeros(weights.shape[1])


def held_out_error(weights: FloatArray, merged: FloatArray, held: Moments) -> float:
    """Variance of a layer's output error on other samples, relative to the output's."""
    change, flat = as_features(weights - merged, len(held.mean)), as_features(weights, len(held.mean))
    error, energy = (float(variances(one, held.covariance).sum()) for one in (change, flat))
    return error / max(energy, 1e-30)


def best_ridge(weights: FloatArray, fit: Moments, held: Moments, keep: IntArray, gone: IntArray) -> float:
    """The λ whose merge errs least on held-out samples, judged by some of the outputs where there are many."""
    weights = weights[:, :: -(-weights[0].size // _JUDGES)]
    changes = (weights - compensated(weights, fit, ridge, keep, gone)[0] for ridge in RIDGES)
    covariance = held.covariance
    errors = [float(variances(as_features(change, len(held.mean)), covariance).sum()) for change in changes]
    return RIDGES[int(np.argmin(errors))]


def removal_order(
    surgeries: Sequence[LayerSurgery], units: IntArray, fallback: FloatArray, leave: int,
    on_step: Callable[[list[int]], None] | None = None, exact: int = 0,
) -> list[int]:  # fmt: skip
    """Order a group's units by what their removal costs, cheapest first.

    Args:
        surgeries: The layers that consume the group; they are emptied on the way.
        units: int64, the group's units that are still there.
        fallback: float64 [units of the model], for units that no layer with statistics consumes.
        leave: How many units to leave at the end.
        on_step: Called after every step with the units removed so far.
        exact: A number of units at which a step ends.
    """
    position = {int(unit): i for i, unit in enumerate(units.tolist())}
    places = [
        [(i, position[int(u)]) for i, u in enumerate(s.layer.units.tolist()) if int(u) in position] for s in surgeries
    ]
    order: list[int] = []
    gone = np.zeros(len(units), dtype=np.bool_)
    step = max(1, len(units) // _ROUNDS)
    while len(order) < len(units) - leave:
        if surgeries:
            cost = np.zeros(len(units))
            for surgery, pairs in zip(surgeries, places, strict=True):
                channel_costs = surgery.costs()
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
        for surgery, pairs in zip(surgeries, places, strict=True):
            surgery.remove(np.array([i for i, j in pairs if gone[j] and surgery.alive[i]], dtype=np.int64))
        if on_step is not None:
            on_step(order)
    return order
