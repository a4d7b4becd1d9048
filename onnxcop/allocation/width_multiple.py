"""Which widths pay on this machine: the granularity that kernels compute in, found by measurement.

Convolutions compute channels in blocks of 4, 8 or 16, and where a width is no multiple of the block
ONNX Runtime pads it, or falls back to a slower kernel. Which it is depends on the processor, the
provider and the layers around. So nothing is assumed: the whole model is cut to about the size that is
asked for with widths of several granularities, and timed. Time does not depend on the values of the
weights, so a rough choice of filters will do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxcop._base.types import IntArray
from onnxcop.allocation.budget import Budget, Limits
from onnxcop.allocation.greedy import choose
from onnxcop.analysis.analyze import Analysis
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.registry import criterion_named
from onnxcop.errors import BudgetError, EngineError, ModelError
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.latency import measure
from onnxcop.runtime.session import EngineOptions

log = logging.getLogger("onnxcop")

CANDIDATES = (1, 2, 4, 8, 16, 32)
_USUAL = Budget(macs=0.7)  # what is tried where the budget is no size
_SAFE = 8  # the multiple where nothing can be measured
_TOLERANCE = 1.1  # finer widths leave more choice, which is worth this much time
_SECONDS = 5.0
ROUGHLY = 0.01  # standard error of a latency that is good enough to choose by


@dataclass(frozen=True, slots=True)
class Tried:
    """A granularity that was measured.

    Attributes:
        multiple: Kept widths are multiples of it.
        macs: Fraction of the multiply-accumulates that was left.
        ratio: Latency, as a fraction of the original's.
        error: Standard error of that.
    """

    multiple: int
    macs: float
    ratio: float
    error: float

    @property
    def price(self) -> float:
        """Time per multiply-accumulate that is left, that of the original being 1."""
        return self.ratio / self.macs


@dataclass(frozen=True, slots=True)
class Widths:
    """The granularity that was chosen, and by what.

    Attributes:
        multiple: Kept widths should be multiples of it.
        tried: What was measured, the finest first; empty where nothing could be.
    """

    multiple: int
    tried: tuple[Tried, ...]

    def __str__(self) -> str:
        if not self.tried:
            return f"widths: multiples of {self.multiple}, untested, as latency could not be measured"
        found = ", ".join(f"{entry.multiple}: {entry.ratio:.0%} for {entry.macs:.0%}" for entry in self.tried)
        return f"widths: multiples of {self.multiple}, by measurement (latency for MACs: {found})"


def best(tried: Sequence[Tried]) -> int:
    """The finest granularity whose time per multiply-accumulate is near that of the best."""
    limit = _TOLERANCE * min(entry.price for entry in tried)
    return min(entry.multiple for entry in tried if entry.price <= limit)


def suitable_widths(
    analysis: Analysis, budget: Budget, limits: Limits, options: EngineOptions, seconds: float = _SECONDS
) -> Widths:
    """Find the granularity of widths that pays on this machine.

    Args:
        analysis: The model.
        budget: What it will be cut to.
        limits: What may not be cut.
        options: How it is run.
        seconds: About how long to measure.
    """
    wanted = _USUAL if budget.empty else budget
    cuts: dict[int, tuple[onnx.ModelProto, float]] = {}
    for multiple in CANDIDATES:
        try:
            cuts[multiple] = rough_cut(analysis, wanted, replace(limits, multiple_of=multiple))
        except BudgetError:  # too coarse for so much, or for any cut at all
            log.debug("widths in multiples of %d cannot meet the budget", multiple)
    if not cuts:
        return Widths(1, ())
    models = [analysis.original, *(model for model, _ in cuts.values())]
    try:
        feeds = random_feeds(analysis.original, analysis.input_shapes, seed=0)
        found = measure(models, feeds, options, seconds=seconds, enough=ROUGHLY)
    except (EngineError, ModelError) as error:
        log.warning("latency could not be measured, so widths are multiples of %d: %s", _SAFE, error)
        return Widths(_SAFE, ())
    tried = []
    for place, (multiple, (_, macs)) in enumerate(cuts.items(), start=1):
        times = found.latency(place)
        tried.append(Tried(multiple, macs, times.ratio, times.error))
    return Widths(best(tried), tuple(tried))


def rough_cut(analysis: Analysis, budget: Budget, limits: Limits) -> tuple[onnx.ModelProto, float]:
    """The model cut to about a budget with widths of one granularity, for timing, and the fraction of MACs left.

    Raises:
        BudgetError: The budget cannot be met.
    """
    removed = _no_coarser(analysis, rough_choice(analysis, budget, limits), limits.multiple_of)
    return without(analysis, removed), float(analysis.cost.of_units(removed)[0] / analysis.cost.original()[0])


def rough_choice(analysis: Analysis, budget: Budget, limits: Limits) -> IntArray:
    """The units, int64, that the norms of the weights would remove for a budget: good enough for timing.

    Raises:
        BudgetError: The budget cannot be met.
    """
    context = PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    return choose(context, criterion_named("l2").rank(context), budget, limits).removed


def without(analysis: Analysis, removed: IntArray) -> onnx.ModelProto:
    """The analysed model without some of its units."""
    return apply(analysis.model, analysis.structure, np.sort(removed))


def _no_coarser(analysis: Analysis, removed: IntArray, multiple: int) -> IntArray:
    """The same units, less a few of every group whose width happens to be of a coarser granularity as well.

    Widths that suit the machine by chance would tell of that, and not of the granularity that is tried.
    """
    structure = analysis.structure
    gone = np.bincount(structure.group_of[removed], minlength=len(structure.groups))
    back = []
    for group in structure.groups:
        cut = int(gone[group.index])
        if cut >= multiple and (group.width - cut) % (2 * multiple) == 0:
            back.append(removed[structure.group_of[removed] == group.index][-multiple:])
    return removed[~np.isin(removed, np.concatenate(back))] if back else removed
