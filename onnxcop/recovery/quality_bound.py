"""Cutting as much as keeps within a bound on quality, instead of down to a size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import Limits
from onnxcop.criteria.preference import Preference
from onnxcop.errors import BudgetError
from onnxcop.recovery.metric import Metric
from onnxcop.recovery.rounds import Recovery

_STEP = 0.85  # the first round's share of the MACs
_LAST = 0.995  # a step that is not worth its round


@dataclass(frozen=True, slots=True)
class Bound:
    """What a network must keep to.

    Attributes:
        divergence: Largest divergence on held-out samples, None for any.
        metric: The user's score.
        max_drop: How much of it may be lost, None for any.

    Raises:
        BudgetError: A drop is given and no score to measure it by.
    """

    divergence: float | None
    metric: Metric | None
    max_drop: float | None

    def __post_init__(self) -> None:
        if self.max_drop is not None and self.metric is None:
            raise BudgetError("--max-drop needs a score to measure; give --metric script.py:function")

    def holds(self, recovery: Recovery) -> bool:
        """Whether a network keeps to it as it is now."""
        if self.divergence is not None and recovery.divergence().value > self.divergence:
            return False
        if self.max_drop is None or self.metric is None:
            return True
        return self.metric.base - self.metric(recovery.written()) <= self.max_drop


def cut_within(
    bound: Bound, recovery: Recovery, limits: Limits, fallback: FloatArray, preference: Preference | None = None
) -> None:
    """Cut round by round, with smaller steps after every one that went too far.

    Args:
        bound: What must hold after every round.
        recovery: The network; it ends as the last that kept to the bound.
        limits: What may not be cut.
        fallback: float64 [units], order for units without statistics.
        preference: What is rather saved.
    """
    state = recovery.start(limits, preference)
    kept, step = 1.0, _STEP
    while step < _LAST:
        before, units_before = recovery.working.copy(), state.copy()
        target = kept * step
        try:
            recovery.round(state, Budget(macs=target), limits, fallback, f"down to {target:.0%} of the MACs")
        except BudgetError:
            recovery.working = before
            return
        if bound.holds(recovery):
            kept = state.level("macs")
            continue
        recovery.working = before
        state.assign(units_before)
        step = float(np.sqrt(step))
