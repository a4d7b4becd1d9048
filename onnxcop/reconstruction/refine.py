"""Refinement layer by layer, in graph order: least squares on the inputs that the pruned network really sees.

A merge corrects one layer alone, so errors of the layers before it remain and add up. Here each layer's weights are
fitted on the inputs that the pruned network gives it, so that its output is closest to the original's. If the output is
added to a shortcut, the fit also compensates for the error of the shortcut. The solution is regularized towards the
current weights, not towards zero, because shrinking every output compounds. It is kept only if it brings the network's
output closer to the original's on held-out samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array
from onnxcop.graph.linear import StoredLayer
from onnxcop.graph.traits import Trait, traits
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.reconstruction.divergence import Reference, Standing
from onnxcop.reconstruction.linear_layers import Fit, LinearLayer, linear_layer
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.normal_equations import FittedLayer, RowSums, matched_moments, solve
from onnxcop.reconstruction.spread import finished_by
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions
from onnxcop.runtime.states import LiveTensors

_ROWS_PER_FEATURE = 40
_MOST_ROWS = 40_000
_PER_SAMPLE = 24  # positions of a map to draw, if they suffice: neighbours are alike
_LARGEST = 4096  # features; a wider layer is left as it is


@dataclass(frozen=True)
class RefineSet:
    """Samples for refinement: some batches fit and are read once, the others score."""

    fit: Iterable[Mapping[str, Array]]
    judge: Sequence[Mapping[str, Array]]
    reference: Reference


@dataclass
class Refiner:
    """One pass over the network.

    Args:
        original: The unpruned network.
        working: The pruned network; its weights change.
        samples: Samples to fit and to hold out.
        options: How to run pieces of the network.
        seed: Seed for drawing batches and positions of large maps.
        crew: Runs the batches that score.
    """

    original: MaskedNetwork
    working: MaskedNetwork
    samples: RefineSet
    options: EngineOptions
    seed: int = 0
    crew: Crew = HERE
    _target: PartialExecutor = field(init=False)
    _pruned: PartialExecutor = field(init=False)
    _judge: Sequence[int] = field(init=False)
    _fit: Sequence[int] = field(init=False)
    _best: Standing | None = field(init=False)

    def __post_init__(self) -> None:
        feeds = LiveTensors.holding(chain(self.samples.judge, self.samples.fit))
        self._target = PartialExecutor(self.original.partition, feeds, self.options)
        self._pruned = PartialExecutor(self.working.partition, feeds, self.options)
        judges = len(self.samples.judge)
        self._judge = range(judges)
        # A layer of few features uses only the first batches, so they must be mixed.
        self._fit = (judges + np.random.default_rng(self.seed).permutation(len(feeds) - judges)).tolist()

    def run(self, progress: Progress = silent) -> tuple[int, int]:
        """Refine every layer that can be fitted; returns how many were tried and how many were kept."""
        self._best = self._race(None)
        candidates = (linear_layer(self.working, index) for index in range(self.working.partition.count))
        layers = [layer for layer in candidates if layer is not None and layer.features <= _LARGEST]
        kept = tried = 0
        for done, layer in enumerate(layers):
            for executor in (self._target, self._pruned):
                executor.advance(layer.index, places=self._judge)
            if self._differs(layer):
                tried += 1
                kept += self._refine(layer)
            progress("refinement", done + 1, len(layers))
        return tried, kept

    def _race(self, best: Standing | None) -> Standing | None:
        """Distance of the current network from the original; None if it is no closer than `best`."""
        with closing(finished_by(self.crew, self._pruned, self._judge)) as outputs:
            return self.samples.reference.race(outputs, best)

    def _differs(self, layer: LinearLayer) -> bool:
        """Whether the inputs of this layer, or its own weights, differ from the original's."""
        if not np.array_equal(self.original.read(layer.own.weight), self.working.read(layer.own.weight)):
            return True
        return not np.array_equal(self._target.states[0][layer.data], self._pruned.states[0][layer.data])

    def _refine(self, layer: LinearLayer) -> bool:
        """Fit one layer; returns whether the fit was kept."""
        rng = np.random.default_rng(self.seed + layer.index)
        state = FittedLayer(*layer.read(), layer.alive_features(), layer.alive_outputs())
        rows = min(_MOST_ROWS, _ROWS_PER_FEATURE * layer.features + 2000)
        sizes = [(self._pruned.states.shape_of(place)[layer.data] or (1,))[0] for place in self._judge]
        judged = sum(sizes)
        each = sizes[0] * len(self._fit)  # approximate number of samples to fit on
        count = max(rows // max(judged + each, 1), _PER_SAMPLE)
        hold = self._sums(layer, state, self._judge, count, rng)
        drawn = max(hold.count / max(judged, 1), 1e-9)  # rows of a sample
        batches = int(np.ceil(rows * each / max(judged + each, 1) / drawn / sizes[0]))
        places = self._fit[: max(1, batches)]
        for executor in (self._target, self._pruned):
            executor.advance(layer.index, places=places)
        fit = self._sums(layer, state, places, count, rng)
        if not fit.count or not hold.count:
            return False
        saved = self._save(layer.own)
        for weights, bias in candidates(state, fit, hold):
            layer.write(weights, bias)
            standing = self._race(self._best)
            if standing is not None:
                self._best = standing
                return True
        for name, tensor in saved.items():
            self.working.partition.stored[name].CopyFrom(tensor)
        return False

    def _sums(
        self, layer: LinearLayer, state: FittedLayer, places: Sequence[int], count: int, rng: np.random.Generator
    ) -> RowSums:
        """Inputs of a layer, and the residual of its output, over some positions of every sample."""
        sums = RowSums.empty(*state.weights.shape)
        for place, target in zip(places, self._targets(layer, places), strict=True):
            data = self._pruned.states[place][layer.data]
            inputs, outputs = layer.rows(data, target, count, rng)
            missing = outputs - (inputs.transpose(1, 0, 2) @ state.weights).transpose(1, 0, 2)
            sums.add(inputs, missing if state.bias is None else missing - state.bias, single=data.dtype != np.float64)
        return sums

    def _save(self, own: StoredLayer) -> dict[str, onnx.TensorProto]:
        names = [own.weight, *([own.bias] if own.bias else [])]
        stored = self.working.partition.stored
        return {name: onnx.TensorProto.FromString(stored[name].SerializeToString()) for name in names}

    def _targets(self, layer: LinearLayer, places: Sequence[int]) -> Iterator[Array]:
        """The original's output for batches, plus the error of the shortcut that it is added to."""
        shortcut, made = shortcut_of(layer), layer.own.output
        names = [made] if shortcut is None else [made, shortcut]
        for place, live in zip(places, self._target.stream(layer.own.stop, names, places), strict=True):
            target = live[made]
            if shortcut is not None and live[shortcut].shape == target.shape:
                target = target + (live[shortcut] - self._pruned.states[place][shortcut])
            yield target


def shortcut_of(layer: LinearLayer) -> str | None:
    """The other operand of the addition that is the only reader of a layer's output, if it is already known."""
    working, made = layer.working, layer.own.output
    readers = [n for n in working.model.graph.node if made in n.input]
    if len(readers) != 1 or not traits(readers[0]) & Trait.ADDS or len(readers[0].input) != 2:
        return None
    other = next((name for name in readers[0].input if name != made), None)
    if other is None or other in working.partition.constants:
        return None
    known = working.partition.maker.get(other, -1) < layer.index and other in working.partition.crossing(layer.index)
    return other if known else None


def candidates(layer: FittedLayer, fit: RowSums, hold: RowSums) -> Iterator[Fit]:
    """Better weights for a layer, the boldest first: least squares, half of its step, matched moments."""
    fitted = solve(layer, fit, hold)
    if fitted is not None:
        change, shift = fitted
        for share in (1.0, 0.5):
            yield layer.weights + share * change, None if layer.bias is None else layer.bias + share * shift
    if layer.bias is not None:
        yield matched_moments(layer, layer.bias, fit)
