"""The table of resources: a budget, an option and a message for every entry, and one that is looked up in a table."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from small_models import chain

import onnxcop
from onnxcop import Budget, Limits
from onnxcop._base.types import FloatArray, IntArray
from onnxcop.allocation import resources
from onnxcop.allocation.greedy import PruningState, choose
from onnxcop.allocation.resources import RESOURCES, Resource
from onnxcop.analysis.timing import time_model
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError
from onnxcop.runtime.staircase import Staircase
from onnxcop.runtime.time_table import TimeTable

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def context_of(model: Any) -> onnxcop.PruningContext:
    analysis = onnxcop.analyze(model, options=CPU)
    table = TimeTable.here(CPU)
    cost = replace(analysis.cost, times=time_model(analysis, table, Staircase(4, 16), CPU))
    return onnxcop.PruningContext.of(analysis.model, analysis.structure, cost)


def test_every_resource_is_a_bound_an_option_and_a_keyword(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for entry in RESOURCES:
        assert f"{entry.flag} " in shown
        assert entry.help in shown
        budget = Budget(**{entry.name: "10kB" if entry.absolute else "50%"})
        assert getattr(budget, entry.name) == (10_000 if entry.absolute else 0.5)
        assert pickle.loads(pickle.dumps(budget)) == budget
        assert hash(pickle.loads(pickle.dumps(budget))) == hash(budget)
    assert Budget().empty
    assert Budget(macs=None) == Budget()
    with pytest.raises(BudgetError, match="unknown budget 'mac'"):
        Budget(mac=0.7)
    with pytest.raises(AttributeError, match="no bound 'mac'"):
        _ = Budget().mac
    with pytest.raises(FrozenInstanceError):
        Budget().macs = 0.5


@pytest.mark.parametrize("entry", RESOURCES, ids=lambda entry: entry.name)
def test_savings_are_what_a_selection_uses_less(entry: Resource) -> None:
    context = context_of(chain())
    state = PruningState(context, Limits())
    for group in context.structure.groups:
        counts = np.arange(1, 4)
        saved = entry.meter.saving(state, group.index, counts)
        trial, before = state.copy(), entry.meter.used(state)
        for count, unit in enumerate(group.units[:3].tolist()):
            trial.remove(unit)
            np.testing.assert_allclose(before - entry.meter.used(trial), saved[count], rtol=1e-9)


class Table:
    """Times of one layer by its kept width, as a machine measured them: whole blocks of four cost the same."""

    def used(self, state: PruningState) -> float:
        return float(sum(self._time(int(kept)) for kept in state.group_kept))

    def total(self, state: PruningState) -> float:
        return float(sum(self._time(group.width) for group in state.structure.groups))

    def saving(self, state: PruningState, group: int, counts: IntArray) -> FloatArray:
        kept = int(state.group_kept[group])
        return np.array([self._time(kept) - self._time(kept - int(count)) for count in counts])

    def _time(self, width: int) -> float:
        return 0.1 * -(-width // 4)


def test_a_resource_may_be_a_table_that_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "RESOURCES", (*RESOURCES, Resource("blocks", "time in blocks of four", Table())))
    context = context_of(chain())
    ranking = onnxcop.criterion_named("l2").rank(context)
    found = choose(context, ranking, Budget(blocks=0.6))
    state = PruningState(context, Limits())
    for unit in found.removed.tolist():
        state.remove(unit)
    assert state.level("blocks") <= 0.6
    state.restore(int(found.removed[-1]))
    assert state.level("blocks") > 0.6
    with pytest.raises(BudgetError, match=r"--blocks 0\.01 cannot be reached: .* ask for --blocks"):
        choose(context, onnxcop.criterion_named("l2").rank(context), Budget(blocks=0.01))
    result = onnxcop.prune(chain(), budgets={"blocks": "60%"}, data=None, allocate="cop", recover="none", options=CPU)
    assert result.plan.budget == {"blocks": 0.6}


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_exhausted_network_has_nothing_more_to_give(multiple: int) -> None:
    context = context_of(chain())
    state = PruningState(context, Limits(multiple_of=multiple))
    state.exhaust()
    for group in context.structure.groups:
        counts = state.group_kept[group.index] - state.ladder.rungs[group.index]
        counts = counts[(counts > 0) & (counts < state.group_kept[group.index])]
        assert not state.may_remove(group.index, counts).any()
    assert all(state.level(name, 1.0) < 1 for name in ("macs", "params", "filters", "size"))


def test_a_size_may_be_a_share() -> None:
    model = chain()
    whole = len(model.SerializeToString())
    assert Budget(size="50%").bounds == {"size": 0.5} == Budget(size=0.5).bounds
    assert Budget(size="50%").shares == {"size": 0.5} and Budget(size=1000).shares == {}
    result = onnxcop.prune(model, size="60%", criterion="l2", recover="none", options=CPU)
    assert 0.4 * whole < len(result.model.SerializeToString()) <= 0.6 * whole
    assert result.plan.budget == {"size": 0.6}
    state = PruningState(context_of(model), Limits())
    assert state.in_shares(Budget(size=whole // 2, macs=0.7)).size == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("bounds", "asked"), [({"size": 100}, "--size 100"), ({"size": "1%"}, "--size 0.01")])
def test_what_cannot_be_reached_is_refused_before_data_are_read(bounds: dict[str, Any], asked: str) -> None:
    def never() -> Any:
        raise AssertionError("the data were read")

    with pytest.raises(BudgetError, match=f"the budget {asked} cannot be reached") as caught:
        onnxcop.prune(chain(), data=never, options=CPU, **bounds)
    assert caught.value.nearest is not None
    again = onnxcop.prune(chain(), size=caught.value.nearest, criterion="l2", recover="none", options=CPU)
    assert again.report.after.bytes < again.report.before.bytes
