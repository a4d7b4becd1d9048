"""A budget of time: how much must go until a run is fast enough, found by measurement.

How long a cut model takes does not depend on the values of its weights, so the way there is looked for
with rough cuts, without any recovery: all of them are timed in one go, which gives a curve of latency
against multiply-accumulates. The real cut spreads over other layers than a rough one; it is timed, the
curve is scaled to what was found, and the cut goes on from there until the bound holds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.allocation.budget import AUTO, Budget
from onnxcop.allocation.rough import ROUGHLY, rough_choice, without
from onnxcop.errors import BudgetError, EngineError
from onnxcop.pipeline.decide import Request
from onnxcop.pipeline.finish import conclude
from onnxcop.pipeline.incremental import IncrementalPruner
from onnxcop.report.result import PruneResult
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.latency import DEFAULT_SECONDS, Latency, measure, timed

log = logging.getLogger("onnxcop")

CANDIDATES = (1, 2, 4, 8, 16, 32)  # granularities of widths
_TRIED = (0.8, 0.6, 0.45, 0.3, 0.15)  # fractions of the MACs at which rough cuts are timed
_SECONDS = 3.0  # for timing those of one granularity of widths
_FINER = 0.9  # a finer granularity is taken where it keeps so much of what the best one keeps
_AIM = 0.97  # of the bound, so that the noise of the last measurement does not spoil it
_NEAR = 0.9  # of the bound: a cut that is faster than this went too deep
_LEAST_STEP, _MOST_STEP = 0.97, 0.8  # from one cut to the next
_ATTEMPTS = 8
_LONGER = 3  # times the time is taken for a measurement that has to decide


@dataclass(frozen=True, slots=True)
class TimeCurve:
    """Latency against multiply-accumulates, both as fractions of the original's.

    Attributes:
        macs: float64 [points], ascending.
        ratios: float64 [points], not descending: where less work took longer, the longer time counts.
    """

    macs: FloatArray
    ratios: FloatArray

    @classmethod
    def of(cls, macs: FloatArray, ratios: FloatArray) -> TimeCurve:
        """Sort measured points, the original among them."""
        order = np.argsort(macs, kind="stable")
        return cls(macs[order], np.maximum.accumulate(ratios[order]))

    def ratio(self, macs: float) -> float:
        """The latency at a fraction of the multiply-accumulates."""
        return float(np.interp(macs, self.macs, self.ratios))

    def fraction(self, ratio: float) -> float:
        """The largest fraction of the multiply-accumulates with a latency."""
        return float(np.interp(ratio, self.ratios, self.macs))


def prune_within(request: Request, bound: float, seconds: float = 0.0) -> PruneResult:
    """Cut until a run takes no more than a fraction of the original's time.

    Args:
        request: What is asked for; its other budgets hold too. Widths that are left open are chosen here.
        bound: The fraction.
        seconds: How long to measure the latency of a result; the usual time where 0.

    Raises:
        BudgetError: It cannot be reached; says what can.
        EngineError: The model does not run on random inputs, so that nothing can be measured.
    """
    with request.clock.stage("latency curves"):
        request, curve = _with_curve(request, bound)
    request = replace(request, asked=replace(request.asked, latency_seconds=seconds or DEFAULT_SECONDS))
    return _checked(request, _Search(request, bound, curve).run(), bound)


def _with_curve(request: Request, bound: float) -> tuple[Request, TimeCurve]:
    """The granularity of widths that keeps the most of the model within the bound, and its curve."""
    limits = request.limits
    if limits.multiple_of != AUTO:
        curve = time_curve(request)
        if curve.ratios[0] > bound:
            raise infeasible(bound, float(curve.ratios[0]))
        return request, curve
    curves: dict[int, TimeCurve] = {}
    for done, multiple in enumerate(CANDIDATES):
        if request.progress is not None:
            request.progress("latency curves", done, len(CANDIDATES))
        curves[multiple] = time_curve(replace(request, limits=replace(limits, multiple_of=multiple)))
        log.debug("widths in multiples of %d: %s", multiple, curves[multiple])
    nearest = min(float(curve.ratios[0]) for curve in curves.values())
    if nearest > bound:
        raise infeasible(bound, nearest)
    keeps = {m: curve.fraction(_AIM * bound) for m, curve in curves.items() if curve.ratios[0] <= bound}
    chosen = min(m for m, keep in keeps.items() if keep >= _FINER * max(keeps.values()))
    listed = ", ".join(f"{m}: {keep:.0%}" for m, keep in keeps.items())
    told = f"widths: multiples of {chosen}, by measurement (MACs that fit into {bound:.0%} of the time: {listed})"
    limits = replace(limits, multiple_of=chosen)
    return replace(request, limits=limits, choices=(told,)), curves[chosen]


def time_curve(request: Request) -> TimeCurve:
    """Time rough cuts of several depths beside the original.

    Raises:
        EngineError: The model does not run on random inputs.
    """
    analysis = request.analysis
    total = float(analysis.cost.original()[0])
    macs, models = [1.0], [analysis.original]
    for fraction in (*_TRIED, None):
        try:
            removed = rough_choice(analysis, Budget(macs=fraction or _least(request)), request.limits)
        except BudgetError:  # the last one goes as far as can be
            continue
        if len(removed):
            macs.append(float(analysis.cost.of_units(removed)[0]) / total)
            models.append(without(analysis, removed))
    feeds = random_feeds(analysis.original, analysis.input_shapes, seed=0)
    found = measure(models, feeds, request.options, seconds=_SECONDS, enough=ROUGHLY)
    ratios = [found.latency(place).ratio for place in range(len(models))]
    return TimeCurve.of(np.array(macs), np.array(ratios))


def _least(request: Request) -> float:
    """The smallest fraction of the multiply-accumulates that can be reached."""
    try:
        rough_choice(request.analysis, Budget(macs=1e-9), request.limits)
    except BudgetError as error:
        return min(error.nearest or 1.0, 1.0)
    return 1e-9


@dataclass
class _Search:
    """Real cuts, each nearer to the bound than the one before.

    By a criterion every cut starts from the original, so that one that went too deep can be taken back a
    little. By measurement they lead from one to the next, so the first goes half of the way only, to see
    how far the real curve is from the rough one.
    """

    request: Request
    bound: float
    curve: TimeCurve

    def run(self) -> PruneResult:
        """The largest model found that holds."""
        course, onward = IncrementalPruner(self.request), self.request.modes.allocate == "measured"
        held: PruneResult | None = None
        low, high, found = 0.0, 1.0, 1.0  # MACs of the largest that holds and of the smallest that does not
        target = self.curve.fraction(_AIM * self.bound)
        target = float(np.sqrt(target)) if onward else target
        for _ in range(_ATTEMPTS):
            try:
                result, times = self._cut(course, target)
            except BudgetError:
                if high == 1.0 and held is None:  # not even the first cut: another budget is what cannot be met
                    raise
                break
            left, found = result.report.after.macs / max(result.report.before.macs, 1), times.ratio
            log.info("%.1f%% of the MACs take %.1f%% of the time", 100 * left, 100 * found)
            scaled = self.curve.fraction(_AIM * self.bound * self.curve.ratio(left) / found)
            if found <= self.bound:
                if onward or found >= _NEAR * self.bound or left <= low:
                    return result
                held, low = result, left
                target = min(scaled, left / _MOST_STEP, float(np.sqrt(left * high)))
            else:
                high = min(high, left)
                deeper = float(np.clip(scaled, _MOST_STEP * left, _LEAST_STEP * left))
                target = deeper if held is None else float(np.sqrt(low * high))
            if held is not None and target * _LEAST_STEP <= low:
                return held
        if held is None:
            raise infeasible(self.bound, found)
        return held

    def _cut(self, course: IncrementalPruner, fraction: float) -> tuple[PruneResult, Latency]:
        asked, request = self.request.budget, self.request
        macs = fraction if asked.macs is None else min(fraction, asked.macs)
        decision = course.decide(asked.but(macs=macs), request.clock)
        result = conclude(request, decision)
        times = result.report.latency
        if times is None:
            raise EngineError("--latency needs a model that runs on random inputs, to be timed; give --macs instead")
        if times.ratio - 2 * times.error <= self.bound < times.ratio:  # too near to tell
            analysis = request.analysis
            again = timed(
                analysis.original, result.model, analysis.input_shapes, request.options,
                _LONGER * request.asked.latency_seconds,
            )  # fmt: skip
            times = again or times
            result = replace(result, report=replace(result.report, latency=times))
        return result, times


def _checked(request: Request, result: PruneResult, bound: float) -> PruneResult:
    """The result, if the bounds on its quality hold as well."""
    asked, quality, held_out = request.asked, result.report.quality, result.report.held_out
    if asked.divergence is not None and held_out.get("divergence", 0.0) > asked.divergence:
        raise BudgetError(
            f"--latency {bound:g} and --divergence {asked.divergence:g} cannot both hold: when a run is fast enough "
            f"the outputs differ by {held_out['divergence']:.4g}; loosen one of them"
        )
    before = {name.removesuffix(" before"): value for name, value in quality.items() if name.endswith(" before")}
    for name, value in before.items():
        drop = value - quality[f"{name} after"]
        if asked.max_drop is not None and drop > asked.max_drop:
            raise BudgetError(
                f"--latency {bound:g} and --max-drop {asked.max_drop:g} cannot both hold: when a run is fast enough "
                f"{name} has fallen by {drop:.4g}; loosen one of them"
            )
    return result


def infeasible(bound: float, nearest: float) -> BudgetError:
    """The error for a time that cannot be reached, with one that can."""
    reachable = min(float(np.ceil(nearest * 100) / 100), 1.0)
    return BudgetError(
        f"the budget --latency {bound:g} cannot be reached: the deepest cut takes {nearest:.0%} of the time; ask for "
        f"--latency {reachable:g} or more, or loosen --keep, --max-cut, --min-filters, --multiple-of",
        reachable,
    )
