"""Recovery methods: how the remaining filters compensate for removed ones; one entry of `RECOVERIES` each.

Options, help, completion and checks are made from this table. A method defines how a round compensates for the units it
cuts, whether layer-by-layer refinement follows, and whether the new weights are written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcop._base.lookup import unknown

if TYPE_CHECKING:  # the command line reads this table before it loads anything heavy
    from onnxcop._base.types import IntArray
    from onnxcop.allocation.sensitivity import Samples
    from onnxcop.recovery.rounds import Recovery

Compensate = Callable[["Recovery", "IntArray", "Samples", Mapping[int, float], str], None]
"""Cuts units, int64, from a recovering network and compensates: statistics, ridges by layer, a name for the log."""


def merge_where_it_helps(
    recovery: Recovery, units: IntArray, samples: Samples, ridges: Mapping[int, float], name: str
) -> None:
    """Let consumers take over what regression predicts of the removed channels, unless plain removal is better."""
    before = recovery.working.copy()
    recovery.cut(units, samples, ridges)
    merged, after_merging = recovery.working, recovery.divergence()
    recovery.working = before
    recovery.cut(units, samples, {})
    best = recovery.divergence()
    if not best.value < after_merging.value:
        recovery.working, best = merged, after_merging
    level = logging.DEBUG if recovery.settings.refine else logging.INFO
    recovery.note(f"{name}: {len(units)} units cut and merged", best, level)


@dataclass(frozen=True, slots=True)
class RecoveryMethod:
    """One way to compensate for removed filters.

    Attributes:
        name: Its value for `--recover`.
        help: A short description.
        compensate: The step that cuts and compensates.
        refines: Whether layers are then fitted one after the other.
        writes: Whether the new weights are written; otherwise they only serve to measure.
    """

    name: str
    help: str
    compensate: Compensate = merge_where_it_helps
    refines: bool = False
    writes: bool = True


FULL = RecoveryMethod("full", "merge, then refine layer by layer", refines=True)

RECOVERIES: tuple[RecoveryMethod, ...] = (
    RecoveryMethod("none", "keep the other weights as they are", writes=False),
    RecoveryMethod("merge", "remaining channels take over what they can predict of the removed ones"),
    FULL,
)


def recovery_named(name: str | RecoveryMethod) -> RecoveryMethod:
    """Look up a recovery method; a method object is returned as it is.

    Raises:
        BudgetError: There is no method of this name.
    """
    if isinstance(name, RecoveryMethod):
        return name
    known = {method.name: method for method in RECOVERIES}
    if name not in known:
        raise unknown("recovery method", name, ("auto", *known))
    return known[name]
