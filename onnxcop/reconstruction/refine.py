"""Refinement layer by layer, in graph order: least squares on the inputs that the pruned network really sees.

A merge corrects one layer alone, so errors of the layers before it remain and add up. Here each layer's weights are
fitted on the inputs that the pruned network gives it, so that its output is closest to the original's. If the output is
added to a shortcut, the fit also compensates for the error of the shortcut. The solution is regularized towards the
current weights, not towards zero, because shrinking every output compounds. It is kept only if it brings the network's
output closer to the original's on held-out samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array
from onnxcop.parallel.crew import HERE, Crew, Shared
from onnxcop.reconstruction.divergence import HeldOut, Reference, Standing
from onnxcop.reconstruction.linear_layers import Fit, LinearLayer, linear_layer
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.normal_equations import (
    FittedLayer,
    RidgeFit,
    RowSums,
    matched_moments,
    solve,
    solve_with,
)
from onnxcop.reconstruction.refine_batches import OwnBatches, RefineBatches, SpreadBatches, Trial
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


@dataclass(frozen=True, slots=True)
class FitStep:
    """How a layer is fitted.

    Attributes:
        ridge: λ of the regression; None to match moments alone.
        share: Share of the regression's step.
        scarce: Whether that took all samples to fit on.
    """

    ridge: float | None = None
    share: float = 1.0
    scarce: bool = False

    def fitted(self, layer: FittedLayer, rows: RowSums) -> Fit | None:
        """The layer's weights after this step on other rows; None if there is no solution."""
        if self.ridge is None:
            return None if layer.bias is None else matched_moments(layer, layer.bias, rows)
        found = solve_with(layer, rows, self.ridge)
        return None if found is None else _moved(layer, found, self.share)


@dataclass(frozen=True, slots=True)
class Refined:
    """The result of a pass.

    Attributes:
        tried: How many layers were fitted.
        steps: By node, the steps that were kept.
    """

    tried: int
    steps: Mapping[int, FitStep]


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
    _best: Standing = field(init=False)
    _larger: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        samples = self.samples
        feeds = LiveTensors.holding(chain(samples.judge, samples.fit))
        judges = len(samples.judge)
        if judges < len(feeds):  # batches to fit on may hold more samples
            self._larger = _rows_of(feeds.shape_of(judges)) / _rows_of(feeds.shape_of(0))
        # A layer of few features uses only the first batches, so they must be mixed.
        self._fit = (judges + np.random.default_rng(self.seed).permutation(len(feeds) - judges)).tolist()
        self._batches = (
            OwnBatches(
                self.original, self.working, feeds, reference=samples.reference, judges=judges, options=self.options
            )
            if self.shared is None
            else SpreadBatches(self.crew, self.shared, self.working, feeds, order=self._fit, options=self.options)
        )

    def run(self, progress: Progress = silent) -> Refined:
        """Refine every layer that can be fitted."""
        self._best = self._batches.standing()
        found = (linear_layer(self.working, index) for index in range(self.working.partition.count))
        layers = [layer for layer in found if layer is not None and layer.features <= _LARGEST]
        tried, steps = 0, dict[int, FitStep]()
        for done, layer in enumerate(layers):
            self._batches.reach(layer)
            if self._differs(layer):
                tried += 1
                step = self._refine(layer)
                if step is not None:
                    steps[layer.index] = step
            progress("refinement", done + 1, len(layers))
        return Refined(tried, steps)

    def repeat(self, steps: Mapping[int, FitStep], progress: Progress = silent) -> None:
        """Take known steps once more, fitted on all samples, where those to fit on were scarce; nothing is judged.

        Args:
            steps: By node, the steps that an earlier pass chose on the held-out samples.
            progress: Called with (stage, done, total).
        """
        scarce = sorted((index, step) for index, step in steps.items() if step.scarce)
        for done, (index, step) in enumerate(scarce):
            layer = linear_layer(self.working, index)
            assert layer is not None  # the earlier pass fitted it
            self._batches.reach(layer)
            state = layer.fitted()
            hold, rows, _ = self._sums(layer, state)
            rows.absorb(hold)
            fit = step.fitted(state, rows) if rows.count else None
            if fit is not None:
                self._batches.settle(layer, fit)
            progress("final refinement", done + 1, len(scarce))

    def _differs(self, layer: LinearLayer) -> bool:
        """Whether the inputs of this layer, or its own weights, differ from the original's."""
        if not np.array_equal(self.original.read(layer.own.weight), self.working.read(layer.own.weight)):
            return True
        return self._batches.differs(layer)

    def _refine(self, layer: LinearLayer) -> FitStep | None:
        """Fit one layer; returns the step that was kept, if any."""
        state = layer.fitted()
        hold, fit, scarce = self._sums(layer, state)
        if not fit.count or not hold.count:
            return None
        steps: list[FitStep] = []

        def trials() -> Iterator[Trial]:
            for step, weights in candidates(state, fit, hold):
                steps.append(replace(step, scarce=scarce))
                yield Trial(weights, shorter=step.share < 1.0)

        kept = self._batches.improved(layer, trials(), self._best)
        if kept is None:
            return None
        self._best = kept.standing
        return steps[kept.number]

    def _sums(self, layer: LinearLayer, state: FittedLayer) -> tuple[RowSums, RowSums, bool]:
        """Sums over held-out rows of a layer, and over as many rows to fit on as it needs; whether that takes all."""
        rng = np.random.default_rng(self.seed + layer.index)
        rows = min(_MOST_ROWS, _ROWS_PER_FEATURE * layer.features + 2000)
        sizes = self._batches.sizes(layer)
        judged = sum(sizes)
        size = sizes[0] * self._larger  # samples of a batch to fit on, but for the last
        each = size * len(self._fit)
        count = max(int(rows // (judged + each)), _PER_SAMPLE)

        used = 0

        def chosen(held: int) -> Sequence[int]:
            nonlocal used
            drawn = max(held / judged, 1e-9)  # rows of a sample
            used = max(1, int(np.ceil(rows * each / (judged + each) / drawn / size)))
            return self._fit[:used]

        hold, fit = self._batches.sums(layer, state, count, rng, chosen)
        return hold, fit, used >= len(self._fit)


def _rows_of(shapes: Mapping[str, tuple[int, ...] | None]) -> int:
    """The first sizes of a batch's inputs, all in all."""
    return sum(shape[0] for shape in shapes.values() if shape) or 1


def candidates(layer: FittedLayer, fit: RowSums, hold: RowSums) -> Iterator[tuple[FitStep, Fit]]:
    """Better weights for a layer, the boldest first: least squares, half of its step, matched moments."""
    found = solve(layer, fit, hold)
    if found is not None:
        for share in (1.0, 0.5):
            yield FitStep(found.ridge, share), _moved(layer, found, share)
    if layer.bias is not None:
        yield FitStep(), matched_moments(layer, layer.bias, fit)


def _moved(layer: FittedLayer, found: RidgeFit, share: float) -> Fit:
    bias = None if layer.bias is None else layer.bias + share * found.shift
    return layer.weights + share * found.change, bias
