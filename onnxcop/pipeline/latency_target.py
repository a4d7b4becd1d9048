"""Time budgets: spent like any other resource on measured times of operators, and checked on the result."""

from __future__ import annotations

import logging
from dataclasses import replace
from math import ceil

from onnxcop.errors import BudgetError, EngineError
from onnxcop.pipeline.decide import Request, decide
from onnxcop.pipeline.finish import beside_original, conclude
from onnxcop.pipeline.timing import with_times
from onnxcop.report.result import PruneResult
from onnxcop.report.summary import with_latency
from onnxcop.runtime.latency import DEFAULT_SECONDS, Latency

log = logging.getLogger("onnxcop")

_AIM = 0.985  # share of the bound to aim at, so that noise of the last measurement does not exceed it
_TIGHTER = 0.98  # factor of the aim after a result that is still too slow
_ATTEMPTS = 3
_LONGER = 3  # factor of the measuring time for a measurement that decides


def prune_within(request: Request, bound: float) -> PruneResult:
    """Prune until a run takes at most a fraction of the original's time.

    Args:
        request: The request; its other budgets hold too.
        bound: The fraction.

    Raises:
        BudgetError: It cannot be reached; the message names the nearest bound.
        EngineError: The model does not run, so its time cannot be measured.
    """
    asked = request.asked
    request = replace(request, asked=replace(asked, latency_seconds=asked.latency_seconds or DEFAULT_SECONDS))
    aim = _AIM * bound
    request = with_times(request)
    trials: list[tuple[float, PruneResult]] = []
    for _ in range(_ATTEMPTS):
        try:
            result, times = _cut(request, aim, again=bool(trials))
        except BudgetError as error:
            if not trials:
                # a round aims at less than the user's bound
                raise (error.with_bound(f"{bound:g}") if error.flag == "--latency" else error) from None
            break
        log.info(
            "%.1f%% of the MACs take %s of the time", 100 * result.report.after.macs / result.report.before.macs,
            times.share,
        )  # fmt: skip
        trials.append((times.ratio, result))
        if times.ratio <= bound:
            return _checked(request, result, bound)
        aim *= _TIGHTER * min(1.0, bound / times.ratio)
    ratio, result = min(trials, key=lambda one: one[0])
    nearest = min(ceil(100 * ratio) / 100, 1.0)
    raise BudgetError(
        f"the budget --latency {bound:g} cannot be reached: the fastest model that was found takes {ratio:.1%} of the "
        f"time; ask for --latency {nearest:g} or more",
        nearest,
    )


def prune_by_table(request: Request, bound: float) -> PruneResult:
    """Prune until a run takes at most a fraction of the original's time on the device of a table.

    Args:
        request: The request with the table; nothing is timed on this machine.
        bound: The fraction.

    Raises:
        BudgetError: It cannot be reached, or not together with the bounds on quality.
    """
    return _checked(request, conclude(request, decide(request.without_quality_bounds())), bound)


def _cut(request: Request, aim: float, *, again: bool = False) -> tuple[PruneResult, Latency]:
    """A result with so much of the estimated time, and its measured time."""
    aimed = replace(request.without_quality_bounds(), budget=request.budget.but(latency=aim))
    result = conclude(request, decide(aimed, again=again))
    times = result.report.latency
    if times is None:
        raise EngineError(
            "--latency needs a model that runs, to be timed: see the warning above, or give --macs instead"
        )
    bound = request.budget.latency or 1.0
    if times.interval[0] <= bound < times.ratio:  # too close to decide
        seconds = _LONGER * request.asked.latency_seconds
        times = beside_original(request.analysis, result.model, request.asked.engine, seconds) or times
        result = replace(result, report=with_latency(result.report, times))
    return result, times


def _checked(request: Request, result: PruneResult, bound: float) -> PruneResult:
    """The result, after a check that the bounds on its quality hold as well."""
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
