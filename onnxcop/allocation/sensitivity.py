"""Sensitivity curves: the cost of each group at several widths, measured at the network's output.

The channels of a group are ordered by the loss of the layers that consume them. At a few widths the group is cut, the
consumers compensate, and the rest of the network runs on held-out samples. Only the consumers' weights change, so
everything before them is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array, BoolArray, FloatArray, IntArray
from onnxcop.allocation.limits import Limits, allowed_units
from onnxcop.allocation.points import (
    CurvePoint,
    CurveRound,
    Terms,
    alive_channels,
    first_end,
    measure_point,
    most_units,
    order_point,
    prefixes_of,
)
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.calibration.statistics import Moments
from onnxcop.parallel.crew import HERE, Crew, Shared
from onnxcop.reconstruction.block_streams import BlockStream
from onnxcop.reconstruction.divergence import HeldOut, Reference
from onnxcop.reconstruction.network import MaskedNetwork, NetworkChange
from onnxcop.reconstruction.obs import LayerObs
from onnxcop.reconstruction.propagation import propagate_importance
from onnxcop.reconstruction.ridge import best_ridge
from onnxcop.reconstruction.spread import finished_by
from onnxcop.runtime.session import EngineOptions

__all__ = [
    "FIRST_LEVEL", "GROWTH", "Curve", "NetworkCache", "Samples", "alive_channels", "choose_ridges", "measure_curves",
]  # fmt: skip

FIRST_LEVEL = 0.05  # share of a group's width at which its curve is measured first
GROWTH = 2.0  # factor from one point of a curve to the next
_UNIT = 1 << 16  # the length of a batch in the line that workers share
_SPREAD = 40503  # of it, from one point to the next: the golden section, so that any run of points is spread
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

    def in_part(self) -> Curve:
        """The curve without the removal of the whole group."""
        return self if self.whole is None else replace(self, order=self.order[:-1], whole=None)

    def at(self, count: int) -> float:
        """The value that was measured at a number of removed units."""
        return float(self.values[np.flatnonzero(self.counts == count)[0]])

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
        crew: Measures the points.
        original: The unpruned network.
        held: The samples for divergences.
        round: The network and its statistics, once something is measured.
    """

    crew: Crew = HERE
    original: Shared[MaskedNetwork] | None = None
    held: Shared[HeldOut] | None = None
    round: Shared[CurveRound] | None = None


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
    groups = sorted((structure.groups[index] for index in requests), key=lambda g: first_end(working, g))
    points = [
        CurvePoint(g.index, requests[g.index], curves[g.index].order) if g.index in curves
        else CurvePoint(g.index, requests[g.index], whole=may_go(g.index))
        for g in groups
    ]  # fmt: skip
    cache = cache or NetworkCache()
    crew = cache.crew
    original = cache.original = cache.original or crew.share(working)
    held = cache.held = cache.held or crew.share(HeldOut(samples.feeds, samples.reference))
    if cache.round is None:
        prefixes = prefixes_of(working, samples.feeds, options)
        state = CurveRound(
            working=working,
            change=NetworkChange.between(original.value, working) if crew.spread else None,
            fit=samples.fit,
            heads=samples.heads,
            allowed=allowed,
            limits=limits,
            fallback=fallback,
            ridges=ridges,
            importance=propagate_importance(working, samples.fit),
            options=crew.engine(options),
            base=samples.reference.compare(list(finished_by(crew, prefixes.at(0), range(len(samples.feeds))))).value,
            prefixes={None: prefixes},
        )
        cache.round = crew.share(state)
    measured = _measured(crew, points, original, held, cache.round)
    for done, (point, (order, count, value, whole)) in enumerate(zip(points, measured, strict=True), start=1):
        curve = curves.get(point.group)
        if curve is None:
            curve = Curve(point.group, order, np.empty(0, np.int64), np.empty(0), whole=whole)
        curves[point.group] = curve.with_point(count, value)
        progress(stage, done, len(points))
    return curves


def _measured(
    crew: Crew, points: Sequence[CurvePoint], original: Shared[MaskedNetwork], held: Shared[HeldOut],
    state: Shared[CurveRound],
) -> Iterator[tuple[tuple[int, ...], int, float, float | None]]:  # fmt: skip
    """Removal order, count, and what the divergence gains there and without the whole group, point by point.

    Workers that keep something between tasks measure each point on batches of their own: then they compute what comes
    before a point for these alone.
    """
    reference, base, batches = held.value.reference, state.value.base, len(held.value.feeds)
    tasks, homes, parts = list(points), None, [1] * len(points)
    if crew.shares(batches) > 1:
        fresh = iter(list(crew.run(order_point, [p for p in points if p.order is None], original, held, state)))
        known = [next(fresh) if point.order is None else point for point in points]
        divided = [_divided(point, number, crew.width, batches) for number, point in enumerate(known)]
        tasks = [task for own in divided for _, task in own]
        homes = [worker for own in divided for worker, _ in own]
        parts = [len(own) for own in divided]
    with closing(crew.run(measure_point, tasks, original, held, state, homes=homes)) as results:
        sent = iter(tasks)
        for count in parts:
            own, asked = list(islice(results, count)), list(islice(sent, count))
            value = reference.by_terms(_in_order(asked, [one.terms for one in own])) - base
            gone = [one.whole for one in own if one.whole is not None]
            without = reference.by_terms(_in_order(asked, gone)) - base if gone else None
            yield own[0].order, own[0].count, value, without


def _divided(point: CurvePoint, number: int, workers: int, batches: int) -> list[tuple[int, CurvePoint]]:
    """The tasks of a point, with their workers, in the order of its batches.

    Think of all points of a batch as an interval, and of the intervals of all batches as a line that is cut into equal
    parts, one for each worker. So every worker has as much to do, and keeps few batches. Points are spread over the
    interval of their batch, because the first ones take the longest.

    Args:
        point: The point.
        number: Its number in the list.
        workers: How many workers there are.
        batches: How many batches there are.
    """
    phase = number * _SPREAD % _UNIT
    places: dict[int, list[int]] = {}
    for place in range(batches):
        places.setdefault((place * _UNIT + phase) * workers // (batches * _UNIT), []).append(place)
    return [
        (worker, replace(point, places=tuple(own), kept=_kept_by(worker, workers, batches)))
        for worker, own in places.items()
    ]


def _kept_by(worker: int, workers: int, batches: int) -> tuple[int, ...]:
    """The batches that a worker's part of the line touches."""
    return tuple(range(worker * batches // workers, -(-(worker + 1) * batches // workers)))


def _in_order(asked: Sequence[CurvePoint], parts: Sequence[Terms]) -> Terms:
    """Terms of all batches, of parts for some of them each."""
    if asked[0].places is None:
        return parts[0]
    found = {
        place: terms
        for one, part in zip(asked, parts, strict=True)
        for place, terms in zip(one.places or (), part, strict=True)
    }
    return tuple(found[place] for place in range(len(found)))


@dataclass(frozen=True, slots=True)
class RidgeChoice:
    """A layer whose regularization is to be chosen.

    Attributes:
        layer: The layer.
        weights: float64 [channels, outputs, taps].
        alive: bool [channels], those that remain.
        fit: Moments of its inputs to fit on.
        held: Others to choose on.
    """

    layer: Layer
    weights: FloatArray
    alive: BoolArray
    fit: Moments
    held: Moments


def choose_ridges(working: MaskedNetwork, samples: Samples, crew: Crew = HERE) -> dict[int, float]:
    """Choose the regularization of every layer by its effect on held-out samples."""
    choices = _ridge_choices(working, samples)
    return dict(crew.run(chosen_ridge, choices))


def _ridge_choices(working: MaskedNetwork, samples: Samples) -> Iterator[RidgeChoice]:
    for layer in working.layers:
        fit, held = samples.fit.moments(layer), samples.held.moments(layer)
        if fit is None or held is None or layer.groups > 1 or not working.is_open(layer):
            continue
        alive = alive_channels(working, layer)
        if np.count_nonzero(alive & (layer.units >= 0)) >= 2 and fit.count >= 2:
            yield RidgeChoice(layer, weights=working.weights(layer)[0], alive=alive, fit=fit, held=held)


def chosen_ridge(choice: RidgeChoice) -> tuple[int, float]:
    """The layer's node, and its regularization: the best for removing the least important fifth of its channels."""
    layer, alive = choice.layer, choice.alive
    trial = np.flatnonzero(alive & (layer.units >= 0))
    errors = LayerObs.of(layer, choice.weights, choice.fit, 1e-2, alive).errors()[trial]
    removed = np.sort(trial[np.argsort(errors, kind="stable")][: max(1, len(trial) // 5)])
    keep = np.setdiff1d(np.flatnonzero(alive), removed)
    return layer.node, best_ridge(choice.weights, choice.fit, choice.held, keep, removed)
