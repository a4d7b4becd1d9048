"""Spending a budget over sensitivity curves: the largest saving for the least divergence.

Every step cuts the group with the largest saving towards the budget per unit of added divergence, looking ahead over
its whole curve, so that a flat part behind a bump is found. Savings beyond the budget are returned, the most expensive
first. With a preference, a saving is valued by a mix of the missing budget and the preferred resources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState, infeasible
from onnxcop.allocation.resources import Resource, resource
from onnxcop.allocation.sensitivity import Curve

Prices = list[tuple[Resource, float]]
"""Value of a saved unit of each resource."""

_PARTS = 48  # a group is bought in about this many steps


def spend(state: PruningState, curves: Sequence[Curve], budget: Budget, reach: float = np.inf) -> IntArray:
    """Remove units from `state` until the budget holds.

    Args:
        state: The selection so far; this call extends it.
        curves: The curve of every group.
        budget: What must hold.
        reach: How far beyond its last measured point a curve may be bought, as a factor.

    Returns:
        int64, the units removed here.

    Raises:
        BudgetError: The budget cannot be met with these curves.
    """
    first = len(state.removed)
    taken = {curve.group: 0 for curve in curves}
    while not state.meets(budget):
        best: tuple[float, Curve, int] | None = None
        lacking = _lacking(state, budget)
        for curve in curves:
            jump = _best_jump(state, curve, taken[curve.group], lacking, reach)
            if jump is not None and (best is None or jump[0] < best[0]):
                best = (jump[0], curve, jump[1])
        if best is None:
            if np.isinf(reach) and state.take_finer_widths():
                continue
            raise infeasible(state, budget)
        _, curve, count = best
        for unit in curve.order[taken[curve.group] : count]:
            state.remove(unit)
        taken[curve.group] = count
    _give_back(state, curves, taken, budget)
    return np.array(state.removed[first:], dtype=np.int64)


def _lacking(state: PruningState, budget: Budget) -> Prices:
    """Values of a saving of each resource, zero for those within their bounds."""
    known = [(resource(name), bound) for name, bound in budget.bounds.items()]
    weights = [(entry, entry.weight(state, bound)) for entry, bound in known]
    return [(entry, weight) for entry, weight in weights if weight]


def _worth(state: PruningState, lacking: Prices) -> Prices:
    """Values of a saving of each resource, including the preference."""
    if state.preference is None:
        return lacking
    weights = {"macs": 0.0, "params": 0.0} | {entry.name: weight for entry, weight in lacking}
    totals = {name: resource(name).meter.total(state) for name in weights}
    return [(resource(name), weight) for name, weight in state.preference.mixed(weights, totals).items()]


def _saved(state: PruningState, weights: Prices, group: int, counts: IntArray) -> FloatArray:
    """Value of removing a number of further units of a group, float64 [counts]."""
    saved = np.zeros(len(counts))
    for entry, weight in weights:
        saved += weight * entry.meter.saving(state, group, counts)
    return saved


def _best_jump(
    state: PruningState, curve: Curve, taken: int, lacking: Prices, reach: float
) -> tuple[float, int] | None:
    """The cheapest interval of a curve from here on: (divergence per saving, count at its end)."""
    part = max(1, len(curve.order) // _PARTS)
    most = min(float(curve.most), max(reach * float(curve.counts[-1]), 1.0))
    jumps, ahead = [], 1
    while taken + ahead * part <= most:
        count = _rounded(state, curve, taken, taken + ahead * part)
        ahead *= 2
        if count is not None:
            jumps.append(count)
    counts = np.array(jumps, dtype=np.int64)
    counts = counts[state.may_remove(curve.group, counts - taken)]
    width = len(curve.order)
    if curve.whole is not None and width - taken == state.group_kept[curve.group] and state.may_empty(curve.group):
        counts = np.append(counts, width)
    more = counts - taken
    nearer = _saved(state, lacking, curve.group, more)  # whatever the preference, the budget must come closer
    counts, saved = counts[nearer > 0], _saved(state, _worth(state, lacking), curve.group, more[nearer > 0])
    if not len(counts):
        return None
    ratios = (curve.price(counts.astype(np.float64)) - curve.price(taken) + 1e-9 * (counts - taken)) / saved
    best = int(np.argmin(ratios))
    return float(ratios[best]), int(counts[best])


def _rounded(state: PruningState, curve: Curve, taken: int, count: int) -> int | None:
    """The next count that leaves a width of the ladder."""
    kept = int(state.group_kept[curve.group]) - (count - taken)
    even = state.ladder.at_most(curve.group, kept)
    count += kept - even
    return count if even > 0 and count <= curve.most else None


def _give_back(state: PruningState, curves: Sequence[Curve], taken: dict[int, int], budget: Budget) -> None:
    """Restore units bought beyond the budget, the most expensive first."""
    while True:
        best: tuple[float, Curve, int] | None = None
        for curve in curves:
            count, kept = taken[curve.group], int(state.group_kept[curve.group])
            step = state.ladder.above(curve.group, kept) - kept
            if not 0 < step <= count or not _fits_without(state, curve, count, budget, step):
                continue
            price = float(curve.price(count) - curve.price(count - step)) / step
            if state.preference is not None:  # units that save much of the preferred resources are restored last
                back = -_saved(state, _worth(state, _bounded(state, budget)), curve.group, np.array([-step]))[0]
                price *= step / max(float(back), 1e-30)
            if best is None or price > best[0]:
                best = (price, curve, step)
        if best is None:
            return
        _, curve, step = best
        for unit in reversed(curve.order[taken[curve.group] - step : taken[curve.group]]):
            state.restore(unit)
        taken[curve.group] -= step


def _bounded(state: PruningState, budget: Budget) -> Prices:
    """Equal weights for the resources that a budget bounds, by share of the original's amount."""
    bounded = [resource(name) for name in budget.bounds]
    return [(entry, 1.0 / max(entry.meter.total(state), 1e-30)) for entry in bounded]


def _fits_without(state: PruningState, curve: Curve, count: int, budget: Budget, step: int) -> bool:
    """Whether the budget still holds if the units bought last from a curve are restored."""
    units = curve.order[count - step : count]
    for unit in reversed(units):
        state.restore(unit)
    fits = state.meets(budget)
    for unit in units:
        state.remove(unit)
    return fits
