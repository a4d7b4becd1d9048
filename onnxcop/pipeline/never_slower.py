"""Results that are not slower than the original: other widths, other groups, and finally fewer removed units.

A cut that saves arithmetic can cost time if a layer leaves its fast kernel or is no longer fused with its neighbours.
If the written model is slower beyond doubt, whole blocks are tried first. Then groups that cost time to cut stay whole
while others lose more. Then fewer multiply-accumulates are cut, and finally none. Bounds on other resources always
hold, because they do not stand for time. If it is open whether the model is faster at all, whole blocks are
taken if they make one that is.
"""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass, replace

import numpy as np

from onnxcop._base.formatting import plural
from onnxcop._base.types import IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import AUTO
from onnxcop.allocation.rough import rough_choice, without
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import group_name
from onnxcop.errors import BudgetError, EngineError, ModelError
from onnxcop.pipeline.decide import Decision, Request, decide
from onnxcop.pipeline.finish import beside_original, conclude
from onnxcop.pipeline.widths import described
from onnxcop.report.result import PruneResult
from onnxcop.report.summary import with_latency
from onnxcop.rewrite.plan import units_of
from onnxcop.runtime.latency import measure_times
from onnxcop.runtime.staircase import Staircase

log = logging.getLogger("onnxcop")

_LONGER = 2.0  # factor of the measuring time to be sure that a result is slower
_SECONDS, _TOGETHER, _MOST = 1.5, 12, 60  # seconds for one measurement of groups, groups in it, and groups in all
_MEMORY = 1 << 30  # bytes of models that are measured together
_SHARES = (0.5, 0.25)  # shares of the requested cut to try if the whole is slower
_LITTLE = 0.99  # share of the original's time that saves next to nothing
_WORSE = 1.25  # times the divergence that a result may have if it saves time and the other saves next to none
_NAMED = 3  # groups to name in a line


def prune_faster(request: Request, first: PruneResult | None = None) -> PruneResult:
    """Prune; if the result is slower than the original on this machine, find one that is not.

    If the latency of results is not measured, or the user gives the widths, nothing is compared.

    Args:
        request: The request.
        first: Its result, if it was pruned already.
    """
    first = first or conclude(request, decide(request))
    if request.limits.multiple_of != AUTO or not (_slower(first) or _idle(first)):
        return first
    search = _Search(request, _sure(request, first))
    if not _slower(search.best):
        return search.quicker(request) if _idle(search.best) else search.best
    share = _share(search.best)
    log.info("the result takes %s of the original's time: trying other widths", share)
    coarse = search.in_blocks(request)
    if coarse is not None and search.tried(coarse):
        return search.best
    spared = search.spared(coarse or request)
    if spared is not None and search.tried(spared):
        return search.best
    for macs in _looser(request.budget):
        for way in (spared, coarse or request):
            if way is not None and search.tried(replace(way, budget=request.budget.but(macs=macs))):
                return _warned(search.best, _looser_line(request, share, search.best))
    if {*request.budget.bounds} <= {"macs"}:
        return _warned(_whole(request), _whole_line(share))
    return _slow_after_all(request, search.best)


@dataclass
class _Search:
    """Requests to try, and the fastest result so far."""

    request: Request
    best: PruneResult

    def tried(self, request: Request) -> bool:
        """Whether a request gives a result that is not slower than the original; if so, it becomes the best one."""
        if not _promising(request):
            return False
        try:
            result = _sure(request, conclude(request, decide(request, again=True)))
        except BudgetError:
            return False
        if not _slower(result) or _ratio(result) < _ratio(self.best):
            self.best = result
        return not _slower(result)

    def quicker(self, request: Request) -> PruneResult:
        """The best result, or one of whole blocks that saves time beyond doubt, if the best one saves next to none.

        A bound on multiply-accumulates stands for time; others hold the widths that meet them best.
        """
        free = {*request.budget.bounds} <= {"macs"} and not request.asked.bounded
        coarse = self.in_blocks(request, "saved next to no time") if free else None
        if coarse is None:
            return self.best
        self.best = _timed_for_longer(request, self.best)
        if not _idle(self.best) or not _promising(coarse, faster=True):
            return self.best
        log.info("the result saves almost no time: trying whole blocks")
        try:
            result = conclude(coarse, decide(coarse, again=True))
        except BudgetError:
            return self.best
        return self.best if _slower(result) or _idle(result) or _worse(result, self.best) else result

    def in_blocks(self, request: Request, why: str = "were slower than the original") -> Request | None:
        """The same request with whole blocks only, and why; None if that changes nothing."""
        stairs = request.limits.staircase
        if stairs.fine == stairs.block:
            return None
        coarser = replace(request.limits, staircase=Staircase(stairs.block, stairs.block))
        line = f"widths: {described(coarser.staircase)}, as finer ones {why}"
        return replace(request, limits=coarser, choices=(line,))

    def spared(self, request: Request) -> Request | None:
        """The same request without the groups that cost time to cut; None if there are none."""
        analysis = request.analysis
        with request.clock.stage("widths"):
            groups = _losing(analysis, units_of(analysis, self.best.plan), request)
        patterns = _patterns(analysis, groups)
        if not patterns:
            return None
        names = ", ".join(group_name(analysis, group) for group in groups[:_NAMED])
        more = " …" if len(groups) > _NAMED else ""
        stay = "stays" if len(groups) == 1 else "stay"
        line = f"widths: {plural(len(groups), 'group')} {stay} whole, as cutting costs time there: {names}{more}"
        limits = replace(request.limits, keep=(*request.limits.keep, *patterns))
        return replace(request, limits=limits, choices=(*request.choices, line))


def _slower(result: PruneResult) -> bool:
    return result.report.latency is not None and result.report.latency.slower


def _idle(result: PruneResult) -> bool:
    """Whether a result may take as long as the original, or all but as long."""
    latency = result.report.latency
    return latency is not None and latency.interval[0] <= 1.0 and latency.interval[1] > _LITTLE


def _worse(result: PruneResult, other: PruneResult) -> bool:
    """Whether a result is clearly further from the original than another on held-out samples."""
    own, known = (one.report.held_out.get("divergence") for one in (result, other))
    return own is not None and known is not None and own > _WORSE * known


def _ratio(result: PruneResult) -> float:
    return np.inf if result.report.latency is None else result.report.latency.ratio


def _share(result: PruneResult) -> str:
    return "" if result.report.latency is None else result.report.latency.share


def _sure(request: Request, result: PruneResult) -> PruneResult:
    """The result, measured for longer if it seems slower than the original."""
    return _timed_for_longer(request, result) if _slower(result) else result


def _timed_for_longer(request: Request, result: PruneResult) -> PruneResult:
    with request.clock.stage("latency"):
        seconds = _LONGER * request.asked.latency_seconds
        again = beside_original(request.analysis, result.model, request.asked.engine, seconds)
    return result if again is None else replace(result, report=with_latency(result.report, again))


def _promising(request: Request, *, faster: bool = False) -> bool:
    """Whether a rough cut of that size, which is quick to make, is not slower than the original, or is `faster`."""
    if request.asked.bounded:
        return True  # the size of the cut is known only at the end
    analysis = request.analysis
    try:
        cut = without(analysis, rough_choice(analysis, request.budget, request.limits))
    except BudgetError:
        return False
    with request.clock.stage("widths"):
        latency = beside_original(analysis, cut, request.asked.engine, _SECONDS)
    if latency is None:
        return not faster
    return latency.interval[1] < 1.0 if faster else not latency.slower


def _losing(analysis: Analysis, removed: IntArray, request: Request) -> list[int]:
    """Groups that make a model slower if cut, each measured beside the model with only this group whole."""
    groups = np.unique(analysis.structure.group_of[removed])[:_MOST].tolist()
    cut, losing = without(analysis, removed), []
    together = max(1, min(_TOGETHER, _MEMORY // max(cut.ByteSize(), 1)))
    for start in range(0, len(groups), together):
        some = groups[start : start + together]
        variants = [without(analysis, removed[analysis.structure.group_of[removed] != group]) for group in some]
        try:
            times = measure_times([cut, *variants], analysis.timing_feed(), request.asked.engine, seconds=_SECONDS)
        except (EngineError, ModelError) as error:
            log.debug("groups could not be timed: %s", error)
            break
        losing += [group for place, group in enumerate(some, start=1) if times.latency(place).interval[1] < 1.0]
    return losing


def _patterns(analysis: Analysis, groups: list[int]) -> tuple[str, ...]:
    """Patterns of tensor names that keep groups whole."""
    producers = [node for group in groups for node in analysis.structure.groups[group].producers[:1]]
    return tuple(glob.escape(analysis.nodes[node].output[0]) for node in producers)


def _looser(budget: Budget) -> tuple[float, ...]:
    """Looser bounds on multiply-accumulates, if they are bounded."""
    bound = budget.macs
    return () if bound is None else tuple(1.0 - share * (1.0 - bound) for share in _SHARES)


def _whole(request: Request) -> PruneResult:
    """The unpruned model."""
    free = request.without_quality_bounds()
    nothing = Decision(removed=np.empty(0, np.int64), model=request.analysis.model)
    return conclude(replace(free, budget=Budget(), choices=()), nothing)


def _warned(result: PruneResult, line: str) -> PruneResult:
    log.warning("%s", line)
    return replace(result, report=replace(result.report, warnings=(line, *result.report.warnings)))


def _looser_line(request: Request, share: str, result: PruneResult) -> str:
    kept = result.report.after.macs / max(result.report.before.macs, 1)
    budget = "the default budget" if request.asked.unbounded else f"--macs {request.budget.macs:g}"
    return (
        f"{budget} makes a model slower than the original on this machine ({share} of its time): {kept:.0%} of the "
        "multiply-accumulates are kept instead; give --latency-seconds 0 to meet the budget anyway"
    )


def _whole_line(share: str) -> str:
    return (
        f"no cut is faster than the original on this machine (the requested one takes {share} of its time): nothing "
        "is removed; give --latency-seconds 0 to meet the budget anyway"
    )


def _slow_after_all(request: Request, result: PruneResult) -> PruneResult:
    """The fastest result within bounds that hold whatever the time."""
    latency = result.report.latency
    if latency is None:
        return result
    bounds = ", ".join(f"--{name} {bound:g}" for name, bound in request.budget.bounds.items() if name != "macs")
    line = (
        f"{bounds} and a model no slower than the original are not both possible on this machine: the bound "
        f"holds, and a run takes {latency.share} of the original's time"
    )
    log.warning("%s", line)
    return replace(result, report=with_latency(result.report, latency, line))
