"""Spending budgets over measured curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_models import chain

import onnxcop
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.search import CurveSearch
from onnxcop.allocation.sensitivity import Curve
from onnxcop.allocation.spend import spend
from onnxcop.analysis.timing import time_model
from onnxcop.criteria.base import PruningContext
from onnxcop.errors import BudgetError
from onnxcop.runtime.session import EngineOptions
from onnxcop.runtime.staircase import Staircase
from onnxcop.runtime.time_table import TimeTable

CPU = EngineOptions(provider="cpu", threads=1)
BUDGETS = [
    Budget(macs=0.8), Budget(macs=0.5), Budget(params=0.6), Budget(filters=0.7), Budget(size=250_000),
    Budget(macs=0.7, params=0.5), Budget(macs=0.6, params=0.6, filters=0.6, size=300_000),
]  # fmt: skip


@pytest.fixture(scope="module")
def context(models_dir: Path) -> PruningContext:
    return subject_of(onnxcop.analyze(models_dir / "digits_resnet.onnx", options=CPU))


@pytest.fixture(scope="module")
def timed(models_dir: Path) -> PruningContext:
    analysis = onnxcop.analyze(models_dir / "digits_resnet.onnx", options=CPU)
    times = time_model(analysis, TimeTable.here(CPU), Staircase(4, 16), CPU)
    return subject_of(replace(analysis, cost=replace(analysis.cost, times=times)))


def subject_of(analysis: onnxcop.Analysis) -> PruningContext:
    return PruningContext.of(analysis.model, analysis.structure, analysis.cost)


def curves_of(context: PruningContext, seed: int = 0, most: Sequence[int] | None = None) -> list[Curve]:
    """Curves of random steepness, all but the last unit of every group for sale."""
    rng = np.random.default_rng(seed)
    found = []
    for group in context.structure.groups:
        width = group.width - 1 if most is None else most[group.index]
        counts = np.unique(np.linspace(1, width, 5).astype(np.int64))
        values = np.cumsum(rng.uniform(0, 1, len(counts)))
        found.append(Curve(group.index, tuple(rng.permutation(group.units)[:width].tolist()), counts, values))
    return found


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_budgets_are_met_to_one_unit(context: PruningContext, budget: Budget, seed: int) -> None:
    state, curves = PruningState(context, Limits(multiple_of=1)), curves_of(context, seed)
    units = spend(state, curves, budget)
    assert state.meets(budget)
    assert len(units) == len(set(units.tolist())) == len(state.removed) > 0
    state.restore(int(units[-1]))  # what was removed last was needed
    assert not state.meets(budget)


@pytest.mark.parametrize("seed", range(3))
def test_units_leave_in_the_order_of_their_curve(context: PruningContext, seed: int) -> None:
    curves = curves_of(context, seed)
    units = set(spend(PruningState(context, Limits(multiple_of=1)), curves, Budget(macs=0.6)).tolist())
    for curve in curves:
        count = len(units & set(curve.order))
        assert units & set(curve.order) == set(curve.order[:count])


def test_what_many_units_save_is_what_they_save_one_by_one(context: PruningContext) -> None:
    rng = np.random.default_rng(0)
    state = PruningState(context, Limits(max_cut=0.8))
    for unit in rng.permutation(len(state.available))[:20].tolist():
        state.remove(unit)
    for group in context.structure.groups:
        counts = np.arange(1, state.group_kept[group.index])
        allowed, saved = state.may_remove(group.index, counts), state.saving(group.index, counts)
        trial = state.copy()
        for count, unit in enumerate(group.units[state.available[group.units]][: len(counts)].tolist()):
            trial.remove(unit)
            np.testing.assert_allclose(state.cost - trial.cost, saved[count], rtol=1e-9)
            width = group.width - int(trial.group_kept[group.index])
            assert allowed[count] == (width <= 0.8 * group.width)


@pytest.mark.parametrize(
    "limits", [Limits(multiple_of=1), Limits(min_filters=3), Limits(max_cut=0.75)], ids=["1", "3", "cut"]
)
def test_no_axis_is_emptied(context: PruningContext, limits: Limits) -> None:
    state = PruningState(context, limits)
    everything = [g.width for g in context.structure.groups]  # even where a curve would sell it all
    with pytest.raises(BudgetError, match="cannot be reached") as error:
        spend(state, curves_of(context, most=everything), Budget(macs=1e-6))
    assert (state.kept[context.structure.limited_axes] >= limits.min_filters).all()
    for group in context.structure.groups:
        assert state.group_kept[group.index] >= max(1, np.floor(group.width * (1 - limits.max_cut)))
    assert error.value.args[0].startswith("the budget --macs 1e-06")


@pytest.mark.parametrize("limits", [Limits(keep=("*",)), Limits(max_cut=0.0), Limits(keep=("*",), only=("*",))])
def test_limits_that_leave_nothing_are_named(context: PruningContext, limits: Limits) -> None:
    listed = ", ".join(limits.given())
    with pytest.raises(BudgetError, match=f"nothing is left to prune with {re.escape(listed)};"):
        onnxcop.prune(context.model, limits=limits, criterion="l2", recover="none", options=CPU)


def test_the_nearest_budget_that_is_named_can_be_met(context: PruningContext) -> None:
    with pytest.raises(BudgetError, match="ask for --macs") as error:
        spend(PruningState(context, Limits(multiple_of=1)), curves_of(context), Budget(macs=1e-4))
    nearest = error.value.args[0].split("ask for --macs ")[1].split()[0]
    state = PruningState(context, Limits(multiple_of=1))
    spend(state, curves_of(context), Budget(macs=float(nearest)))
    assert state.meets(Budget(macs=float(nearest)))


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_widths_are_multiples(context: PruningContext, multiple: int) -> None:
    limits = Limits(multiple_of=multiple)
    state = PruningState(context, limits)
    units = spend(state, curves_of(context), Budget(macs=0.6))
    assert state.meets(Budget(macs=0.6))
    touched = np.unique(context.structure.group_of[units])
    assert (state.group_kept[touched] % multiple == 0).all()
    assert (state.group_kept[touched] > 0).all()


def test_free_units_are_removed_first(context: PruningContext) -> None:
    curves = curves_of(context)
    free = max(curves, key=lambda c: context.structure.groups[c.group].width)
    curves[curves.index(free)] = Curve(free.group, free.order, free.counts, np.zeros(len(free.counts)))
    units = spend(PruningState(context, Limits(multiple_of=1)), curves, Budget(filters=0.97))
    assert set(units.tolist()) <= set(free.order)


def chain_curves(context: PruningContext, values: Sequence[float], other: float) -> list[Curve]:
    """The wide group with given prices at 1, 2, … units, the narrow one at a price per unit."""
    narrow, wide = sorted(context.structure.groups, key=lambda g: g.width)
    return [
        Curve(narrow.index, tuple(narrow.units[:7].tolist()), np.arange(1, 8), other * np.arange(1.0, 8.0)),
        Curve(wide.index, tuple(wide.units[: len(values)].tolist()), np.arange(1, len(values) + 1), np.array(values)),
    ]


def test_a_flat_stretch_behind_a_bump_is_found() -> None:
    context = subject_of(onnxcop.analyze(chain(), options=CPU))
    wide = max(context.structure.groups, key=lambda g: g.width)
    bump = [1.0] + [1.001] * 14
    units = spend(PruningState(context, Limits(multiple_of=1)), chain_curves(context, bump, 0.6), Budget(macs=0.5))
    share = float(np.isin(units, wide.units).mean())
    assert share == 1.0  # the first unit is dear, but those behind it are almost free


def test_a_step_far_beyond_the_budget_is_worth_no_more_than_what_is_lacking() -> None:
    """One wide group for the price of two units of another, of which one is enough."""
    subject = subject_of(onnxcop.analyze(chain(widths=(64, 16)), options=CPU))
    wide, narrow = subject.structure.groups
    state = PruningState(subject, Limits(multiple_of=4))
    cheap = Curve(narrow.index, tuple(narrow.units[:12].tolist()), np.array([4, 12]), np.array([0.1, 0.6]))
    large = Curve(wide.index, tuple(wide.units[:60].tolist()), np.array([4, 60]), np.array([0.29, 0.3]))
    needed = state.copy()
    for unit in cheap.order[:4]:
        needed.remove(unit)
    units = spend(state, [large, cheap], Budget(macs=needed.level("macs")), 1.2)
    assert sorted(units.tolist()) == sorted(cheap.order[:4])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("multiple", [1, 4])
def test_exchanges_never_pay_more(context: PruningContext, timed: PruningContext, seed: int, multiple: int) -> None:
    """Within a budget of time the cheapest of several purchases wins; arithmetic is bought as before."""
    for subject, budget in ((timed, Budget(latency=0.8)), (context, Budget(macs=0.6))):
        curves, paid = curves_of(subject, seed), list[float]()
        for exchanges in (0, 4, 16):
            state = PruningState(subject, Limits(multiple_of=multiple))
            units = spend(state, curves, budget, exchanges=exchanges)
            assert state.meets(budget)
            assert set(units.tolist()) == set(state.removed)
            removed = np.bincount(subject.structure.group_of[units], minlength=len(curves))
            paid.append(sum(float(curve.price(removed[curve.group])) for curve in curves))
        assert paid == sorted(paid, reverse=True)
        assert len(set(paid)) == 1 or (multiple > 1 and subject is timed)


@pytest.mark.parametrize("reach", [1.0, 2.0])
def test_a_step_of_arithmetic_that_is_rounded_up_may_end_beyond_what_is_known(reach: float) -> None:
    subject = subject_of(onnxcop.analyze(chain(widths=(64, 16)), options=CPU))
    wide, _ = subject.structure.groups
    state = PruningState(subject, Limits(multiple_of=16))
    curve = Curve(wide.index, tuple(wide.units[:60].tolist()), np.array([9]), np.array([0.1]))
    units = spend(state, [curve], Budget(macs=0.9), reach)
    assert len(units) == 16


def test_earlier_selections_count() -> None:
    context = subject_of(onnxcop.analyze(chain(), options=CPU))
    wide = max(context.structure.groups, key=lambda g: g.width)
    state = PruningState(context, Limits(multiple_of=1))
    for unit in wide.units[-1:].tolist():
        state.remove(unit)
    before = list(state.removed)
    units = spend(state, chain_curves(context, [0.1] * 14, 1.0), Budget(macs=0.6))
    assert state.removed == before + units.tolist()
    assert spend(state, chain_curves(context, [0.1] * 14, 1.0), Budget(macs=0.6)).tolist() == []


def test_prices_between_and_beyond_points() -> None:
    curve = Curve(0, tuple(range(20)), np.array([2, 6]), np.array([0.4, 0.2]))
    assert curve.price(0) == 0
    assert curve.price(1) == pytest.approx(0.2)
    assert curve.price(4) == pytest.approx(0.4)  # a later point that is cheaper does not make it fall
    assert curve.price(12) > 2 * curve.price(6)  # errors add up faster than linearly
    longer = curve.with_point(4, 0.9)
    assert longer.counts.tolist() == [2, 4, 6]
    assert longer.price(4) == pytest.approx(0.9)


Truth = Callable[[int, float], float]


def selector(
    context: PruningContext, state: PruningState, budget: Budget, truth: Truth, sharper: int, asked: list[int]
) -> CurveSearch:
    """Measures a known truth: a price by group and share of its width; notes how much is measured."""

    def measure(requests: Mapping[int, int] | None, known: Mapping[int, Curve] | None) -> dict[int, Curve]:
        groups = {group.index: group for group in context.structure.groups}
        wanted = requests or {index: max(1, group.width // 20) for index, group in groups.items()}
        asked.append(len(wanted))
        curves = dict(known or {})
        for index, count in wanted.items():
            units = groups[index].units[:-1].tolist()
            curve = curves.get(index) or Curve(index, tuple(units), np.empty(0, np.int64), np.empty(0))
            curves[index] = curve.with_point(count, truth(index, count / groups[index].width))
        return curves

    return CurveSearch(measure, state, budget, context.structure.group_of, 6, sharper)


def test_selections_in_several_ways_share_what_is_measured(context: PruningContext) -> None:
    limits, asked = Limits(staircase=Staircase(4, 16), blocks=True), list[tuple[int, int]]()
    groups = {group.index: group for group in context.structure.groups}
    state = PruningState(context, limits)
    may_go = [index for index in groups if state.may_empty(index)]
    assert may_go

    def measure(requests: Mapping[int, int] | None, known: Mapping[int, Curve] | None) -> dict[int, Curve]:
        curves = dict(known or {})
        for index, count in (requests or dict.fromkeys(groups, 1)).items():
            asked.append((index, count))
            units, whole = groups[index].units.tolist(), 0.01 if index in may_go else None
            order = tuple(units if whole is not None else units[:-1])
            curve = curves.get(index) or Curve(index, order, np.empty(0, np.int64), np.empty(0), whole)
            curves[index] = curve.with_point(count, (count / groups[index].width) ** 1.5)
        return curves

    budget, group_of = Budget(macs=0.7), context.structure.group_of
    usual, wide, blocks = CurveSearch(measure, state, budget, group_of, 6, 4, several=True).alternatives()
    assert (usual.way, wide.way, blocks.way) == ("", "in wide steps", "with blocks")
    assert len(asked) == len(set(asked))
    assert not state.removed
    for choice in (usual, wide, blocks):
        assert choice.state.meets(budget)
        assert sorted(choice.state.removed) == sorted(choice.units.tolist())
        assert choice.state.ladder.rungs is state.ladder.rungs
    assert all(kept % 16 == 0 or kept == groups[index].width for index, kept in enumerate(wide.state.group_kept))
    assert any(kept % 16 and kept != groups[index].width for index, kept in enumerate(usual.state.group_kept))
    assert [index for index, kept in enumerate(blocks.state.group_kept) if not kept]
    assert (usual.state.group_kept > 0).all()
    (alone,) = CurveSearch(measure, state, budget, group_of, 6, 4).alternatives()
    assert alone.units.tolist() == blocks.units.tolist()


def true_price(context: PruningContext, units: np.ndarray, truth: Truth) -> float:
    groups, counts = np.unique(context.structure.group_of[units], return_counts=True)
    widths = [context.structure.groups[index].width for index in groups]
    return sum(truth(int(g), c / w) for g, c, w in zip(groups, counts, widths, strict=True))


@pytest.mark.parametrize("edge", [0.2, 0.3, 0.45])
def test_curves_are_measured_between_their_points(context: PruningContext, edge: float) -> None:
    def truth(group: int, share: float) -> float:  # free up to an edge of some groups, and dear behind it
        return 0.02 * share + (5.0 * max(0.0, share - edge) if group % 2 else share)

    prices = []
    for sharper in (0, 4):
        state, asked = PruningState(context, Limits(multiple_of=1)), list[int]()
        (choice,) = selector(context, state, Budget(macs=0.7), truth, sharper, asked).alternatives()
        state, units = choice.state, choice.units
        assert state.meets(Budget(macs=0.7))
        assert sorted(state.removed) == sorted(units.tolist())
        assert len(asked) <= 6 + sharper
        prices.append(true_price(context, units, truth))
    assert prices[1] < 0.95 * prices[0]


def test_between_points_of_flat_curves_nothing_is_measured(context: PruningContext) -> None:
    passes = []
    for sharper in (0, 4):
        asked = list[int]()
        selector(
            context,
            PruningState(context, Limits(multiple_of=1)),
            Budget(macs=0.7),
            lambda group, share: 0.0,
            sharper,
            asked,
        ).alternatives()
        passes.append(asked)
    assert passes[0] == passes[1]


def test_a_budget_out_of_reach_leaves_the_selection_as_it_was(context: PruningContext) -> None:
    state = PruningState(context, Limits(multiple_of=1))
    with pytest.raises(BudgetError):
        selector(context, state, Budget(macs=1e-4), lambda group, share: share, 4, []).alternatives()
    assert not state.removed
