"""Layer by layer in the order of the graph: least squares on what the pruned network really sees.

A merge answers for one layer alone; errors of the layers before it remain and add up. Here each layer's
weights are fitted so that, on the inputs that the pruned network gives it, its output comes as near as
possible to the original's; where the output is added to a shortcut, the error that has come down the
shortcut is part of what it has to make up for. The solution is drawn towards the weights as they are
(not towards zero: that would shrink every output, and the shrinking compounds), and is kept only if it
brings the network's own output nearer to the original's on samples it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array, FloatArray
from onnxcop.reconstruction.divergence import Reference, Standing
from onnxcop.reconstruction.linear_layers import LinearNode, linear_node, rows_of
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.normal_equations import Layer, RowSums, matched_moments, solve
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions
from onnxcop.runtime.states import LiveTensors

_ROWS_PER_FEATURE = 40
_MOST_ROWS = 40_000
_PER_SAMPLE = 24  # positions of a map that are drawn where they suffice: neighbours say much the same
_LARGEST = 4096  # features; a wider layer is left as it is

Fit = tuple[FloatArray, FloatArray | None]


@dataclass(frozen=True)
class RefineSet:
    """Samples for refinement: some batches fit, which are read once, the others judge."""

    fit: Iterable[Mapping[str, Array]]
    judge: Sequence[Mapping[str, Array]]
    reference: Reference


@dataclass
class Refiner:
    """One pass over the network.

    Args:
        original: The network as it was.
        working: The pruned one; its weights change.
        samples: Samples to fit and judge on.
        options: How pieces are run.
        seed: Of the batches and the positions of large maps that are drawn.
    """

    original: MaskedNetwork
    working: MaskedNetwork
    samples: RefineSet
    options: EngineOptions
    seed: int = 0
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
        # A layer of few features takes the first batches only: they have to be of all sorts.
        self._fit = (judges + np.random.default_rng(self.seed).permutation(len(feeds) - judges)).tolist()

    def run(self, progress: Progress = silent) -> tuple[int, int]:
        """Refine every layer that can be; returns how many were tried and how many were kept."""
        self._best = self._race(None)
        nodes = [n for n in range(self.working.partition.count) if self._linear(n) is not None]
        kept = tried = 0
        for done, index in enumerate(nodes):
            node = self._linear(index)
            if node is None:
                continue
            for executor in (self._target, self._pruned):
                executor.advance(index, places=self._judge)
            if self._differs(node):
                tried += 1
                kept += self._refine(index, node)
            progress("refinement", done + 1, len(nodes))
        return tried, kept

    def _linear(self, index: int) -> LinearNode | None:
        found = linear_node(self.working, index)
        return found if found is not None and found.features <= _LARGEST else None

    def _race(self, best: Standing | None) -> Standing | None:
        """How far the network as it stands is from the original; None if it is no nearer than `best`."""
        with closing(self._pruned.finishing(places=self._judge)) as outputs:
            return self.samples.reference.race(outputs, best)

    def _differs(self, node: LinearNode) -> bool:
        """Whether anything that reaches this layer, or its own weights, is not as it was."""
        if not np.array_equal(self.original.read(node.weight), self.working.read(node.weight)):
            return True
        return not np.array_equal(self._target.states[0][node.data], self._pruned.states[0][node.data])

    def _refine(self, index: int, node: LinearNode) -> bool:
        """Fit one layer; returns whether the fit was kept."""
        rng = np.random.default_rng(self.seed + index)
        layer = _described(node, self.working)
        wanted = min(_MOST_ROWS, _ROWS_PER_FEATURE * node.features + 2000)
        sizes = [(self._pruned.states.shape_of(place)[node.data] or (1,))[0] for place in self._judge]
        judged = sum(sizes)
        each = sizes[0] * len(self._fit)  # samples to fit on, about
        count = max(wanted // max(judged + each, 1), _PER_SAMPLE)
        hold = self._sums(index, node, layer, self._judge, count, rng)
        drawn = max(hold.count / max(judged, 1), 1e-9)  # rows of a sample
        batches = int(np.ceil(wanted * each / max(judged + each, 1) / drawn / sizes[0]))
        places = self._fit[: max(1, batches)]
        for executor in (self._target, self._pruned):
            executor.advance(index, places=places)
        fit = self._sums(index, node, layer, places, count, rng)
        if not fit.count or not hold.count:
            return False
        saved = self._save(node)
        for weights, bias in candidates(layer, fit, hold):
            node.write(self.working, weights, bias)
            found = self._race(self._best)
            if found is not None:
                self._best = found
                return True
        for name, tensor in saved.items():
            self.working.partition.stored[name].CopyFrom(tensor)
        return False

    def _sums(
        self, index: int, node: LinearNode, layer: Layer, places: Sequence[int], count: int, rng: np.random.Generator
    ) -> RowSums:
        """Inputs of a layer, and what its output lacks, over some positions of every sample."""
        found = RowSums.empty(*layer.weights.shape)
        for place, want in zip(places, self._targets(index, node, places), strict=True):
            data = self._pruned.states[place][node.data]
            inputs, outputs = rows_of(node, data, want, count, rng)
            missing = outputs - (inputs.transpose(1, 0, 2) @ layer.weights).transpose(1, 0, 2)
            found.add(inputs, missing if layer.bias is None else missing - layer.bias, single=data.dtype != np.float64)
        return found

    def _save(self, node: LinearNode) -> dict[str, onnx.TensorProto]:
        names = [node.weight, *([node.bias] if node.bias else [])]
        stored = self.working.partition.stored
        return {name: onnx.TensorProto.FromString(stored[name].SerializeToString()) for name in names}

    def _targets(self, index: int, node: LinearNode, places: Sequence[int]) -> Iterator[Array]:
        """The original's output of batches, plus what has gone wrong on the shortcut it is added to."""
        shortcut = shortcut_of(self.working, node, index)
        names = [node.output] if shortcut is None else [node.output, shortcut]
        for place, found in zip(places, self._target.stream(node.stop, names, places), strict=True):
            want = found[node.output]
            if shortcut is not None and found[shortcut].shape == want.shape:
                want = want + (found[shortcut] - self._pruned.states[place][shortcut])
            yield want


def _described(node: LinearNode, working: MaskedNetwork) -> Layer:
    weights, bias = node.read(working)
    return Layer(weights, bias, node.alive_features(working), node.alive_outputs(working))


def shortcut_of(working: MaskedNetwork, node: LinearNode, index: int) -> str | None:
    """The other operand of the addition that alone reads a layer's output, if it is already known."""
    readers = [n for n in working.model.graph.node if node.output in n.input]
    if len(readers) != 1 or readers[0].op_type not in ("Add", "Sum") or len(readers[0].input) != 2:
        return None
    other = next((name for name in readers[0].input if name != node.output), None)
    if other is None or other in working.partition.constants:
        return None
    made = working.partition.maker.get(other, -1)
    return other if made < index and other in working.partition.crossing(index) else None


def candidates(layer: Layer, fit: RowSums, hold: RowSums) -> Iterator[Fit]:
    """Better weights for a layer, the boldest first: least squares, half of its step, matched moments."""
    found = solve(layer, fit, hold)
    if found is not None:
        change, shift = found
        for share in (1.0, 0.5):
            yield layer.weights + share * change, None if layer.bias is None else layer.bias + share * shift
    if layer.bias is not None:
        yield matched_moments(layer, layer.bias, fit)
