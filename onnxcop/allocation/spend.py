"""Spending a budget over sensitivity curves: the largest saving for the least divergence.

Every step cuts the group with the largest saving towards the budget per unit of added divergence, looking ahead over
its whole curve, so that a flat part behind a bump is found. Savings beyond the budget are returned, the most expensive
first. With a preference, a saving is valued by a mix of the missing budget and the preferred resources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState, infeasible
from onnxcop.allocation.limits import AUTO
from onnxcop.allocation.resources import Resource, resource
from onnxcop.allocation.sensitivity import GROWTH, Curve
from onnxcop.errors import BudgetError

Prices = Sequence[tuple[Resource, float]]
"""Value of a saved unit of each resource."""

_TIME = "latency"  # the resource
_PARTS = 48  # a group is bought in about this many steps


def spend(
    state: PruningState, curves: Sequence[Curve], budget: Budget, reach: float = np.inf, *, exchanges: int = 0
) -> IntArray:
    """Remove units from `state` until the budget holds.

    Args:
        state: The selection so far; this call extends it.
        curves: The curve of every group.
        budget: What must hold.
        reach: How far beyond its last measured point a curve may be bought, as a factor.
        exchanges: How many other purchases to try within a budget of time, each with less of one group; the cheapest
            wins. None with a preference, as it makes others worth more.

    Returns:
        int64, the units removed here.

    Raises:
        BudgetError: The budget cannot be met with these curves.
    """
    first = len(state.removed)
    exchanges = exchanges if _timed(budget) and state.limits.multiple_of != 1 and state.preference is None else 0
    start = state.copy() if exchanges else state
    caps = {curve.group: len(curve.order) for curve in curves}
    taken = _buy(state, curves, budget, reach, caps)
    if exchanges:
        state.assign(_exchanged(start, state, curves, budget, reach, taken, exchanges))
    return np.array(state.removed[first:], dtype=np.int64)


def _exchanged(
    start: PruningState, bought: PruningState, curves: Sequence[Curve], budget: Budget, reach: float,
    taken: dict[int, int], exchanges: int,
) -> PruningState:  # fmt: skip
    """The cheapest of several ways to meet a budget: a step that goes beyond it may be worse than two small ones.

    The groups that were paid most for are limited one by one: to one unit less than was bought, and to nothing.
    """
    by_group = {curve.group: curve for curve in curves}
    caps, tried = {curve.group: len(curve.order) for curve in curves}, set[tuple[int, int]]()
    while len(tried) < exchanges:
        paid = sorted(taken, key=lambda group: -float(by_group[group].price(taken[group])))
        limits = [(group, cap) for group in paid if taken[group] for cap in (taken[group] - 1, 0)]
        limit = next((one for one in limits if one not in tried), None)
        if limit is None:
            break
        tried.add(limit)
        trial, less = start.copy(), {**caps, limit[0]: limit[1]}
        try:
            other = _buy(trial, curves, budget, reach, less)
        except BudgetError:
            continue
        if _paid(curves, other) < _paid(curves, taken):
            bought, taken, caps = trial, other, less
    return bought


def _paid(curves: Sequence[Curve], taken: dict[int, int]) -> float:
    """Divergence that all purchases add."""
    return sum(float(curve.price(taken[curve.group])) for curve in curves)


def _buy(
    state: PruningState, curves: Sequence[Curve], budget: Budget, reach: float, caps: dict[int, int]
) -> dict[int, int]:
    """Remove units until the budget holds, at most `caps` of each group; numbers of removed units by group."""
    taken = {curve.group: 0 for curve in curves}
    known = _KnownOffers(state, reach, caps)
    while not state.meets(budget):
        best: tuple[float, Curve, int] | None = None
        lacking = _lacking(state, budget)
        for curve in curves:
            jump = known.best_jump(curve, taken[curve.group], lacking)
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
    return taken


@dataclass(frozen=True, slots=True)
class _Offer:
    """Intervals of a curve, while neither the curve nor the widths that their savings depend on change.

    Attributes:
        widths: Those widths.
        counts: int64 [intervals], units removed at the end of each.
        prices: float64 [intervals], divergence added by each.
        savings: By resource, float64 [intervals].
    """

    widths: bytes
    counts: IntArray
    prices: FloatArray
    savings: Sequence[FloatArray]


class _KnownOffers:
    """The cheapest intervals of curves. A step changes the widths of few groups, so most offers are known."""

    def __init__(self, state: PruningState, reach: float, caps: dict[int, int]) -> None:
        self._state, self._reach, self._caps = state, reach, caps
        self._known: dict[int, _Offer] = {}

    def best_jump(self, curve: Curve, taken: int, lacking: Prices) -> tuple[float, int] | None:
        """As :func:`_best_jump`."""
        state, group = self._state, curve.group
        plain = all(entry.counted for entry, _ in lacking) and state.preference is None
        if not plain or (curve.whole is not None and self._caps[group] >= len(curve.order)):
            return _best_jump(state, curve, taken, lacking, self._reach, self._caps[group])
        widths = b"".join((
            state.widths_beside(group).tobytes(), state.ladder.rungs[group].tobytes(),
            *(entry.name.encode() for entry, _ in lacking), taken.to_bytes(8, "little"),
        ))  # fmt: skip
        offer = self._known.get(group)
        if offer is None or offer.widths != widths:
            offer = self._known[group] = self._offer(curve, taken, lacking, widths)
        if not len(offer.counts):
            return None
        saved = np.zeros(len(offer.counts))
        for (_, weight), saving in zip(lacking, offer.savings, strict=True):
            saved += weight * saving
        useful = np.flatnonzero(saved > 0)
        if not len(useful):
            return None
        best = useful[np.argmin(offer.prices[useful] / saved[useful])]
        return float(offer.prices[best] / saved[best]), int(offer.counts[best])

    def _offer(self, curve: Curve, taken: int, lacking: Prices, widths: bytes) -> _Offer:
        state = self._state
        most = min(curve.most, max(self._reach * float(curve.counts[-1]), 1.0))
        counts = _jumps(state, curve, taken, most, self._caps[curve.group])
        savings = [entry.meter.saving(state, curve.group, counts - taken) for entry, _ in lacking]
        return _Offer(widths, counts, _prices(curve, taken, counts), savings)


def _prices(curve: Curve, taken: int, counts: IntArray) -> FloatArray:
    """Divergence added from one number of removed units to others; of intervals that add none, the shortest is best."""
    return np.asarray(curve.price(counts.astype(np.float64)) - curve.price(taken) + 1e-9 * (counts - taken))


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


def _saved(state: PruningState, weights: Prices, group: int, counts: IntArray, lacking: Prices = ()) -> FloatArray:
    """Value of removing a number of further units of a group, float64 [counts]; more than is lacking is of no use."""
    missing = {entry.name: 1.0 / weight for entry, weight in lacking if entry.name == _TIME}
    saved = np.zeros(len(counts))
    for entry, weight in weights:
        saved += weight * np.minimum(entry.meter.saving(state, group, counts), missing.get(entry.name, np.inf))
    return saved


def _best_jump(
    state: PruningState, curve: Curve, taken: int, lacking: Prices, reach: float, cap: int
) -> tuple[float, int] | None:
    """The cheapest interval of a curve from here on, up to `cap` units: (divergence per saving, count at its end)."""
    last, width, timed = float(curve.counts[-1]), len(curve.order), any(entry.name == _TIME for entry, _ in lacking)
    known = max(reach * last, 1.0)
    counts = _jumps(state, curve, taken, curve.most if timed else min(curve.most, known), cap)
    near = (counts <= known) | (not timed)
    whole = curve.whole is not None and cap >= width and width - taken == state.group_kept[curve.group]
    if whole and state.may_empty(curve.group):
        counts, near = np.append(counts, width), np.append(near, True)
    nearer = _saved(state, lacking, curve.group, counts - taken)  # whatever the preference, it must come closer
    if timed and reach >= GROWTH and taken <= last and not (near & (nearer > 0)).any():
        near[np.flatnonzero(nearer > 0)[:1]] = True  # the first step that saves anything may be a long one
    counts = counts[near & (nearer > 0)]
    more = counts - taken
    saved = _saved(state, _worth(state, lacking), curve.group, more, lacking)
    if not len(counts):
        return None
    ratios = _prices(curve, taken, counts) / saved
    best = int(np.argmin(ratios))
    return float(ratios[best]), int(counts[best])


def _jumps(state: PruningState, curve: Curve, taken: int, most: float, cap: int) -> IntArray:
    """Ends of intervals of a curve from here on: numbers of removed units that leave a width of the ladder, int64.

    Args:
        state: The selection so far.
        curve: The curve.
        taken: Units of it that were bought.
        most: Largest number of removed units, before it is rounded up to a width.
        cap: Largest number after that.
    """
    part = max(1, len(curve.order) // _PARTS)
    jumps, ahead = list[int](), 1
    while taken + ahead * part <= min(cap, most):
        count = _rounded(state, curve, taken, taken + ahead * part)
        ahead *= 2
        if count is not None and count <= cap and count not in jumps[-1:]:
            jumps.append(count)
    counts = np.array(jumps, dtype=np.int64)
    return counts[state.may_remove(curve.group, counts - taken)]


def _rounded(state: PruningState, curve: Curve, taken: int, count: int) -> int | None:
    """The next count that leaves a width of the ladder."""
    kept = int(state.group_kept[curve.group]) - (count - taken)
    even = state.ladder.at_most(curve.group, kept)
    count += kept - even
    return count if even > 0 and count <= curve.most else None


def _give_back(state: PruningState, curves: Sequence[Curve], taken: dict[int, int], budget: Budget) -> None:
    """Restore units bought beyond the budget, the most expensive first; if time is bounded, first those for free."""
    while True:
        best: tuple[bool, float, Curve, int] | None = None
        for curve in curves:
            count, kept = taken[curve.group], int(state.group_kept[curve.group])
            step = state.ladder.above(curve.group, kept) - kept
            if not 0 < step <= count or not _fits_without(state, curve, count, budget, step):
                continue
            price = float(curve.price(count) - curve.price(count - step)) / step
            if state.preference is not None:  # units that save much of the preferred resources are restored last
                back = -_saved(state, _worth(state, _bounded(state, budget)), curve.group, np.array([-step]))[0]
                price *= step / max(float(back), 1e-30)
            free = _timed(budget) and _costs_no_time(state, curve.group, step)
            if best is None or (free, price) > best[:2]:
                best = (free, price, curve, step)
        if best is None:
            return
        *_, curve, step = best
        for unit in reversed(curve.order[taken[curve.group] - step : taken[curve.group]]):
            state.restore(unit)
        taken[curve.group] -= step


def _timed(budget: Budget) -> bool:
    return _TIME in budget.bounds


def _costs_no_time(state: PruningState, group: int, step: int) -> bool:
    """Whether further units of a group fit into blocks of channels that kernels compute anyway."""
    if state.limits.multiple_of != AUTO:
        return False
    return float(-state.saving_in_blocks(group, np.array([-step]))[0]) <= 0


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
