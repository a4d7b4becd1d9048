"""Widths that suit the machine."""

from __future__ import annotations

import logging
from dataclasses import replace

from onnxcop._base.timing import Clock
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import AUTO, Limits
from onnxcop.errors import BudgetError
from onnxcop.pipeline.options import Modes, PruneOptions
from onnxcop.runtime.device_table import DeviceTable
from onnxcop.runtime.session import resolve_provider
from onnxcop.runtime.staircase import Staircase, staircase_of, target_named

log = logging.getLogger("onnxcop")

_QUICK = 2e8  # multiply-accumulates of a network for which one more selection takes seconds


def for_device(options: PruneOptions) -> tuple[PruneOptions, DeviceTable | None]:
    """The options without times of this machine if the result is for another device, and the table of that device.

    Raises:
        BudgetError: There is no such target, or another option sets widths or times of this machine.
        PlanMismatchError: The table cannot be read, or belongs to another provider than the requested one.
    """
    if options.latency_table is not None:
        if options.target is not None:
            raise BudgetError("--target and --latency-table exclude each other: a table holds the widths of its device")
        table = DeviceTable.load(options.latency_table)
        if options.engine.provider != "auto":
            table.check_provider(resolve_provider(options.engine.provider)[0])
        return replace(options, latency_seconds=0.0), table
    if options.target is None:
        return options, None
    target_named(options.target)
    if options.limits is not None and options.limits.multiple_of != AUTO:
        raise BudgetError("--target and --multiple-of exclude each other: both say which widths to keep")
    if options.budget().latency is not None:
        raise BudgetError(
            "--latency measures this machine, and --target names another; give --macs, or a --latency-table of it"
        )
    return replace(options, latency_seconds=0.0), None


def with_blocks_decided(limits: Limits, modes: Modes, budget: Budget, macs: float) -> Limits:
    """The limits, with a decision whether groups may go whole where the user leaves that open.

    They may in budgets of time, where the best of several selections is kept, in networks of few multiply-accumulates.
    Deep networks of thin layers are among these. For others, one more selection takes minutes.
    """
    if limits.blocks != AUTO:
        return limits
    measured = modes.allocate == "measured" and modes.recover.writes
    return replace(limits, blocks=measured and budget.latency is not None and macs <= _QUICK)


def suited(
    limits: Limits, options: PruneOptions, table: DeviceTable | None, clock: Clock
) -> tuple[Limits, tuple[str, ...]]:
    """Limits with the staircase of the device, if they leave widths open, and lines that describe it."""
    lines = () if table is None else (f"latency: expected from {table.source}, measured on {table.device}, not here",)
    if limits.multiple_of != AUTO:
        return limits, lines
    if table is not None:
        stairs = table.staircase or limits.staircase
        how = "as that device computes them" if table.staircase else "untested, as no layer could be timed there"
        return replace(limits, staircase=stairs), (f"widths: {described(stairs)}, {how}", *lines)
    if options.target is not None:
        target = target_named(options.target).staircase
        line = f"widths: {described(target)}, as {options.target} asks for; nothing was timed, as it is another device"
        return replace(limits, staircase=target), (line,)
    with clock.stage("widths"):
        measured = staircase_of(options.engine)
    stairs = measured or limits.staircase
    how = "as this machine computes them" if measured else "untested, as no layer could be timed"
    return replace(limits, staircase=stairs), (f"widths: {described(stairs)}, {how}",)


def described(stairs: Staircase) -> str:
    """Description of a staircase."""
    if stairs.fine == stairs.block:
        return f"multiples of {stairs.block}"
    return f"multiples of {stairs.block}, of {stairs.fine} in narrow layers"
