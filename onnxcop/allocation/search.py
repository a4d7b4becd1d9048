"""Choice of units by curves that are measured only where the budget will be spent.

A curve beyond its last point is a guess, so each pass buys only one step further than the measured points and measures
there. Between two points a curve is a straight line, which may hide a dip or a bump. So once the budget is met, each
pass measures in the middle of the interval in which a group's width ended, and spends again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.sensitivity import GROWTH, Curve
from onnxcop.allocation.spend import spend
from onnxcop.allocation.within_time import within_time
from onnxcop.errors import BudgetError

_KNOWN = 1.15  # a curve counts as known this far beyond its last measured point
_STEEP = 0.01  # share of the price of all purchases: flatter intervals need no more points
_EXCHANGES = 12  # other purchases to try before one is chosen
_NARROW = 0.02  # share of a group's width: shorter intervals need no more points

Curves = Mapping[int, Curve]
MeasureCurves = Callable[[Mapping[int, int] | None, Curves | None], Curves]


@dataclass(frozen=True)
class CurveSearch:
    """Spends a budget over curves.

    Args:
        measure: Measures groups at numbers of removed units, and adds these points to known curves; without
            arguments, the first point of every group.
        state: The selection so far; :meth:`run` adds to it.
        budget: The budget that must hold.
        group_of: int64 [units], each unit's group.
        passes: Largest number of measuring passes on the way to the budget.
        sharper: Largest number of later passes that measure between known points.
    """

    measure: MeasureCurves
    state: PruningState
    budget: Budget
    group_of: IntArray
    passes: int
    sharper: int

    def run(self) -> IntArray:
        """Select until the budget holds; return the units selected here, int64.

        Raises:
            BudgetError: The budget cannot be met; the state is unchanged.
        """
        curves = self.measure(None, None)
        for _ in range(self.passes - 1):
            further = self._unmeasured(curves, self._bought(curves))
            if not further:
                break
            curves = self.measure(further, curves)
        _, units = self._affordable(curves, self.budget)
        for _ in range(self.sharper):
            between = self._between(curves, units)
            if not between:
                break
            curves = self.measure(between, curves)
            _, units = self._affordable(curves, self.budget)
        trial, units = within_time(lambda budget: self._affordable(curves, budget), _removed, self.state, self.budget)
        self.state.assign(trial)
        return units

    def _affordable(self, curves: Curves, budget: Budget) -> tuple[PruningState, IntArray]:
        """Meet the budget by known parts of curves or, if those are not enough, by guessed ones."""
        for reach in (_KNOWN, GROWTH, GROWTH**2):
            with suppress(BudgetError):
                return self._spent(curves, budget, reach)
        return self._spent(curves, budget, np.inf)

    def _spent(self, curves: Curves, budget: Budget, reach: float) -> tuple[PruningState, IntArray]:
        trial = self.state.copy()
        return trial, spend(trial, list(curves.values()), budget, reach, exchanges=_EXCHANGES)

    def _bought(self, curves: Curves) -> IntArray:
        """The purchases if every curve could be followed one step beyond its last point."""
        trial = self.state.copy()
        first = len(trial.removed)
        with suppress(BudgetError):
            spend(trial, list(curves.values()), self.budget, GROWTH)
        return np.array(trial.removed[first:], dtype=np.int64)

    def _unmeasured(self, curves: Curves, units: IntArray) -> dict[int, int]:
        """Groups bought beyond their measured points, with the next count to measure."""
        requests = {}
        for group, count in self._counts(units).items():
            curve = curves[group]
            last = int(curve.counts[-1])
            if _KNOWN * last < count <= curve.most and last < curve.most:
                requests[group] = min(max(last + 1, count), curve.most)
        return requests

    def _between(self, curves: Curves, units: IntArray) -> dict[int, int]:
        """Groups whose widths ended on or below a long and steep interval, with the count in its middle."""
        bought = self._counts(units)
        total = sum(float(curves[group].price(count)) for group, count in bought.items())
        requests = {}
        for group, curve in curves.items():
            points = np.concatenate([[0], curve.counts])
            after = int(np.searchsorted(points, bought.get(group, 0), side="right"))
            if after == len(points):
                continue
            low, high = points[after - 1 : after + 1].tolist()
            rise = float(curve.price(high) - curve.price(low))
            middle = self._middle(group, low, high)
            if high - low > _NARROW * len(curve.order) and rise > _STEEP * total and low < middle < high:
                requests[group] = middle
        return requests

    def _middle(self, group: int, low: int, high: int) -> int:
        """A count about half way between two others that leaves a width of the ladder; one of the two if none does."""
        kept, middle = int(self.state.group_kept[group]), (low + high) // 2
        narrower = kept - self.state.ladder.at_most(group, kept - middle)
        wider = kept - self.state.ladder.above(group, kept - middle)
        return narrower if narrower < high else wider

    def _counts(self, units: IntArray) -> dict[int, int]:
        """Number of units by group."""
        groups, counts = np.unique(self.group_of[units], return_counts=True)
        return dict(zip(groups.tolist(), counts.tolist(), strict=True))


def _removed(found: tuple[PruningState, IntArray]) -> IntArray:
    return np.array(found[0].removed, dtype=np.int64)
