"""Points of sensitivity curves: what a network loses if a group is cut to a width and its consumers compensate.

Points do not depend on one another, so they are tasks for workers (:mod:`onnxcop.parallel.crew`). All points of a round
share the network, its statistics and the samples; the result of one is an order of units and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcop._base.types import Array, BoolArray, FloatArray, IntArray
from onnxcop.allocation.limits import Limits
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.coupling.groups import DependencyGroup
from onnxcop.graph.edit import copied
from onnxcop.reconstruction.block_streams import BlockStream
from onnxcop.reconstruction.divergence import HeldOut
from onnxcop.reconstruction.network import MaskedNetwork, NetworkChange
from onnxcop.reconstruction.obs import InverseCache, LayerObs, Loss, removal_order
from onnxcop.reconstruction.products import losses_for
from onnxcop.reconstruction.ridge import as_features, as_weights, mean_output
from onnxcop.runtime.segments import Prefixes
from onnxcop.runtime.session import EngineOptions


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point to measure.

    Attributes:
        group: The group's index.
        count: How many units to remove.
        order: The removal order, if it is known.
        whole: Whether to measure the removal of the whole group as well, if only one of its units must stay.
        places: Numbers of the batches to measure on; None for all.
        kept: Numbers of the batches whose live tensors the worker keeps, these among them.
    """

    group: int
    count: int
    order: tuple[int, ...] | None = None
    whole: bool = False
    places: tuple[int, ...] | None = None
    kept: tuple[int, ...] = ()


Terms = tuple[list[FloatArray] | None, ...]
"""What batches add to a distance, batch by batch, as :meth:`Reference.terms` returns it."""


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """A point measured on some batches.

    Attributes:
        order: The removal order.
        count: How many units were removed.
        terms: The distance of the network without them.
        whole: The distance without all units, None if that was not measured; `order` then ends with the last.
    """

    order: tuple[int, ...]
    count: int
    terms: Terms
    whole: Terms | None = None


@dataclass
class CurveRound:
    """A network and its statistics, which all points of a round share.

    Attributes:
        working: The network; None in a worker, until the first point.
        change: Its difference from the original.
        fit: Statistics to fit merges on.
        heads: Groups of heads with products that are compared head by head.
        allowed: bool [units], units that may be removed.
        limits: The limits on what may be cut.
        fallback: float64 [units], an order for groups without statistics.
        ridges: Regularization by layer.
        importance: Importance of outputs by layer, float64 [outputs].
        options: How to run pieces.
        base: Divergence of the network itself.
        prefixes: Its live tensors, by the batches that are kept; empty in a worker, until the first point.
        inverses: Inverses of its layers' covariances.
    """

    working: MaskedNetwork | None
    change: NetworkChange | None
    fit: PatchStatistics
    heads: Sequence[BlockStream]
    allowed: BoolArray
    limits: Limits
    fallback: FloatArray
    ridges: Mapping[int, float]
    importance: Mapping[int, FloatArray]
    options: EngineOptions
    base: float
    prefixes: dict[tuple[int, ...] | None, Prefixes] = field(default_factory=dict)
    inverses: InverseCache = field(default_factory=InverseCache)

    def __getstate__(self) -> dict[str, Any]:
        """Without what a worker makes itself."""
        return vars(self) | {"working": None, "prefixes": {}, "inverses": InverseCache()}

    def opened(self, original: MaskedNetwork) -> MaskedNetwork:
        """The network, made on first use in a worker."""
        if self.working is None:
            assert self.change is not None
            self.working = self.change.of(original)
        return self.working

    def finish(
        self, working: MaskedNetwork, held: HeldOut, group: DependencyGroup, point: CurvePoint
    ) -> Callable[[], Terms]:
        """A function that runs the batches of a point from its group's first node to the end.

        Batches of other shapes go along to the group, because the sizes that all batches have in common are declared.
        """
        kept = None if point.places is None else point.kept
        along = _along(held.feeds, kept)
        if kept not in self.prefixes:
            self.prefixes[kept] = prefixes_of(working, [held.feeds[place] for place in along], self.options)
        executor = self.prefixes[kept].at(first_end(working, group))
        chosen = range(len(held.feeds)) if point.places is None else point.places
        own = [along.index(place) for place in chosen]

        def terms() -> Terms:
            outputs = executor.finishing(places=own, alike=range(len(along)))
            return tuple(held.reference.terms(place, one) for place, one in zip(chosen, outputs, strict=True))

        return terms


def _along(feeds: Sequence[Mapping[str, Array]], places: tuple[int, ...] | None) -> list[int]:
    """Some batches, and after them one of every shape that they lack."""
    if places is None:
        return list(range(len(feeds)))
    along = {_shape(feeds[place]): place for place in reversed(range(len(feeds)))}
    known = {_shape(feeds[place]) for place in places}
    return [*places, *(place for shape, place in along.items() if shape not in known)]


def _shape(feed: Mapping[str, Array]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in feed.items())


def order_point(point: CurvePoint, original: MaskedNetwork, held: HeldOut, state: CurveRound) -> CurvePoint:
    """A point with the removal order of its group."""
    working = state.opened(original)
    group = working.analysis.structure.groups[point.group]
    return replace(point, order=tuple(_cut(working, state, group, point)[0]))


def measure_point(point: CurvePoint, original: MaskedNetwork, held: HeldOut, state: CurveRound) -> MeasuredPoint:
    """Measure one point; the network is left as it was."""
    working = state.opened(original)
    group = working.analysis.structure.groups[point.group]
    finish = state.finish(working, held, group, point)
    order, count, solvers, weights = _cut(working, state, group, point)
    terms = _variant(working, finish, solvers, weights, order[:count])
    units = group.units[state.allowed[group.units]]
    if not point.whole or len(units) != 1 + most_units(state.allowed, group.units, group.width, state.limits):
        return MeasuredPoint(tuple(order), count, terms)
    solvers = _solvers(working, state, group)
    for solver in solvers:  # all that is left of the group goes, and its consumers keep the mean of what they lose
        solver.remove(np.flatnonzero(np.isin(solver.units, units)))
    weights = [solver.weights for solver in solvers]
    gone = _variant(working, finish, solvers, weights, units.tolist())
    return MeasuredPoint((*order, *np.setdiff1d(units, order).tolist()), count, terms, gone)


def _cut(
    working: MaskedNetwork, state: CurveRound, group: DependencyGroup, point: CurvePoint
) -> tuple[list[int], int, list[LayerObs], list[FloatArray]]:
    """The removal order, the count, the group's consumers, and their weights after so many units."""
    units = group.units[state.allowed[group.units]]
    most = most_units(state.allowed, group.units, group.width, state.limits)
    count = min(point.count, most)
    losses = [] if point.order is not None else losses_for(working, state.fit, group, state.heads)
    solvers = _solvers(working, state, group)
    order, weights = _cut_to(solvers, losses, units, state.fallback, count, most, point.order)
    return order, count, solvers, weights


def prefixes_of(working: MaskedNetwork, feeds: Sequence[Mapping[str, Array]], options: EngineOptions) -> Prefixes:
    """Live tensors at the cuts of all groups."""
    places = (working.masks.places(group.units) for group in working.analysis.structure.groups)
    return Prefixes(working.partition, feeds, options, cuts=[min(one) for one in places if one])


def first_end(working: MaskedNetwork, group: DependencyGroup) -> int:
    """Position in the top-level graph of the first node with a result that changes if units of a group are removed."""
    return min(working.masks.places(group.units))


def most_units(allowed: BoolArray, units: IntArray, width: int, limits: Limits) -> int:
    """The largest number of further units of a group that may be removed."""
    available = int(allowed[units].sum())
    removed = width - available
    return max(0, min(available - 1, int(limits.max_cut * width + 1e-9) - removed))


def alive_channels(working: MaskedNetwork, layer: Layer) -> BoolArray:
    """The input channels of a layer that remain."""
    return np.where(layer.units >= 0, working.alive[layer.units], True)


def _cut_to(
    solvers: Sequence[LayerObs], losses: Sequence[Loss], units: IntArray, fallback: FloatArray, count: int,
    most: int, known: Sequence[int] | None,
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
        solver.remove(np.flatnonzero(np.isin(solver.layer.units, np.asarray(known[:count]))))
    return list(known), [s.weights for s in solvers]


def _solvers(working: MaskedNetwork, state: CurveRound, group: DependencyGroup) -> list[LayerObs]:
    """The layers that consume a group and can compensate for its channels."""
    consumers = set(group.consumers)
    solvers = []
    for layer in working.layers:
        known = layer.node in consumers and layer.node in state.ridges
        moments = state.fit.moments(layer) if known else None
        if moments is not None:
            channels = np.flatnonzero(np.isin(layer.units, group.units))
            solvers.append(LayerObs.of(
                layer, working.weights(layer)[0], moments, state.ridges[layer.node], alive_channels(working, layer),
                importance=state.importance.get(layer.node), channels=channels, inverses=state.inverses,
            ))  # fmt: skip
    return solvers


def _variant(
    working: MaskedNetwork, finish: Callable[[], Terms], solvers: Sequence[LayerObs], weights: Sequence[FloatArray],
    removed: Sequence[int],
) -> Terms:  # fmt: skip
    """The distance if a group loses units and its consumers compensate."""
    saved = {name: copied(working.partition.stored[name])
             for name in _changed_names(working, solvers)}  # fmt: skip
    try:
        for solver, flat in zip(solvers, weights, strict=True):
            (old,) = working.weights(solver.layer)
            lost = as_features(old, len(flat)) - flat
            change = mean_output(lost, solver.moments.mean, old.shape[1])
            working.set_weights(solver.layer, as_weights(flat, old)[None], change)
        with working.without(np.asarray(removed, dtype=np.int64)):
            return finish()
    finally:
        for name, tensor in saved.items():
            working.partition.stored[name].CopyFrom(tensor)


def _changed_names(working: MaskedNetwork, solvers: Sequence[LayerObs]) -> set[str]:
    """Stored tensors that a variant changes."""
    names = set()
    for layer in [s.layer for s in solvers]:
        own = working.stored_layer(layer.node, layer.kernel)
        assert own is not None
        names |= {own.weight, own.bias or own.weight}
    return names
