"""Decisions for several budgets, each tighter than the one before.

Everything that does not depend on the budget is done once: the analysis, the data, the statistics of the original. With
a criterion, every budget is decided separately from those. With measurement, statistics belong to the current network
and a cut takes several rounds anyway. So each budget continues from the one before, and costs only the rounds between
them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from onnxcop._base.timing import Clock
from onnxcop._base.types import FloatArray
from onnxcop.allocation.budget import Budget, default_rounds
from onnxcop.allocation.greedy import PruningState
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.pipeline.decide import (
    Decision,
    Request,
    by_criterion,
    lack_of_data,
    measured_decision,
    measured_recovery,
    metric_of,
    prepared_recovery,
)
from onnxcop.recovery.rounds import Recovery
from onnxcop.recovery.setup import PreparedRecovery

log = logging.getLogger("onnxcop")


class IncrementalPruner:
    """Prunes one network to tighter and tighter budgets.

    Args:
        request: The request without a budget.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.metric = metric_of(request)
        self._stats = request.stats
        self._decided: list[Budget] = []
        self._ground: PreparedRecovery | None = None
        self._way: _Path | None = None

    def warn(self) -> None:
        """Log what the request lacks."""
        for line in lack_of_data(self.request):
            log.warning("no calibration data: %s", line)

    def repeated(self, request: Request) -> IncrementalPruner:
        """The same decisions for another request; later ones continue from them."""
        other = IncrementalPruner(request)
        if request.modes.allocate == "measured":
            for budget in self._decided:
                other.decide(budget, request.clock)
        return other

    def decide(self, budget: Budget, clock: Clock) -> Decision:
        """Choose and recover for a budget that is at least as tight as the last one.

        Raises:
            BudgetError: The budget cannot be met; no further budget may be decided.
        """
        request = replace(self.request, budget=budget, clock=clock)
        measured = request.modes.allocate == "measured"
        decision = self._onward(request) if measured else self._afresh(request)
        self._decided.append(budget)
        return decision

    def _afresh(self, request: Request) -> Decision:
        if self._stats is not None:
            request = replace(request, stats=self._stats)
        if self._ground is None and request.modes.recover.writes:
            with request.clock.stage("recovery"):
                self._ground = prepared_recovery(request)
        decision = by_criterion(request, self.metric, self._ground)
        self._stats = decision.stats
        return decision

    def _onward(self, request: Request) -> Decision:
        if self._way is None:
            recovery, stats, fallback = measured_recovery(request)
            self._way = _Path(recovery, stats, fallback, recovery.start(request.limits, request.modes.preference))
        way = self._way
        with request.clock.stage("selection and recovery"):
            for budget in budgets_between(way.state, request.budget, way.recovery.settings.rounds):
                name = ", ".join(f"{bound:.0%} of the {kind}" for kind, bound in budget.shares.items())
                way.recovery.round(way.state, budget, request.limits, way.fallback, f"down to {name or budget}")
            return measured_decision(request, way.recovery, way.stats, self.metric)


@dataclass
class _Path:
    """The current state of a recovering network."""

    recovery: Recovery
    stats: CalibrationStats | None
    fallback: FloatArray
    state: PruningState


def budgets_between(state: PruningState, budget: Budget, rounds: int | None = None) -> list[Budget]:
    """Budgets between a selection and a tighter budget; each removes the same share of the remaining resources.

    Args:
        state: The selection so far.
        budget: The final budget.
        rounds: Number of steps; None to choose it by the distance.
    """
    if state.meets(budget):
        return []
    bounds = state.in_shares(budget).bounds
    now = {name: state.level(name, bound) for name, bound in bounds.items()}
    shares = {name: min(bound / now[name], 1.0) for name, bound in bounds.items()}
    count = rounds or default_rounds(Budget(**shares))
    between = [
        Budget(**{name: now[name] * float(np.power(share, step / count)) for name, share in shares.items()})
        for step in range(1, count if shares else 1)
    ]
    return [*between, budget]
