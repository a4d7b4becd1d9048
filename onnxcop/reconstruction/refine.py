"""Refinement layer by layer, in graph order: least squares on the inputs that the pruned network really sees.

A merge corrects one layer alone, so errors of the layers before it remain and add up. Here each layer's weights are
fitted on the inputs that the pruned network gives it, so that its output is closest to the original's. If the output is
added to a shortcut, the fit also compensates for the error of the shortcut. The solution is regularized towards the
current weights, not towards zero, because shrinking every output compounds. It is kept only if it brings the network's
output closer to the original's on held-out samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array
from onnxcop.parallel.crew import HERE, Crew, Shared
from onnxcop.reconstruction.divergence import HeldOut, Reference, Standing
from onnxcop.reconstruction.linear_layers import Fit, LinearLayer, linear_layer
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.normal_equations import FittedLayer, RowSums, matched_moments, solve
from onnxcop.reconstruction.refine_batches import OwnBatches, RefineBatches, SpreadBatches
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
        crew: Workers for the batches.
        shared: The original and the batches to judge on, as workers know them; None to stay in this process.
    """

    original: MaskedNetwork
    working: MaskedNetwork
    samples: RefineSet
    options: EngineOptions
    seed: int
    crew: Crew = HERE
    shared: tuple[Shared[MaskedNetwork], Shared[HeldOut]] | None = None
    _batches: RefineBatches = field(init=False)
    _fit: Sequence[int] = field(init=False)
    _best: Standing | None = field(init=False)

    def __post_init__(self) -> None:
        samples = self.samples
        feeds = LiveTensors.holding(chain(samples.judge, samples.fit))
        judges = len(samples.judge)
        # A layer of few features uses only the first batches, so they must be mixed.
        self._fit = (judges + np.random.default_rng(self.seed).permutation(len(feeds) - judges)).tolist()
        self._batches = (
            OwnBatches(
                self.original, self.working, feeds, reference=samples.reference, judges=judges, options=self.options
            )
            if self.shared is None
            else SpreadBatches(self.crew, self.shared, self.working, feeds, order=self._fit, options=self.options)
        )

    def run(self, progress: Progress = silent) -> tuple[int, int]:
        """Refine every layer that can be fitted; returns how many were tried and how many were kept."""
        self._best = self._batches.race(None)
        candidates = (linear_layer(self.working, index) for index in range(self.working.partition.count))
        layers = [layer for layer in candidates if layer is not None and layer.features <= _LARGEST]
        kept = tried = 0
        for done, layer in enumerate(layers):
            self._batches.reach(layer)
            if self._differs(layer):
                tried += 1
                kept += self._refine(layer)
            progress("refinement", done + 1, len(layers))
        return tried, kept

    def _differs(self, layer: LinearLayer) -> bool:
        """Whether the inputs of this layer, or its own weights, differ from the original's."""
        if not np.array_equal(self.original.read(layer.own.weight), self.working.read(layer.own.weight)):
            return True
        return self._batches.differs(layer)

    def _refine(self, layer: LinearLayer) -> bool:
        """Fit one layer; returns whether the fit was kept."""
        rng = np.random.default_rng(self.seed + layer.index)
        state = layer.fitted()
        rows = min(_MOST_ROWS, _ROWS_PER_FEATURE * layer.features + 2000)
        sizes = self._batches.sizes(layer)
        judged = sum(sizes)
        each = sizes[0] * len(self._fit)  # approximate number of samples to fit on
        count = max(rows // (judged + each), _PER_SAMPLE)

        def chosen(held: int) -> Sequence[int]:
            drawn = max(held / judged, 1e-9)  # rows of a sample
            batches = int(np.ceil(rows * each / (judged + each) / drawn / sizes[0]))
            return self._fit[: max(1, batches)]

        hold, fit = self._batches.sums(layer, state, count, rng, chosen)
        if not fit.count or not hold.count:
            return False
        standing = self._batches.improved(layer, candidates(state, fit, hold), self._best)
        if standing is not None:
            self._best = standing
        return standing is not None


def candidates(layer: FittedLayer, fit: RowSums, hold: RowSums) -> Iterator[Fit]:
    """Better weights for a layer, the boldest first: least squares, half of its step, matched moments."""
    fitted = solve(layer, fit, hold)
    if fitted is not None:
        change, shift = fitted
        for share in (1.0, 0.5):
            yield layer.weights + share * change, None if layer.bias is None else layer.bias + share * shift
    if layer.bias is not None:
        yield matched_moments(layer, layer.bias, fit)
