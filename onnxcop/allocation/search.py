"""Choice of units by curves that are measured only where the budget will be spent.

A curve beyond its last point is a guess, so each pass buys only one step further than the measured points and measures
there. Between two points a curve is a straight line, which may hide a dip or a bump. So once the budget is met, each
pass measures in the middle of the interval in which a group's width ended, and spends again.

Prices of single purchases do not say what many cost together. Wide steps take the budget from fewer groups, and whole
groups from fewer still, so several selections can be made. Which is best can be measured after each is carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
_WIDE, _BLOCKS, _OTHERWISE = "in wide steps", "with blocks", "by other curves"  # ways to select

Curves = Mapping[int, Curve]
MeasureCurves = Callable[[Mapping[int, int] | None, Curves | None], Curves]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A selection that meets a budget.

    Attributes:
        way: How it was made, in words; empty for the usual way.
        state: The whole selection.
        units: int64, units selected by this search.
    """

    way: str
    state: PruningState
    units: IntArray


@dataclass(frozen=True)
class CurveSearch:
    """Spends a budget over curves.

    Args:
        measure: Measures groups at numbers of removed units, and adds these points to known curves; without
            arguments, the first point of every group.
        state: The selection so far.
        budget: The budget that must hold.
        group_of: int64 [units], each unit's group.
        passes: Largest number of measuring passes on the way to the budget.
        sharper: Largest number of later passes that measure between known points.
        several: Whether to select in several ways.
    """

    measure: MeasureCurves
    state: PruningState
    budget: Budget
    group_of: IntArray
    passes: int
    sharper: int
    several: bool = False

    def alternatives(self) -> list[Alternative]:
        """Select until the budget holds: one selection, or several that differ.

        Raises:
            BudgetError: The budget cannot be met in any way.
        """
        first, known = self.measure(None, None), dict[tuple[int, int], float]()
        made, refused = list[Alternative](), list[BudgetError]()
        for way, state, curves in self._ways(first):
            try:
                one = self._search(way, state, curves, known)
            except BudgetError as error:
                refused.append(error)
                continue
            if not any(np.array_equal(np.sort(one.units), np.sort(other.units)) for other in made):
                made.append(one)
        if not made:
            raise min(refused, key=lambda error: np.inf if error.nearest is None else error.nearest)
        return made

    def _ways(self, first: Curves) -> Iterator[tuple[str, PruningState, Curves]]:
        """Ways to select: a name, the state to start from, and the first points."""
        if not self.several:
            yield "", self.state, first
            return
        in_part = {group: curve.in_part() for group, curve in first.items()}
        yield "", self.state, in_part
        wide = self.state.in_wide_steps()
        if wide is not None:
            yield _WIDE, wide, in_part
        if any(curve.whole is not None for curve in first.values()):
            yield _BLOCKS, self.state, first

    def _search(
        self, way: str, start: PruningState, curves: Curves, known: dict[tuple[int, int], float]
    ) -> Alternative:
        """The selection by curves that are measured where the budget is spent; `known`: values by group and count."""
        for _ in range(self.passes - 1):
            further = self._unmeasured(curves, self._bought(start, curves))
            if not further:
                break
            curves = self._with_points(curves, further, known)
        _, units = self._affordable(start, curves, self.budget)
        for _ in range(self.sharper):
            between = self._between(start, curves, units)
            if not between:
                break
            curves = self._with_points(curves, between, known)
            _, units = self._affordable(start, curves, self.budget)
        state, units = within_time(lambda budget: self._affordable(start, curves, budget), _removed, start, self.budget)
        if way == _WIDE:  # later rounds may take all widths again
            state.ladder = self.state.ladder
        if way == _BLOCKS and not ((state.group_kept == 0) & (start.group_kept > 0)).any():
            way = _OTHERWISE
        return Alternative(way, state, units)

    def _with_points(self, curves: Curves, requests: Mapping[int, int], known: dict[tuple[int, int], float]) -> Curves:
        """The curves with one more point of some groups, measured if it is not known."""
        fresh = {group: count for group, count in requests.items() if (group, count) not in known}
        measured = self.measure(fresh, curves) if fresh else curves
        known |= {(group, count): measured[group].at(count) for group, count in fresh.items()}
        added = {g: curves[g].with_point(count, known[g, count]) for g, count in requests.items() if g not in fresh}
        return {**measured, **added}

    def _affordable(self, start: PruningState, curves: Curves, budget: Budget) -> tuple[PruningState, IntArray]:
        """Meet the budget by known parts of curves or, if those are not enough, by guessed ones."""
        for reach in (_KNOWN, GROWTH, GROWTH**2):
            with suppress(BudgetError):
                return self._spent(start, curves, budget, reach)
        return self._spent(start, curves, budget, np.inf)

    def _spent(
        self, start: PruningState, curves: Curves, budget: Budget, reach: float
    ) -> tuple[PruningState, IntArray]:
        trial = start.copy()
        return trial, spend(trial, list(curves.values()), budget, reach, exchanges=_EXCHANGES)

    def _bought(self, start: PruningState, curves: Curves) -> IntArray:
        """The purchases if every curve could be followed one step beyond its last point."""
        trial = start.copy()
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

    def _between(self, start: PruningState, curves: Curves, units: IntArray) -> dict[int, int]:
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
            middle = self._middle(start, group, low, high)
            if high - low > _NARROW * len(curve.order) and rise > _STEEP * total and low < middle < high:
                requests[group] = middle
        return requests

    def _middle(self, state: PruningState, group: int, low: int, high: int) -> int:
        """A count about half way between two others that leaves a width of the ladder; one of the two if none does."""
        kept, middle = int(state.group_kept[group]), (low + high) // 2
        narrower = kept - state.ladder.at_most(group, kept - middle)
        wider = kept - state.ladder.above(group, kept - middle)
        return narrower if narrower < high else wider

    def _counts(self, units: IntArray) -> dict[int, int]:
        """Number of units by group."""
        groups, counts = np.unique(self.group_of[units], return_counts=True)
        return dict(zip(groups.tolist(), counts.tolist(), strict=True))


def _removed(found: tuple[PruningState, IntArray]) -> IntArray:
    return np.array(found[0].removed, dtype=np.int64)
