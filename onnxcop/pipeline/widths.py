"""Widths that suit the machine."""

from __future__ import annotations

import logging
from dataclasses import replace

from onnxcop._base.timing import Clock
from onnxcop.allocation.limits import AUTO, Limits
from onnxcop.errors import BudgetError
from onnxcop.pipeline.options import PruneOptions
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
        line = f"widths: {described(asked)}, as {options.target} asks for; nothing was timed, as it is another device"
        return replace(limits, staircase=asked), (line,)
    with clock.stage("widths"):
        found = staircase_of(options.engine)
    stairs = found or limits.staircase
    how = "as this machine computes them" if found else "untested, as no layer could be timed"
    return replace(limits, staircase=stairs), (f"widths: {described(stairs)}, {how}",)


def described(stairs: Staircase) -> str:
    """Stairs in words."""
    if stairs.fine == stairs.block:
        return f"multiples of {stairs.block}"
    return f"multiples of {stairs.block}, of {stairs.fine} in narrow layers"
