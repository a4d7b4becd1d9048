"""Resources that a budget can bound: one entry of `RESOURCES` each.

Options, keywords, checks and messages are made from this table. A resource defines how much of it a selection uses and
how much is saved by removing more units of a group. The amount may be a sum over the cost model, a count, or a table of
times at the kept widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol

from onnxcop._base.lookup import entry_named
from onnxcop._base.quantities import share, size_or_share
from onnxcop.errors import BudgetError

if TYPE_CHECKING:  # the command line reads this table before it loads anything heavy
    from onnxcop._base.types import FloatArray, IntArray
    from onnxcop.allocation.greedy import PruningState
    from onnxcop.analysis.time_model import TimeModel


class Meter(Protocol):
    """Measures how much of a resource the units of a model use."""

    def used(self, state: PruningState) -> float:
        """The amount that a selection leaves."""
        ...

    def total(self, state: PruningState) -> float:
        """The amount of the original."""
        ...

    def saving(self, state: PruningState, group: int, counts: IntArray) -> FloatArray:
        """Savings from removing a number of further units of a group, float64 [counts]."""
        ...


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of budget.

    Attributes:
        name: The keyword, and the option without its dashes.
        title: Name of the counted amount, in messages and in the help.
        meter: The meter of the amount.
        absolute: Whether a bound above 1 is an amount in bytes; otherwise bounds are shares of the original's.
        counted: Whether savings follow from the widths beside a group alone, by the cost model or a count.
    """

    name: str
    title: str
    meter: Meter
    absolute: bool = False
    counted: bool = True

    @property
    def flag(self) -> str:
        """The option."""
        return f"--{self.name}"

    @property
    def help(self) -> str:
        """The help text of the option."""
        return f"{self.title[0].upper()}{self.title[1:]}, e.g. {'5MB or 50%' if self.absolute else '0.7 or 70%'}."

    def read(self, value: object) -> float:
        """A bound from a number or a text, `70%` or `5MB`.

        Raises:
            BudgetError: It is not a share or a size.
        """
        try:
            return size_or_share(value) if self.absolute else share(value)
        except ValueError as error:
            if self.absolute:
                raise BudgetError(f"{self.flag}: {error}") from None
            raise BudgetError(
                f"--{self.name} is a fraction to keep, above 0 and at most 1 (or 100%), not {value}"
            ) from None

    def is_share(self, bound: float) -> bool:
        """Whether a bound is a share of the original's."""
        return not self.absolute or bound <= 1

    def as_share(self, state: PruningState, bound: float) -> float:
        """A bound as a share of the original's."""
        return bound if self.is_share(bound) else min(bound / max(self.meter.total(state), 1e-30), 1.0)

    def level(self, state: PruningState, bound: float = inf) -> float:
        """The current use, in the form of the bound: a share, or an amount."""
        used = self.meter.used(state)
        return used / max(self.meter.total(state), 1e-30) if self.is_share(bound) else used

    def weight(self, state: PruningState, bound: float) -> float:
        """The value of saving a unit of this resource: the inverse of the excess over the bound, 0 below the bound."""
        over = self.level(state, bound) - bound
        if over <= 0:
            return 0.0
        return 1.0 / max(over * self.meter.total(state) if self.is_share(bound) else over, 1e-30)

    def out_of_reach(self, state: PruningState, bound: float, way_out: str) -> BudgetError:
        """The error for a bound that cannot be met, with the nearest feasible one."""
        from math import ceil

        level = self.level(state, bound)
        if not self.is_share(bound):
            nearest = float(ceil(level))
            message = (
                f"the budget {self.flag} {{bound}} cannot be reached: the smallest file is {nearest:.0f} bytes; "
                f"ask for that many or more (e.g. 5MB; a number alone is bytes), or {way_out}"
            )
            return BudgetError(message, nearest, flag=self.flag, bound=f"{bound:.0f}")
        nearest = ceil(level * 1e4) / 1e4
        if nearest >= 1:
            message = (
                f"the budget {self.flag} {{bound}} cannot be reached: the prunable filters hold almost none of the "
                f"{self.title}; {way_out}"
            )
        else:
            message = (
                f"the budget {self.flag} {{bound}} cannot be reached: with all prunable filters cut {level:.2%} "
                f"remain; ask for {self.flag} {nearest:g} or more, or {way_out}"
            )
        return BudgetError(message, nearest, flag=self.flag, bound=f"{bound:g}")


PROVENANCE = 420  # bytes of the metadata in the result; see `onnxcop.rewrite.provenance`


@dataclass(frozen=True, slots=True)
class _Cost:
    """A column of the cost model; see :data:`onnxcop.analysis.cost.KINDS`."""

    column: int
    overhead: bool = False

    def used(self, state: PruningState) -> float:
        return float(state.cost[self.column]) + (state.cost_model.file_overhead + PROVENANCE if self.overhead else 0)

    def total(self, state: PruningState) -> float:
        return float(state.original[self.column]) + (state.cost_model.file_overhead if self.overhead else 0)

    def saving(self, state: PruningState, group: int, counts: IntArray) -> FloatArray:
        return state.saving(group, counts)[:, self.column]


@dataclass(frozen=True, slots=True)
class _Filters:
    """The prunable filters without those that depthwise layers copy (COP's measure)."""

    def used(self, state: PruningState) -> float:
        return state.filters_kept if state.filters_total else 1.0

    def total(self, state: PruningState) -> float:
        return state.filters_total or 1.0

    def saving(self, state: PruningState, group: int, counts: IntArray) -> FloatArray:
        each = float(state.filter_weight[state.structure.groups[group].units[0]])
        return counts.astype(float) * each


@dataclass(frozen=True, slots=True)
class _Time:
    """The time of a run on this machine, or on the one that a table was measured on."""

    def used(self, state: PruningState) -> float:
        return _times(state).fraction(state.kept)

    def total(self, state: PruningState) -> float:
        return 1.0

    def saving(self, state: PruningState, group: int, counts: IntArray) -> FloatArray:
        axes, times = state.stands_on(group)
        return _times(state).saving(state.kept, axes, times, counts)


def _times(state: PruningState) -> TimeModel:
    times = state.cost_model.times
    if times is None:
        raise BudgetError("a budget of --latency needs a time model: see onnxcop.pipeline.timing.with_times")
    return times


RESOURCES: tuple[Resource, ...] = (
    Resource("macs", "multiply-accumulates", _Cost(0)),
    Resource("params", "parameters", _Cost(1)),
    Resource("filters", "prunable filters", _Filters()),
    Resource("size", "bytes of the file", _Cost(2, overhead=True), absolute=True),
    Resource("latency", "time of a run", _Time(), counted=False),
)


def resource(name: str) -> Resource:
    """Look up a resource by name.

    Raises:
        BudgetError: There is no resource of this name.
    """
    return entry_named(name, RESOURCES, "budget")
