"""Selections within a time budget: estimates of the time model are corrected by timing whole models.

The sum of operators' times leaves out the time between them, so a selection with an estimate of 70 % may take 73 %. It
is timed with arbitrary weights before recovery. Then the budget of estimated time is moved until the measured time is
as close below the bound as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState, choose
from onnxcop.allocation.limits import Limits
from onnxcop.criteria.base import Criterion, PruningContext
from onnxcop.errors import BudgetError

_TRIALS = 9  # selections to time
_NEAR = 0.012  # share of the whole time: close enough below the bound
_LEAST, _MOST = 1e-3, 0.995  # share of the time to aim below the bound
_FURTHER = 1.1  # factor of the measured distance for the next trial

Found = TypeVar("Found")


def within_time(
    select: Callable[[Budget], Found], removed: Callable[[Found], IntArray], state: PruningState, budget: Budget
) -> Found:
    """Select units so that the measured time of the whole model meets the budget.

    Args:
        select: Selects units within a budget of estimated time.
        removed: All units removed in a state, int64.
        state: Any state of the model.
        budget: The budget that must hold.

    Raises:
        BudgetError: It cannot be met; for time, if not even the fastest selection meets it.
    """
    times, bound = state.cost_model.times, budget.latency
    if times is None or times.timer is None or bound is None:
        return select(budget)
    best: tuple[float, Found] | None = None
    low, high, aim, deepest, step = None, None, bound, 0.0, _NEAR
    for _ in range(_TRIALS):
        try:
            found = select(budget.but(latency=aim))
        except BudgetError as error:  # if so little time cannot be reached, the smallest model is tried
            if error.nearest is None or not aim < error.nearest < 1 or (high is not None and error.nearest >= high):
                if best is None:
                    raise
                break
            deepest = aim = error.nearest
            continue
        ratio = times.timer(removed(found))
        if best is None or _better(ratio, best[0], bound):
            best = (ratio, found)
        if bound - _NEAR <= ratio <= bound:
            break
        if ratio > bound:
            if aim <= deepest:
                break
            high, step = aim, 2 * step
            aim = aim - max(step, _FURTHER * (ratio - bound)) if low is None else (low + aim) / 2
            aim = max(aim, deepest, _LEAST)
        elif aim >= _MOST:
            break
        else:
            low = aim
            aim = min(_MOST, aim + (bound - ratio) / _FURTHER) if high is None else (high + aim) / 2
        if high is not None and low is not None and high - low < _NEAR / 4:
            break
    assert best is not None
    if best[0] > bound + _NEAR:
        nearest = float(np.ceil(best[0] * 100) / 100)
        raise BudgetError(
            f"the budget --latency {{bound}} cannot be reached: the fastest cut that was found takes {best[0]:.1%} of "
            f"the time; ask for --latency {nearest:g} or more",
            nearest, flag="--latency", bound=f"{bound:g}",
        )  # fmt: skip
    return best[1]


def _better(ratio: float, other: float, bound: float) -> bool:
    """Whether a time is closer below the bound than another one, or the only one below it."""
    if (ratio <= bound) != (other <= bound):
        return ratio <= bound
    return ratio > other if ratio <= bound else ratio < other


def choose_within(context: PruningContext, criterion: Criterion, budget: Budget, limits: Limits) -> IntArray:
    """Like :func:`onnxcop.allocation.greedy.choose`, with a time budget that holds for the whole model; int64."""
    if budget.latency is None:
        return choose(context, criterion.rank(context), budget, limits).removed

    def select(tried: Budget) -> IntArray:
        return choose(context, criterion.rank(context), tried, limits).removed

    return within_time(select, lambda units: units, PruningState(context, limits), budget)
