"""Batches on workers: the end of a network, and the batches of refinement, each at a worker that keeps its state.

In refinement a batch moves forward through both networks, layer by layer. A worker keeps the tensors of its batches.
What travels are weights that changed, positions to take rows from, sums over rows, and terms of a distance. Sums and
terms are added here in the order of the batches. A worker that lost the state of a batch, or never had it, is sent the
samples and all steps again.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxcop._base.lookup import Recent
from onnxcop._base.types import Array, Feed, FloatArray, IntArray
from onnxcop.errors import EngineError
from onnxcop.graph.edit import copied
from onnxcop.outputs.batches import answer_to
from onnxcop.parallel.crew import Crew
from onnxcop.reconstruction.divergence import HeldOut
from onnxcop.reconstruction.linear_layers import LinearLayer, linear_layer, wanted_names, wanted_output
from onnxcop.reconstruction.network import MaskedNetwork, NetworkChange
from onnxcop.reconstruction.normal_equations import BatchSums, FittedLayer
from onnxcop.runtime.segments import GraphPartition, PartialExecutor, common_sizes
from onnxcop.runtime.session import EngineOptions, KeptSession, close
from onnxcop.runtime.states import LiveTensors

CANDIDATES = 3  # weights that are tried for a layer
_OPEN = 6  # pieces that a worker keeps loaded: a layer needs three, and batches that lag behind need others

Sizes = Mapping[str, Sequence[int | None]]
Shapes = Mapping[str, tuple[int, ...] | None]


def finished_by(crew: Crew, executor: PartialExecutor, places: Sequence[int]) -> Generator[Feed]:
    """Run batches from their cut to the end.

    Args:
        crew: Runs them; without workers they run here.
        executor: The live tensors of a network.
        places: Indices of batches, in this order.

    Yields:
        The outputs, batch by batch.
    """
    piece = executor.rest(places) if crew.spread else None
    if piece is None:
        yield from executor.finishing(places=places)
        return
    inputs = [value.name for value in piece.graph.input]
    states = (executor.states[place] for place in places)
    shared = crew.share(KeptSession(piece, crew.engine(executor.options), passing=True))
    with closing(crew.run(answer_to, ({name: state[name] for name in inputs} for state in states), shared)) as results:
        for place, outputs in zip(places, results, strict=True):
            early = [name for name in executor.partition.outputs if name not in outputs]
            known = executor.states[place] if early else {}
            yield {name: known[name] if name in early else outputs[name] for name in executor.partition.outputs}


@dataclass(frozen=True, slots=True)
class Step:
    """A batch moves to a later cut of both networks.

    Attributes:
        cut: The cut.
        sizes: Declared sizes of the inputs of the piece on the way, for the original and the pruned network.
    """

    cut: int
    sizes: tuple[Sizes, Sizes]


@dataclass(frozen=True, slots=True)
class RowWish:
    """Rows of the layer that a batch has reached, to sum over.

    Attributes:
        layer: The layer's node.
        sizes: Declared sizes of the inputs of the piece that makes the targets.
        drawn: Positions (see :meth:`LinearLayer.drawn`).
        space: Sizes of a map of the layer's output, by which positions were drawn.
    """

    layer: int
    sizes: Sizes
    drawn: IntArray | None
    space: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Visit:
    """Work on a batch.

    Attributes:
        place: The number of the batch.
        before: Steps that it has behind it; with 0 it starts from its samples.
        steps: Further steps.
        feed: Its samples, if it starts from them and they are not among the held-out ones.
        rows: Rows to sum over after the last step.
        compared: Layer's node whose input is compared with the original's, and whose output is measured; -1 for none.
        sizes: Declared sizes of the inputs of the rest of the network, to score a batch.
        candidate: Number of the weights to score; -1 for the current ones.
    """

    place: int
    before: int
    steps: tuple[Step, ...] = ()
    feed: Feed | None = None
    rows: RowWish | None = None
    compared: int = -1
    sizes: Sizes | None = None
    candidate: int = -1


@dataclass
class KnownBatch:
    """What this process knows of a batch at its worker.

    Attributes:
        homes: Numbers of the workers that keep it.
        shapes: Shapes of the live tensors of both networks.
        steps: All steps so far.
        cut: Where it is.
    """

    homes: tuple[int, ...]
    shapes: tuple[Shapes, Shapes]
    steps: tuple[Step, ...] = ()
    cut: int = 0


def homes_of(judges: int, workers: int) -> list[tuple[int, ...]]:
    """Numbers of the workers that keep each batch to judge on.

    Batches that are left when each worker has as many are kept by several, one for each candidate if possible. So
    candidates are judged side by side, and no worker waits for those that have a batch more.
    """
    whole = judges - judges % workers
    left = judges - whole
    copies = max(1, min(CANDIDATES, workers // left)) if left else 1
    return [(place,) for place in range(whole)] + [
        tuple(place + left * copy for copy in range(copies)) for place in range(left)
    ]


@dataclass(frozen=True, slots=True)
class Visited:
    """What a visit has found.

    Attributes:
        shapes: Shapes of the live tensors of both networks after the last step; None without a step.
        differs: Whether the compared input differs.
        space: Sizes of a map of the compared layer's output.
        sums: Sums over rows; None if there are no rows.
    """

    shapes: tuple[Shapes, Shapes] | None = None
    differs: bool = False
    space: tuple[int, ...] = ()
    sums: BatchSums | None = None


@dataclass(frozen=True)
class ChangedWeights:
    """Stored tensors that changed, in a form that tells two lists apart."""

    tensors: tuple[onnx.TensorProto, ...] = ()


@dataclass(frozen=True)
class Tried:
    """Weights to score.

    Attributes:
        number: A number for each list of candidates in a pass.
        candidates: The tensors of each candidate.
    """

    number: int = 0
    candidates: tuple[tuple[onnx.TensorProto, ...], ...] = ()


class _Side:
    """One of the two networks in a worker: the live tensors of its batches, and loaded pieces."""

    def __init__(self, partition: GraphPartition, options: EngineOptions, batches: int) -> None:
        self.partition, self.options = partition, options
        self.states = LiveTensors([{}] * batches)
        self.cuts = [0] * batches
        self._pieces, self._rests = (Recent[Hashable, KeptSession | None](most, close) for most in (_OPEN, 1))

    def begin(self, place: int, feed: Mapping[str, Array]) -> None:
        self.cuts[place] = 0
        self.states.replace(place, dict(feed))

    def move(self, place: int, cut: int, sizes: Sizes) -> None:
        self.states.replace(place, self.made(place, cut, self.partition.crossing(cut), sizes))
        self.cuts[place] = cut

    def made(
        self, place: int, stop: int, names: Sequence[str], sizes: Sizes, candidate: tuple[int, int] | None = None
    ) -> Feed:
        """Tensors that are live or made before node `stop`; candidates have different weights there."""
        start = self.cuts[place]
        known = tuple((name, tuple(size)) for name, size in sizes.items())
        pieces = self._pieces if candidate is None else self._rests
        key = (start, stop, tuple(names), known, candidate)
        kept = pieces.get(key, lambda: self._loaded(start, stop, names, sizes))
        state = self.states[place]
        if kept is None:
            return {name: state[name] for name in names}
        outputs = kept.session.run({spec.name: state[spec.name] for spec in kept.session.inputs})
        return {name: outputs[name] if name in outputs else state[name] for name in names}

    def _loaded(self, start: int, stop: int, names: Sequence[str], sizes: Sizes) -> KeptSession | None:
        piece = self.partition.piece(start, stop, names, sizes)
        return None if piece is None else KeptSession(piece, self.options, passing=True)


@dataclass
class RefinePass:
    """One pass of refinement, as its workers share it.

    Attributes:
        number: A number for each pass.
        change: The difference of the pruned network from the original when the pass begins.
        options: How to run pieces.
        batches: How many batches there are.
    """

    number: int
    change: NetworkChange
    options: EngineOptions
    batches: int
    _working: MaskedNetwork | None = None
    _sides: tuple[_Side, _Side] | None = None
    _done: list[int] = field(default_factory=list)
    _known: ChangedWeights | None = None
    _layer: tuple[LinearLayer, FittedLayer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what a worker makes itself."""
        return vars(self) | {"_working": None, "_sides": None, "_done": [], "_known": None, "_layer": None}

    def arrive(self, visit: Visit, original: MaskedNetwork, held: HeldOut, news: ChangedWeights) -> bool:
        """Move a batch to where it is wanted; False if this worker does not have it."""
        if self._sides is None:
            self._working = self.change.of(original)
            self._done = [-1] * self.batches
            partitions = (original.partition, self._working.partition)
            self._sides = tuple(_Side(one, self.options, self.batches) for one in partitions)  # type: ignore[assignment]
        assert self._working is not None and self._sides is not None
        if news is not self._known:
            self._working.put(news.tensors)
            self._known, self._layer = news, None
        if visit.before == 0:
            self._done[visit.place] = 0
            feed = visit.feed if visit.feed is not None else held.feeds[visit.place]
            for side in self._sides:
                side.begin(visit.place, feed)
        if self._done[visit.place] != visit.before:
            return False
        for step in visit.steps:
            for side, sizes in zip(self._sides, step.sizes, strict=True):
                side.move(visit.place, step.cut, sizes)
            self._done[visit.place] += 1
        return True

    def shapes(self, place: int) -> tuple[Shapes, Shapes]:
        """Shapes of the live tensors of a batch."""
        assert self._sides is not None
        target, pruned = self._sides
        return target.states.shape_of(place), pruned.states.shape_of(place)

    def differs(self, place: int, node: int) -> bool:
        """Whether the input of a layer differs from the original's."""
        assert self._sides is not None
        data = self._at(node)[0].data
        target, pruned = (side.states[place][data] for side in self._sides)
        return not np.array_equal(target, pruned)

    def space(self, place: int, node: int) -> tuple[int, ...]:
        """Sizes of a map of a layer's output."""
        assert self._sides is not None
        target, made = self._sides[0], self._at(node)[0].own
        sizes = common_sizes([target.states.shape_of(place)])
        return tuple(target.made(place, made.stop, [made.output], sizes)[made.output].shape[2:])

    def sums(self, place: int, wish: RowWish) -> BatchSums | None:
        """Sums over rows of a batch; None if there are no rows."""
        assert self._sides is not None
        target, pruned = self._sides
        layer, state = self._at(wish.layer)
        live = target.made(place, layer.own.stop, wanted_names(layer), wish.sizes)
        known = pruned.states[place]
        wanted = wanted_output(layer, live, known)
        if layer.kernel.kind != "matmul" and wanted.shape[2:] != wish.space:
            raise EngineError(f"tensor {layer.own.output!r} is of another shape in a worker; leave out --workers")
        inputs, outputs = layer.rows_at(known[layer.data], wanted, wish.drawn)
        if not len(inputs):
            return None
        single = known[layer.data].dtype != np.float64
        return BatchSums.of(inputs, state.missing(inputs, outputs), single=single)

    def scored(self, visit: Visit, held: HeldOut, tried: Tried) -> list[FloatArray] | None:
        """Terms of the distance of a batch, with the weights of a candidate."""
        assert self._working is not None and self._sides is not None and visit.sizes is not None
        pruned, stored = self._sides[1], self._working.partition.stored
        weights = tried.candidates[visit.candidate] if visit.candidate >= 0 else ()
        before = [copied(stored[tensor.name]) for tensor in weights]
        self._working.put(weights)
        try:
            stop, names = pruned.partition.count, pruned.partition.outputs
            outputs = pruned.made(visit.place, stop, names, visit.sizes, (tried.number, visit.candidate))
        finally:
            self._working.put(before)
        return held.reference.terms(visit.place, outputs)

    def _at(self, node: int) -> tuple[LinearLayer, FittedLayer]:
        if self._layer is None or self._layer[0].index != node:
            assert self._working is not None
            layer = linear_layer(self._working, node)
            assert layer is not None
            self._layer = layer, layer.fitted()
        return self._layer


def visit_batch(
    visit: Visit, original: MaskedNetwork, held: HeldOut, state: RefinePass, news: ChangedWeights
) -> Visited | None:
    """Move a batch, and sum over its rows if wanted; None if this worker does not have the batch."""
    if not state.arrive(visit, original, held, news):
        return None
    compares = visit.compared >= 0
    return Visited(
        shapes=state.shapes(visit.place) if visit.steps else None,
        differs=compares and state.differs(visit.place, visit.compared),
        space=state.space(visit.place, visit.compared) if compares else (),
        sums=None if visit.rows is None else state.sums(visit.place, visit.rows),
    )


@dataclass(frozen=True, slots=True)
class Scored:
    """Terms of a batch; None if its outputs cannot be compared."""

    terms: list[FloatArray] | None


def score_batch(
    visit: Visit, original: MaskedNetwork, held: HeldOut, state: RefinePass, news: ChangedWeights, tried: Tried
) -> Scored | None:
    """Score a batch from where it is; None if this worker does not have the batch."""
    if not state.arrive(visit, original, held, news):
        return None
    return Scored(state.scored(visit, held, tried))
