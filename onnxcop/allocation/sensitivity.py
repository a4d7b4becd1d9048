"""Sensitivity curves: the cost of each group at several widths, measured at the network's output.

The channels of a group are ordered by the loss of the layers that consume them. At a few widths the group is cut, the
consumers compensate, and the rest of the network runs on held-out samples. Only the consumers' weights change, so
everything before them is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.allocation.limits import Limits, allowed_units
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.coupling.groups import DependencyGroup
from onnxcop.graph.edit import copied
from onnxcop.reconstruction.block_streams import BlockStream
from onnxcop.reconstruction.divergence import Reference
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.obs import InverseCache, LayerObs, Loss, removal_order
from onnxcop.reconstruction.products import losses_for
from onnxcop.reconstruction.propagation import propagate_importance
from onnxcop.reconstruction.ridge import as_features, as_weights, best_ridge, mean_output
from onnxcop.runtime.segments import PartialExecutor, Prefixes
from onnxcop.runtime.session import EngineOptions

FIRST_LEVEL = 0.05  # share of a group's width at which its curve is measured first
GROWTH = 2.0  # factor from one point of a curve to the next
_STEEPNESS = 1.6  # exponent of the divergence beyond the last point: errors add up faster than linearly


@dataclass(frozen=True, slots=True)
class Curve:
    """The removal order and the curve of one group.

    Attributes:
        group: The group's index.
        order: Units in the order of removal.
        counts: int64 [points], numbers of removed units at which the divergence was measured, ascending.
        values: float64 [points], the divergence there minus that of the uncut network.
        whole: The divergence without the group, where it may go whole; its last unit is then the last of the order.
    """

    group: int
    order: tuple[int, ...]
    counts: IntArray
    values: FloatArray
    whole: float | None = None

    @property
    def most(self) -> int:
        """How many units can be removed without removing the whole group."""
        return len(self.order) - (self.whole is not None)

    def price(self, count: FloatArray | float) -> FloatArray:
        """Divergence at any number of removed units: linear between points, a power law beyond them."""
        if self.whole is None:
            return self._below(count)
        counts = np.asarray(count, dtype=np.float64)
        return np.where(counts > self.most, max(self.whole, 0.0), self._below(count))

    def _below(self, count: FloatArray | float) -> FloatArray:
        counts = np.concatenate([[0.0], self.counts.astype(np.float64)])
        values = np.concatenate([[0.0], np.maximum.accumulate(np.maximum(self.values, 0.0))])
        inside = np.interp(count, counts, values)
        beyond = np.maximum(np.asarray(count, dtype=np.float64) / counts[-1], 1.0)
        return np.asarray(inside * beyond**_STEEPNESS)

    def with_point(self, count: int, value: float) -> Curve:
        """The curve with one more measured point."""
        counts, values = np.append(self.counts, count), np.append(self.values, value)
        order = np.argsort(counts, kind="stable")
        return replace(self, counts=counts[order], values=values[order])


@dataclass(frozen=True)
class Samples:
    """Samples and statistics for measuring curves.

    Attributes:
        fit: Statistics to fit merges on.
        held: Statistics of other samples, to choose the regularization.
        feeds: Batches of further samples, for the divergence.
        reference: Outputs of the original on `feeds`.
        heads: Groups of heads with products that are compared head by head.
    """

    fit: PatchStatistics
    held: PatchStatistics
    feeds: Sequence[Mapping[str, Array]]
    reference: Reference
    heads: Sequence[BlockStream] = ()


@dataclass
class NetworkCache:
    """Data that measurements on one unchanged network share.

    Attributes:
        prefixes: Live tensors at its cuts, on the samples for divergences.
        inverses: Inverses of its layers' covariances.
        base: Divergence of the network itself, once measured.
    """

    prefixes: Prefixes
    inverses: InverseCache = field(default_factory=InverseCache)
    base: float | None = None


def measure_curves(
    working: MaskedNetwork, samples: Samples, limits: Limits, fallback: FloatArray, options: EngineOptions,
    ridges: Mapping[int, float], *, requests: Mapping[int, int] | None = None,
    known: Mapping[int, Curve] | None = None, cache: NetworkCache | None = None,
    may_go: Callable[[int], bool] = lambda group: False, progress: Progress = silent, stage: str = "curves",
) -> dict[int, Curve]:  # fmt: skip
    """Measure one more point of the groups' curves on the current network.

    Args:
        working: The network; it is not changed.
        samples: Statistics and held-out samples.
        limits: The limits on what may be cut.
        fallback: float64 [units], an order for groups without statistics, lowest first.
        options: How to run pieces of the network.
        ridges: Regularization by layer, from :func:`choose_ridges`.
        requests: Number of units to remove, by group; None measures every group's first point.
        known: Curves so far.
        cache: Data shared by calls on the same network.
        may_go: Whether a group may be removed whole; that is measured with its first point.
        progress: Called with (stage, done, total) in groups.
        stage: Its name in `progress`.

    Returns:
        All curves, by group.
    """
    structure = working.analysis.structure
    allowed = allowed_units(working.model, structure, limits) & working.alive
    curves = dict(known or {})
    if requests is None:
        requests = {
            g.index: max(1, round(FIRST_LEVEL * g.width))
            for g in structure.groups
            if g.consumers and most_units(allowed, g.units, g.width, limits) >= 1
        }
    groups = sorted((structure.groups[index] for index in requests), key=lambda g: _first_end(working, g))
    cache = cache or NetworkCache(Prefixes(working.partition, samples.feeds, options))
    known_orders = requests.keys() <= curves.keys()  # importance only decides the order of channels
    importance = {} if known_orders else propagate_importance(working, samples.fit)
    if cache.base is None:
        cache.base = samples.reference.compare(cache.prefixes.at(0).finish()).value
    for done, group in enumerate(groups, start=1):
        executor = cache.prefixes.at(_first_end(working, group))
        units = group.units[allowed[group.units]]
        most = most_units(allowed, group.units, group.width, limits)
        count = min(requests[group.index], most)
        solvers = solvers_for(working, samples.fit, ridges, group, importance, cache.inverses)
        losses = [] if group.index in curves else losses_for(working, samples.fit, group, samples.heads)
        order, weights = _cut_to(solvers, losses, units, fallback, count, most, curves.get(group.index))
        value = _variant(working, samples, executor, solvers, weights, order[:count], cache.base)
        curve = curves.get(group.index)
        if curve is None:
            curve = Curve(group.index, tuple(order), np.empty(0, np.int64), np.empty(0))
            if len(units) == most + 1 and may_go(group.index):
                solvers = solvers_for(working, samples.fit, ridges, group, importance, cache.inverses)
                rest = tuple(np.setdiff1d(units, order).tolist())
                gone = _without(working, samples, executor, solvers, units, cache.base)
                curve = replace(curve, order=(*curve.order, *rest), whole=gone)
        curves[group.index] = curve.with_point(count, value)
        progress(stage, done, len(groups))
    return curves


def _first_end(working: MaskedNetwork, group: DependencyGroup) -> int:
    """Position in the top-level graph of the first node with a result that changes if units of a group are removed."""
    return min(working.masks.places(group.units))


def most_units(allowed: np.ndarray[tuple[int], np.dtype[np.bool_]], units: IntArray, width: int, limits: Limits) -> int:
    """The largest number of further units of a group that may be removed."""
    available = int(allowed[units].sum())
    removed = width - available
    return max(0, min(available - 1, int(limits.max_cut * width + 1e-9) - removed))


def _cut_to(
    solvers: Sequence[LayerObs], losses: Sequence[Loss], units: IntArray, fallback: FloatArray, count: int,
    most: int, known: Curve | None,
) -> tuple[list[int], list[FloatArray]]:  # fmt: skip
    """The removal order (computed once), and the consumers' weights after `count` units."""
    snapshot: list[FloatArray] = []

    def note(order: list[int]) -> None:
        if not snapshot and len(order) >= count:
            snapshot.extend(s.weights for s in solvers)

    if known is None:
        order = removal_order([*solvers, *losses], units, fallback, len(units) - most, note, exact=count)
        return order, snapshot
    for solver in solvers:
        solver.remove(np.flatnonzero(np.isin(solver.layer.units, np.asarray(known.order[:count]))))
    return list(known.order), [s.weights for s in solvers]


def choose_ridges(working: MaskedNetwork, samples: Samples) -> dict[int, float]:
    """Choose the regularization of every layer by its effect on held-out samples."""
    ridges = {}
    for layer in working.layers:
        fit, held_out = samples.fit.moments(layer), samples.held.moments(layer)
        if fit is None or held_out is None or layer.groups > 1 or not working.is_open(layer):
            continue
        alive = alive_channels(working, layer)
        trial = np.flatnonzero(alive & (layer.units >= 0))
        if len(trial) < 2 or fit.count < 2:
            continue
        (weights,) = working.weights(layer)
        errors = LayerObs.of(layer, weights, fit, 1e-2, alive).errors()[trial]
        removed = np.sort(trial[np.argsort(errors, kind="stable")][: max(1, len(trial) // 5)])
        keep = np.setdiff1d(np.flatnonzero(alive), removed)
        ridges[layer.node] = best_ridge(weights, fit, held_out, keep, removed)
    return ridges


def alive_channels(working: MaskedNetwork, layer: Layer) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """The input channels of a layer that remain."""
    return np.where(layer.units >= 0, working.alive[layer.units], True)


def solvers_for(
    working: MaskedNetwork,
    fit: PatchStatistics,
    ridges: Mapping[int, float],
    group: DependencyGroup,
    importance: Mapping[int, FloatArray],
    inverses: InverseCache,
) -> list[LayerObs]:
    """The layers that consume a group and can compensate for its channels."""
    consumers = set(group.consumers)
    solvers = []
    for layer in working.layers:
        moments = fit.moments(layer) if layer.node in consumers and layer.node in ridges else None
        if moments is not None:
            channels = np.flatnonzero(np.isin(layer.units, group.units))
            solvers.append(LayerObs.of(
                layer, working.weights(layer)[0], moments, ridges[layer.node], alive_channels(working, layer),
                importance=importance.get(layer.node), channels=channels, inverses=inverses,
            ))  # fmt: skip
    return solvers


def _without(
    working: MaskedNetwork, samples: Samples, executor: PartialExecutor, solvers: Sequence[LayerObs], units: IntArray,
    base: float,
) -> float:  # fmt: skip
    """Divergence added when all that is left of a group goes, and its consumers keep the mean of what they lose."""
    for solver in solvers:
        solver.remove(np.flatnonzero(np.isin(solver.units, units)))
    return _variant(working, samples, executor, solvers, [s.weights for s in solvers], units.tolist(), base)


def _variant(
    working: MaskedNetwork, samples: Samples, executor: PartialExecutor, solvers: Sequence[LayerObs],
    weights: Sequence[FloatArray], removed: Sequence[int], base: float,
) -> float:  # fmt: skip
    """Divergence added if a group loses units and its consumers compensate."""
    saved = {name: copied(working.partition.stored[name])
             for name in changed_names(working, solvers)}  # fmt: skip
    try:
        for solver, flat in zip(solvers, weights, strict=True):
            (old,) = working.weights(solver.layer)
            lost = as_features(old, len(flat)) - flat
            change = mean_output(lost, solver.moments.mean, old.shape[1])
            working.set_weights(solver.layer, as_weights(flat, old)[None], change)
        with working.without(np.asarray(removed, dtype=np.int64)):
            return samples.reference.compare(executor.finish()).value - base
    finally:
        for name, tensor in saved.items():
            working.partition.stored[name].CopyFrom(tensor)


def changed_names(working: MaskedNetwork, solvers: Sequence[LayerObs]) -> set[str]:
    """Stored tensors that a variant changes."""
    names = set()
    for layer in [s.layer for s in solvers]:
        own = working.stored_layer(layer.node, layer.kernel)
        assert own is not None
        names |= {own.weight, own.bias or own.weight}
    return names
