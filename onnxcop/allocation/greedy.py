"""COP's allocation: the least important unit of the whole network is removed first, until the budget holds."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import AUTO, Limits, allowed_units, group_floors
from onnxcop.allocation.resources import resource
from onnxcop.analysis.cost import Savings
from onnxcop.criteria.base import PruningContext, Ranking
from onnxcop.criteria.filters import produced_filter_counts
from onnxcop.criteria.preference import Preference
from onnxcop.errors import BudgetError
from onnxcop.rewrite.blocks import Blocks
from onnxcop.runtime.staircase import Staircase


@dataclass(frozen=True, slots=True)
class Selection:
    """A set of units to remove.

    Attributes:
        removed: int64, in the order of removal.
        cost: MACs, parameters and bytes of what remains, float64 [3].
        filters: Fraction of the prunable filters kept.
    """

    removed: IntArray
    cost: FloatArray
    filters: float


class PruningState:
    """A growing selection: widths, costs, and groups that can lose more units.

    Args:
        context: The traced model.
        limits: The limits on what may be cut.
        preference: The preference between savings, for measured curves.
    """

    def __init__(self, context: PruningContext, limits: Limits, preference: Preference | None = None) -> None:
        structure = self.structure = context.structure
        self.cost_model = context.cost
        self.limits = limits
        self.ladder = limits.ladder(structure)
        self.preference = preference
        self.kept = structure.axis_sizes.copy()
        self.original = context.cost.original()
        self.cost = self.original.copy()
        self.available: BoolArray = allowed_units(context.model, structure, limits)
        self.removed: list[int] = []
        self.group_kept = np.array([group.width for group in structure.groups], dtype=np.int64)
        self.group_floor = group_floors(context.model, structure, limits)
        self.floor = np.zeros(len(self.kept), dtype=np.int64)
        limited = structure.limited_axes
        self.floor[limited] = np.minimum(limits.min_filters, structure.axis_sizes[limited])
        self.filter_weight = produced_filter_counts(context)
        self.filters_total = float(self.filter_weight.sum())
        self.filters_kept = self.filters_total
        self.blocks = Blocks(context.model, structure) if limits.blocks else None
        self._rows: list[tuple[IntArray, IntArray]] = [self._row(int(g.units[0])) for g in structure.groups]
        self._savings: dict[int, Savings] = {}

    def _row(self, unit: int) -> tuple[IntArray, IntArray]:
        incidence = self.structure.incidence
        row = slice(incidence.indptr[unit], incidence.indptr[unit + 1])
        return incidence.indices[row].astype(np.int64), incidence.data[row].astype(np.int64)

    def stands_on(self, group: int) -> tuple[IntArray, IntArray]:
        """The axes of a group's units, and how often a unit is on each."""
        return self._rows[group]

    def may_remove(self, group: int, counts: IntArray) -> BoolArray:
        """Whether a number of further units of a group can be removed without emptying an axis, bool [counts]."""
        axes, times = self._rows[group]
        left = self.kept[axes] - counts[:, None] * times
        return np.asarray(
            (self.group_kept[group] - counts >= self.group_floor[group]) & (left >= self.floor[axes]).all(axis=1)
        )

    def may_empty(self, group: int) -> bool:
        """Whether all that is left of a group can be removed, as a block, so that axes of its own are empty."""
        if self.blocks is None or self.group_floor[group] or not self.group_kept[group]:
            return False
        axes, times = self._rows[group]
        own = self.structure.axis_sizes[axes] == times * self.structure.groups[group].width
        left = self.kept[axes] - self.group_kept[group] * times
        if not (own | (left >= self.floor[axes])).all() or not self.blocks.may_go(group):
            return False
        return self.blocks.without((*np.flatnonzero(self.group_kept == 0).tolist(), group)) is not None

    def narrowed(self, group: int, count: int) -> IntArray:
        """Indices that every axis keeps after a number of further units of a group are removed, int64 [axes]."""
        axes, times = self._rows[group]
        kept = self.kept.copy()
        kept[axes] -= count * times
        return kept

    def saving(self, group: int, counts: IntArray) -> FloatArray:
        """MACs, parameters and bytes saved by removing a number of further units of a group, float64 [counts, 3]."""
        return self._savings_of(group).of(self.kept, counts)

    def saving_in_blocks(self, group: int, counts: IntArray) -> FloatArray:
        """MACs saved if kernels compute whole blocks of channels, which follow time more closely, float64 [counts]."""
        return self._savings_of(group).of(self.kept, counts, self.limits.staircase.block)[:, 0]

    def widths_beside(self, group: int) -> IntArray:
        """How many indices remain on the axes that savings from a group's units, and their limits, depend on, int64."""
        return self.kept[self._savings_of(group).axes]

    def _savings_of(self, group: int) -> Savings:
        savings = self._savings.get(group)
        if savings is None:
            savings = self._savings[group] = self.cost_model.savings(*self._rows[group])
        return savings

    def in_wide_steps(self) -> PruningState | None:
        """A copy that takes whole blocks of channels only; None if it does so anyway, or the user sets the widths."""
        stairs = self.limits.staircase
        if self.limits.multiple_of != AUTO or stairs.fine == stairs.block:
            return None
        other = self.copy()
        other.ladder = replace(self.limits, staircase=Staircase(stairs.block, stairs.block)).ladder(self.structure)
        return other

    def take_finer_widths(self) -> bool:
        """Allow finer widths that suit the machine less; return whether there are any."""
        finer = self.ladder.finer
        self.ladder = finer or self.ladder
        return finer is not None

    def remove(self, unit: int) -> None:
        """Remove a unit."""
        group = int(self.structure.group_of[unit])
        axes, times = self._rows[group]
        self.cost = self.cost - self._savings_of(group).of_one(self.kept)
        self.kept[axes] -= times
        self.group_kept[group] -= 1
        self.available[unit] = False
        self.removed.append(unit)
        self.filters_kept -= float(self.filter_weight[unit])

    def restore(self, unit: int) -> None:
        """Restore a removed unit."""
        group = int(self.structure.group_of[unit])
        axes, times = self._rows[group]
        self.kept[axes] += times
        self.cost = self.cost + self._savings_of(group).of_one(self.kept)
        self.group_kept[group] += 1
        self.available[unit] = True
        self.removed.remove(unit)
        self.filters_kept += float(self.filter_weight[unit])

    def copy(self) -> PruningState:
        """An independent copy for trials."""
        other = copy(self)
        other.kept, other.available = self.kept.copy(), self.available.copy()
        other.group_kept, other.removed = self.group_kept.copy(), list(self.removed)
        return other

    def assign(self, other: PruningState) -> None:
        """Take over the values of another state of the same model."""
        self.__dict__.update(other.copy().__dict__)

    def level(self, name: str, bound: float = inf) -> float:
        """The amount of a resource that is kept, in the form of its bound: a fraction, or an amount."""
        return resource(name).level(self, bound)

    def meets(self, budget: Budget) -> bool:
        """Whether every given bound holds."""
        return all(self.level(name, bound) <= bound * (1 + 1e-12) for name, bound in budget.bounds.items())

    def in_shares(self, budget: Budget) -> Budget:
        """The same budget with every bound as a fraction of the original's amount."""
        return Budget(**{name: resource(name).as_share(self, bound) for name, bound in budget.bounds.items()})

    def exhaust(self) -> None:
        """Remove all removable units, group by group."""
        for group in self.structure.groups:
            units = group.units[self.available[group.units]]
            counts = self.group_kept[group.index] - np.append(self.ladder.rungs[group.index], 0)
            counts = counts[(counts > 0) & (counts <= len(units))]
            if self.limits.multiple_of != 1:
                counts = counts[counts < self.group_kept[group.index]]
            counts = counts[self.may_remove(group.index, counts)]
            for unit in units[: int(counts.max(initial=0))].tolist():
                self.remove(unit)
        for group in self.structure.groups if self.blocks else ():
            units = group.units[self.available[group.units]]
            if len(units) == self.group_kept[group.index] and self.may_empty(group.index):
                for unit in units.tolist():
                    self.remove(unit)

    def selection(self) -> Selection:
        """The units removed so far."""
        return Selection(np.array(self.removed, dtype=np.int64), self.cost, self.level("filters"))


def choose(
    context: PruningContext,
    ranking: Ranking,
    budget: Budget,
    limits: Limits = Limits(),
    progress: Progress = silent,
) -> Selection:
    """Remove units in order of importance until the budget holds.

    Args:
        context: The traced model.
        ranking: Importance of units, updated as units are removed.
        budget: The budget that must hold at the end.
        limits: The limits on what may be cut.
        progress: Called with (stage, units removed, None).

    Raises:
        BudgetError: The budget does not hold even after all removable units are removed; the message names the nearest
            budget.
    """
    state = PruningState(context, limits)
    group_of = context.structure.group_of
    blocked = np.zeros(len(context.structure.groups), dtype=np.bool_)
    paid = np.zeros(len(group_of))
    while not state.meets(budget):
        candidates = state.available & ~blocked[group_of]
        scores = np.where(candidates, ranking.importance(state.kept), np.inf)
        step = _step(state, scores, candidates) if candidates.any() else None
        if step is None:
            if not state.take_finer_widths():
                raise infeasible(state, budget)
            blocked[:] = False
            continue
        group, units = step
        if not units or not state.may_remove(group, np.array([len(units)]))[0]:
            blocked[group] = True
            continue
        for unit in units:
            paid[unit] = scores[unit]
            state.remove(unit)
            ranking.remove(unit)
        progress("selection", len(state.removed), None)
    _give_back(state, paid, budget)
    return state.selection()


def check_reachable(context: PruningContext, budget: Budget, limits: Limits) -> None:
    """Refuse a budget that even the smallest network does not meet, before anything is measured.

    Raises:
        BudgetError: The budget cannot be met; the message names the nearest one.
    """
    any_width = replace(limits, multiple_of=1) if limits.multiple_of == AUTO else limits
    state = PruningState(context, any_width)
    state.exhaust()
    state.limits = limits  # the limits that the message names
    if not state.meets(budget):
        raise infeasible(state, budget)


def _step(state: PruningState, scores: FloatArray, candidates: BoolArray) -> tuple[int, list[int]] | None:
    """The next units to remove, all of one group: as many as reach its next width."""
    group_of = state.structure.group_of
    if state.limits.multiple_of == 1:
        unit = int(np.argmin(scores))
        return int(group_of[unit]), [unit]
    best: tuple[float, int, list[int]] | None = None
    for group in np.unique(group_of[candidates]).tolist():
        kept = int(state.group_kept[group])
        even = state.ladder.at_most(group, kept - 1)
        units = state.structure.groups[group].units
        units = units[candidates[units]]
        if len(units) < kept - even or not even:
            units = units[:0]
        order = units[np.argsort(scores[units], kind="stable")][: kept - even]
        mean = float(scores[order].mean()) if len(order) else np.inf
        if best is None or mean < best[0]:
            best = (mean, group, order.tolist())
    return None if best is None or np.isinf(best[0]) else (best[1], best[2])


def _give_back(state: PruningState, paid: FloatArray, budget: Budget) -> None:
    """Restore units that the last steps removed beyond the budget, the most important first."""
    if state.limits.multiple_of == 1:
        return
    open_groups = set(np.unique(state.structure.group_of[state.removed]).tolist())
    while open_groups:
        steps = {group: _last_step(state, group, paid) for group in open_groups}
        group = max(open_groups, key=lambda one: float(paid[steps[one]].mean()) if steps[one] else -np.inf)
        for unit in steps[group]:
            state.restore(unit)
        if not steps[group] or not state.meets(budget):
            open_groups.discard(group)
            for unit in reversed(steps[group]):
                state.remove(unit)


def _last_step(state: PruningState, group: int, paid: FloatArray) -> list[int]:
    """The units that bring a group back to its next wider width, most important first; empty if it is complete."""
    kept = int(state.group_kept[group])
    count = state.ladder.above(group, kept) - kept
    removed = np.array(state.removed, dtype=np.int64)
    candidates = removed[state.structure.group_of[removed] == group].tolist()
    candidates.sort(key=lambda unit: -float(paid[unit]))
    return candidates[:count] if 0 < count <= len(candidates) else []


def infeasible(state: PruningState, budget: Budget) -> BudgetError:
    """The error for a budget that cannot be met, with the nearest feasible value."""
    given = ", ".join(state.limits.given())
    if given and not state.removed:
        return BudgetError(f"nothing is left to prune with {given}; loosen that, or see `onnxcop inspect`", 1.0)
    way_out = f"loosen {given}" if given else "see in `onnxcop inspect` what is frozen"
    missed = (name for name, bound in budget.bounds.items() if state.level(name, bound) > bound)
    name = next(missed, next(iter(budget.bounds)))
    return resource(name).out_of_reach(state, budget.bounds[name], way_out)
