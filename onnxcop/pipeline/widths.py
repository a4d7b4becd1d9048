"""Widths that suit the machine, and a result that is no slower than its original."""

from __future__ import annotations

import logging
from dataclasses import replace

from onnxcop._base.timing import Clock
from onnxcop.allocation.limits import AUTO, Limits
from onnxcop.errors import BudgetError
from onnxcop.pipeline.decide import Request, decide
from onnxcop.pipeline.finish import conclude
from onnxcop.pipeline.options import PruneOptions
from onnxcop.report.result import PruneResult
from onnxcop.runtime.staircase import Staircase, staircase_of
from onnxcop.runtime.targets import target_named

log = logging.getLogger("onnxcop")


def for_target(options: PruneOptions) -> PruneOptions:
    """The options, without times of this machine where the result is for another.

    Raises:
        BudgetError: There is no such target, or another option asks for other widths or for times of this machine.
    """
    if options.target is None:
        return options
    target_named(options.target)
    if options.limits is not None and options.limits.multiple_of != AUTO:
        raise BudgetError("--target and --multiple-of exclude each other: both say which widths to keep")
    if options.latency is not None:
        raise BudgetError("--latency measures this machine, and --target names another; give --macs with --target")
    return replace(options, latency_seconds=0.0)


def suited(limits: Limits, options: PruneOptions, clock: Clock) -> tuple[Limits, tuple[str, ...]]:
    """Limits with the stairs of the device, where they leave widths open, and a line that says so."""
    if limits.multiple_of != AUTO:
        return limits, ()
    if options.target is not None:
        asked = target_named(options.target).staircase
        line = f"widths: {_described(asked)}, as {options.target} asks for; nothing was timed, as it is another device"
        return replace(limits, staircase=asked), (line,)
    with clock.stage("widths"):
        found = staircase_of(options.engine)
    stairs = found or limits.staircase
    how = "as this machine computes them" if found else "untested, as no layer could be timed"
    return replace(limits, staircase=stairs), (f"widths: {_described(stairs)}, {how}",)


def _described(stairs: Staircase) -> str:
    if stairs.fine == stairs.block:
        return f"multiples of {stairs.block}"
    return f"multiples of {stairs.block}, of {stairs.fine} in narrow layers"


def prune_faster(request: Request) -> PruneResult:
    """Prune, once more in whole blocks where the result turns out slower than the original.

    Where the latency of results is not measured, nothing is compared.
    """
    result = conclude(request, decide(request))
    coarser = _coarser(request.limits)
    if not _slower(result) or coarser is None:
        return result
    log.info("the result is slower than the original: once more with %s", _described(coarser.staircase))
    line = f"widths: {_described(coarser.staircase)}, as finer ones were slower than the original"
    try:
        wider = replace(request, limits=coarser, choices=(line,))
        again = conclude(wider, decide(wider))
    except BudgetError:  # too coarse for what is asked
        return result
    first, second = result.report.latency, again.report.latency
    return again if first is not None and second is not None and second.ratio < first.ratio else result


def _slower(result: PruneResult) -> bool:
    latency = result.report.latency
    return latency is not None and latency.slower


def _coarser(limits: Limits) -> Limits | None:
    """The same with whole blocks only; None where that changes nothing."""
    stairs = limits.staircase
    if limits.multiple_of != AUTO or stairs.fine == stairs.block:
        return None
    return replace(limits, staircase=Staircase(stairs.block, stairs.block))
