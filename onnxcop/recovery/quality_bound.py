"""Pruning as far as a bound on quality allows, instead of down to a size."""

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
_LAST = 0.995  # a smaller step is not worth a round


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound on the quality of a network.

    Attributes:
        divergence: Largest divergence on held-out samples, None for any.
        metric: Score by a function of the user.
        max_drop: Largest loss of the score, None for any.

    Raises:
        BudgetError: `max_drop` is given without `metric`.
    """

    divergence: float | None
    metric: Metric | None
    max_drop: float | None

    def __post_init__(self) -> None:
        if self.max_drop is not None and self.metric is None:
            raise BudgetError("--max-drop needs a score to measure; give --metric script.py:function")

    def holds(self, recovery: Recovery) -> bool:
        """Whether the current network satisfies the bound."""
        if self.divergence is not None and recovery.divergence().value > self.divergence:
            return False
        if self.max_drop is None or self.metric is None:
            return True
        return self.metric.base - self.metric(recovery.written()) <= self.max_drop


def cut_within(
    bound: Bound, recovery: Recovery, limits: Limits, fallback: FloatArray, preference: Preference | None = None
) -> None:
    """Cut in rounds; each round that violates the bound is undone and followed by smaller steps.

    Args:
        bound: What must hold after every round.
        recovery: The network; in the end, the last one that satisfied the bound.
        limits: Units that may not be cut.
        fallback: float64 [units], order for units without statistics.
        preference: The preference between kinds of savings.
    """
    state = recovery.start(limits, preference)
    kept, step = 1.0, _STEP
    while step < _LAST:
        back, units_before = recovery.checkpoint(), state.copy()
        target = kept * step
        try:
            recovery.round(state, Budget(macs=target), limits, fallback, f"down to {target:.0%} of the MACs")
        except BudgetError:
            back()
            return
        if bound.holds(recovery):
            kept = state.level("macs")
            continue
        back()
        state.assign(units_before)
        step = float(np.sqrt(step))
