"""The batches of refinement at a layer: in this process, or each at a worker that keeps its state.

Both give the same bytes. Batches to judge on come first, then those to fit on. A batch that a layer does not need stays
at its cut, and later moves forward in one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx

from onnxcop._base.types import Array
from onnxcop.graph.edit import copied
from onnxcop.graph.linear import StoredLayer
from onnxcop.parallel.crew import Crew, Shared
from onnxcop.reconstruction.divergence import HeldOut, Race, Reference, Standing
from onnxcop.reconstruction.linear_layers import Fit, LinearLayer, wanted_names, wanted_output
from onnxcop.reconstruction.network import MaskedNetwork, NetworkChange
from onnxcop.reconstruction.normal_equations import FittedLayer, RowSums
from onnxcop.reconstruction.spread import (
    ChangedWeights,
    KnownBatch,
    RefinePass,
    RowWish,
    Step,
    Tried,
    Visit,
    Visited,
    homes_of,
    score_batch,
    visit_batch,
)
from onnxcop.runtime.segments import PartialExecutor, common_sizes
from onnxcop.runtime.session import EngineOptions
from onnxcop.runtime.states import LiveTensors

FEWEST_MACS = 4e9  # of all batches to judge on; below, sending tasks costs more than they take

R = TypeVar("R")
Tensors = tuple[onnx.TensorProto, ...]

_passes = itertools.count()
Chosen = Callable[[int], Sequence[int]]


class RefineBatches(Protocol):
    """What refinement asks of its batches."""

    def standing(self) -> Standing:
        """Distance of the current network from the original, by all batches to judge on."""
        ...

    def reach(self, layer: LinearLayer) -> None:
        """Move the batches to judge on to a layer."""
        ...

    def differs(self, layer: LinearLayer) -> bool:
        """Whether the layer's input in the first batch differs from the original's."""
        ...

    def sizes(self, layer: LinearLayer) -> list[int]:
        """Samples of the layer's input in the batches to judge on."""
        ...

    def sums(
        self, layer: LinearLayer, state: FittedLayer, count: int, rng: np.random.Generator, chosen: Chosen
    ) -> tuple[RowSums, RowSums]:
        """Sums over rows of the batches to judge on, and over rows of batches to fit on.

        Args:
            layer: The layer.
            state: Its weights.
            count: Positions of every sample.
            rng: Draws them.
            chosen: The batches to fit on, for a number of rows to judge on.
        """
        ...

    def improved(self, layer: LinearLayer, trials: Iterable[Trial], best: Standing) -> Kept | None:
        """Try weights in order; the first with which the network is nearer than `best` stay, else those from before."""
        ...

    def settle(self, layer: LinearLayer, fit: Fit) -> None:
        """Give a layer weights without trying them."""
        ...


@dataclass(frozen=True, slots=True)
class Trial:
    """Weights to try.

    Attributes:
        fit: The weights.
        shorter: Whether they are a part of the step before. If that one was clearly worse, they are too.
    """

    fit: Fit
    shorter: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights that were tried and stay.

    Attributes:
        number: Their number among those that were tried.
        standing: The distance of the network with them.
    """

    number: int
    standing: Standing


def saved(network: MaskedNetwork, own: StoredLayer) -> tuple[onnx.TensorProto, ...]:
    """Copies of a layer's tensors."""
    names = [own.weight, *([own.bias] if own.bias else [])]
    return tuple(copied(network.partition.stored[name]) for name in names)


class OwnBatches:
    """Batches in this process.

    Args:
        original: The unpruned network.
        working: The pruned network.
        feeds: All batches.
        reference: The original's outputs on those to judge on, the first ones.
        judges: How many those are.
        options: How to run pieces.
    """

    def __init__(
        self, original: MaskedNetwork, working: MaskedNetwork, feeds: Sequence[Mapping[str, Array]], *,
        reference: Reference, judges: int, options: EngineOptions,
    ) -> None:  # fmt: skip
        self._working, self._reference, self._judge = working, reference, range(judges)
        self._target = PartialExecutor(original.partition, feeds, options)
        self._pruned = PartialExecutor(working.partition, feeds, options)

    def standing(self) -> Standing:
        """As :meth:`RefineBatches.standing`."""
        return self._race(None).unopposed

    def _race(self, best: Standing | None) -> Race:
        with closing(self._pruned.finishing(places=self._judge)) as outputs:
            return self._reference.race(outputs, best)

    def reach(self, layer: LinearLayer) -> None:
        """As :meth:`RefineBatches.reach`."""
        self._advance(layer, self._judge)

    def _advance(self, layer: LinearLayer, places: Sequence[int]) -> None:
        for executor in (self._target, self._pruned):
            executor.advance(layer.index, places=places)

    def differs(self, layer: LinearLayer) -> bool:
        """As :meth:`RefineBatches.differs`."""
        return not np.array_equal(self._target.states[0][layer.data], self._pruned.states[0][layer.data])

    def sizes(self, layer: LinearLayer) -> list[int]:
        """As :meth:`RefineBatches.sizes`."""
        return [(self._pruned.states.shape_of(place)[layer.data] or (1,))[0] for place in self._judge]

    def sums(
        self, layer: LinearLayer, state: FittedLayer, count: int, rng: np.random.Generator, chosen: Chosen
    ) -> tuple[RowSums, RowSums]:
        """As :meth:`RefineBatches.sums`."""
        hold = self._sums(layer, state, self._judge, count, rng)
        places = chosen(hold.count)
        self._advance(layer, places)
        return hold, self._sums(layer, state, places, count, rng)

    def _sums(
        self, layer: LinearLayer, state: FittedLayer, places: Sequence[int], count: int, rng: np.random.Generator
    ) -> RowSums:
        """Inputs of a layer, and the residual of its output, over some positions of every sample."""
        sums = RowSums.empty(*state.weights.shape)
        streamed = self._target.stream(layer.own.stop, wanted_names(layer), places)
        for place, live in zip(places, streamed, strict=True):
            known = self._pruned.states[place]
            data = known[layer.data]
            inputs, outputs = layer.rows(data, wanted_output(layer, live, known), count, rng)
            sums.add(inputs, state.missing(inputs, outputs), single=data.dtype != np.float64)
        return sums

    def improved(self, layer: LinearLayer, trials: Iterable[Trial], best: Standing) -> Kept | None:
        """As :meth:`RefineBatches.improved`."""
        before = saved(self._working, layer.own)
        race = Race(None)
        for number, trial in enumerate(trials):
            if trial.shorter and race.clear:
                continue
            layer.write(*trial.fit)
            race = self._race(best)
            if race.standing is not None:
                return Kept(number, race.standing)
        self._working.put(before)
        return None

    def settle(self, layer: LinearLayer, fit: Fit) -> None:
        """As :meth:`RefineBatches.settle`."""
        layer.write(*fit)


class SpreadBatches:
    """Batches at workers.

    Args:
        crew: The workers; tasks of a home return to the same one.
        shared: The unpruned network, and the batches to judge on.
        working: The pruned network, in this process.
        feeds: All batches, these first.
        order: The batches to fit on, in the order of their use.
        options: How to run pieces.
    """

    def __init__(
        self, crew: Crew, shared: tuple[Shared[MaskedNetwork], Shared[HeldOut]], working: MaskedNetwork,
        feeds: LiveTensors, *, order: Sequence[int], options: EngineOptions,
    ) -> None:  # fmt: skip
        self._crew, self._working, self._feeds = crew, working, feeds
        self._original, self._held = shared
        self._judge = range(len(self._held.value.feeds))
        change = NetworkChange.between(self._original.value, working)
        self._pass = crew.share(RefinePass(next(_passes), change, crew.engine(options), len(feeds)))
        self._changed: dict[int, tuple[onnx.TensorProto, ...]] = {}  # by node, the weights that were kept
        self._told: list[int] = []
        self._news = crew.share(ChangedWeights())
        self._differs = False
        self._tried = itertools.count(1)
        self._spaces: dict[tuple[int, ...], tuple[int, ...]] = {}
        judges = len(self._judge)
        homes = dict(enumerate(homes_of(judges, crew.width)))
        self._side_by_side = any(len(one) > 1 for one in homes.values())
        homes |= {place: (judges + number,) for number, place in enumerate(order)}
        shapes = [feeds.shape_of(place) for place in range(len(feeds))]
        self._batches = [KnownBatch(homes[place], (one, one)) for place, one in enumerate(shapes)]

    def standing(self) -> Standing:
        """As :meth:`RefineBatches.standing`."""
        return self._race([()], [False], None)[1].unopposed

    def reach(self, layer: LinearLayer) -> None:
        """As :meth:`RefineBatches.reach`."""
        self._spaces = {}
        visits = self._moving(layer.index, self._judge) or [Visit(0, len(self._batches[0].steps))]
        visits[0] = replace(visits[0], compared=layer.index)  # of the first batch
        for visit, visited in zip(visits, self._visits(visits), strict=True):
            if visit.compared >= 0:
                self._differs = visited.differs
                self._spaces[self._data_shape(layer, visit.place)[2:]] = visited.space

    def differs(self, layer: LinearLayer) -> bool:
        """As :meth:`RefineBatches.differs`."""
        return self._differs

    def sizes(self, layer: LinearLayer) -> list[int]:
        """As :meth:`RefineBatches.sizes`."""
        return [self._data_shape(layer, place)[0] for place in self._judge]

    def sums(
        self, layer: LinearLayer, state: FittedLayer, count: int, rng: np.random.Generator, chosen: Chosen
    ) -> tuple[RowSums, RowSums]:
        """As :meth:`RefineBatches.sums`; batches to fit on move while those to judge on are summed up."""
        summing = self._summing(layer, self._judge, count, rng)
        rows = sum(layer.counted(self._data_shape(layer, p), self._made_shape(layer, p), count) for p in self._judge)
        places = chosen(rows)
        moving = self._moving(layer.index, places)
        hold = RowSums.empty(*state.weights.shape)
        for visited in self._visits([*summing, *moving]):
            if visited.sums is not None:
                hold.include(visited.sums)
        fit = RowSums.empty(*state.weights.shape)
        for visited in self._visits(self._summing(layer, places, count, rng)):
            if visited.sums is not None:
                fit.include(visited.sums)
        return hold, fit

    def improved(self, layer: LinearLayer, trials: Iterable[Trial], best: Standing) -> Kept | None:
        """As :meth:`RefineBatches.improved`."""
        before = saved(self._working, layer.own)
        groups: Iterable[list[Trial]] = [list(trials)] if self._side_by_side else ([trial] for trial in trials)
        race, passed = Race(None), 0
        for group in groups:
            if race.clear and all(trial.shorter for trial in group):  # beaten with the step that they are a part of
                passed += len(group)
                continue
            tried = []
            for trial in group:
                layer.write(*trial.fit)
                tried.append(saved(self._working, layer.own))
            number, race = self._race(tried, [trial.shorter for trial in group], best)
            if race.standing is not None:
                self._put(layer, tried[number])
                return Kept(passed + number, race.standing)
            passed += len(group)
            self._working.put(before)
        return None

    def settle(self, layer: LinearLayer, fit: Fit) -> None:
        """As :meth:`RefineBatches.settle`."""
        layer.write(*fit)
        self._put(layer, saved(self._working, layer.own))

    def _put(self, layer: LinearLayer, tensors: Tensors) -> None:
        self._working.put(tensors)
        self._changed[layer.index] = tensors

    def _race(self, tried: Sequence[Tensors], shorter: Sequence[bool], best: Standing | None) -> tuple[int, Race]:
        """The first of some weights with which the network is nearer than `best`, else the last that were tried.

        Args:
            tried: The weights.
            shorter: Whether each are a part of the step before.
            best: What to beat.
        """
        sizes = common_sizes([self._batches[place].shapes[1] for place in self._judge])
        at, sent = 0, list[tuple[Visit, int]]()  # the candidate that is compared now, and visits so far

        def wanted() -> Iterator[tuple[Visit, int]]:
            for number, place in itertools.product(range(len(tried)), self._judge):
                if number >= at:  # those before it are beaten, perhaps before their last batch
                    known = self._batches[place]
                    visit = Visit(place, len(known.steps), sizes=sizes, candidate=number)
                    sent.append((visit, known.homes[number % len(known.homes)]))
                    yield sent[-1]

        weights = self._crew.share(Tried(next(self._tried), tuple(tried)))
        with closing(self._run(score_batch, wanted(), weights, most=self._crew.width)) as scored:
            results = ((visit.candidate, one.terms) for one, (visit, _) in zip(scored, sent, strict=True))
            race = Race(None)
            for at, part in enumerate(shorter):
                if part and race.clear:
                    continue
                mine = (terms for candidate, terms in results if candidate == at)
                race = self._held.value.reference.race_by_terms(islice(mine, len(self._judge)), best)
                if race.standing is not None:
                    break
        return at, race

    def _data_shape(self, layer: LinearLayer, place: int) -> tuple[int, ...]:
        return self._batches[place].shapes[1][layer.data] or (1,)

    def _made_shape(self, layer: LinearLayer, place: int) -> tuple[int, ...]:
        """The shape of a layer's output, as far as the rows of a convolution depend on it."""
        if layer.kernel.kind == "matmul":
            return ()
        space = self._data_shape(layer, place)[2:]
        if space not in self._spaces:
            visit = Visit(place, len(self._batches[place].steps), compared=layer.index)
            self._spaces[space] = next(self._visits([visit])).space
        return (0, 0, *self._spaces[space])

    def _moving(self, cut: int, places: Sequence[int]) -> list[Visit]:
        """Visits that move batches to a cut, for those that are behind."""
        visits = []
        behind = [place for place in places if self._batches[place].cut < cut]
        for _, alike in groupby(behind, lambda place: self._batches[place].cut):
            group = [(place, self._batches[place]) for place in alike]
            target, pruned = (common_sizes([known.shapes[side] for _, known in group]) for side in (0, 1))
            step = Step(cut, (target, pruned))
            visits += [Visit(place, len(known.steps), (step,)) for place, known in group]
        return visits

    def _summing(
        self, layer: LinearLayer, places: Sequence[int], count: int, rng: np.random.Generator
    ) -> list[Visit]:  # fmt: skip
        """Visits that sum over rows of batches at a layer; rows are drawn in the order of the batches."""
        sizes = common_sizes([self._batches[place].shapes[0] for place in places])
        visits = []
        for place in places:
            made = self._made_shape(layer, place)
            drawn = layer.drawn(self._data_shape(layer, place), made, count, rng)
            wish = RowWish(layer.index, sizes, drawn, made[2:])
            visits.append(Visit(place, len(self._batches[place].steps), rows=wish))
        return visits

    def _visits(self, visits: Sequence[Visit]) -> Generator[Visited]:
        """Carry out visits, moves at all workers that keep the batch; yields the results in order."""
        moved = [self._batches[visit.place].cut for visit in visits if visit.steps]
        if moved:
            self._tell(min(moved))
        sent = [
            (visit, home)
            for visit in visits
            for home in reversed(self._batches[visit.place].homes[: None if visit.steps else 1])
        ]
        with closing(self._run(visit_batch, sent)) as results:
            for (visit, home), visited in zip(sent, results, strict=True):
                known = self._batches[visit.place]
                if home != known.homes[0]:
                    continue
                if visit.steps and visited.shapes is not None:
                    known.steps, known.shapes = known.steps + visit.steps, visited.shapes
                    known.cut = visit.steps[-1].cut
                yield visited

    def _tell(self, low: int) -> None:
        """Share weights that were kept from some node on: batches there have not passed them."""
        nodes = [node for node in self._changed if node >= low]
        if nodes != self._told:
            self._news = self._crew.share(self._all_changed(nodes))
            self._told = nodes

    def _all_changed(self, nodes: Iterable[int]) -> ChangedWeights:
        return ChangedWeights(tuple(tensor for node in nodes for tensor in self._changed[node]))

    def _run(
        self, task: Callable[..., R | None], sent: Iterable[tuple[Visit, int]], *extra: Shared[Any],
        most: int | None = None,
    ) -> Generator[R]:  # fmt: skip
        """Carry out visits at workers; those whose worker does not have the batch are repeated from its start."""
        asked, homes = list[tuple[Visit, int]](), list[int]()  # they grow as visits are given to workers

        def items() -> Iterator[Visit]:
            for visit, home in sent:
                asked.append((visit, home))
                homes.append(home)
                yield self._supplied(visit)

        shared = (self._original, self._held, self._pass)
        with closing(self._crew.run(task, items(), *shared, self._news, *extra, homes=homes, most=most)) as results:
            for result, (visit, home) in zip(results, asked, strict=True):
                yield self._again(task, visit, home, shared, extra) if result is None else result

    def _again(
        self, task: Callable[..., R | None], visit: Visit, home: int, shared: Sequence[Shared[Any]],
        extra: Sequence[Shared[Any]],
    ) -> R:  # fmt: skip
        steps = (*self._batches[visit.place].steps, *visit.steps)
        whole = self._supplied(replace(visit, before=0, steps=steps))
        news = self._crew.share(self._all_changed(self._changed))
        (result,) = self._crew.run(task, [whole], *shared, news, *extra, homes=[home])
        assert result is not None  # it starts from its samples
        return result

    def _supplied(self, visit: Visit) -> Visit:
        """A visit with the samples of its batch, if it starts from them and its worker does not have them."""
        if visit.before or visit.place in self._judge:
            return visit
        return replace(visit, feed=dict(self._feeds[visit.place]))
