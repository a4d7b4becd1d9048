"""Preferences between savings when measured curves are spent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnxcop
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.sensitivity import Curve
from onnxcop.allocation.spend import spend
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.cop import Cop
from onnxcop.criteria.preference import NAMED, Preference
from onnxcop.errors import BudgetError
from onnxcop.pipeline.options import Modes, PruneOptions
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
BUDGETS = [Budget(macs=0.6), Budget(params=0.6), Budget(size=250_000), Budget(filters=0.7)]


@pytest.fixture(scope="module")
def context(models_dir: Path) -> PruningContext:
    analysis = onnxcop.analyze(models_dir / "digits_resnet.onnx", options=CPU)
    return PruningContext.of(analysis.model, analysis.structure, analysis.cost)


def curves_of(context: PruningContext, seed: int) -> list[Curve]:
    """Every share of a group at the price of its square, times a factor that is drawn."""
    rng = np.random.default_rng(seed)
    found = []
    for group in context.structure.groups:
        counts = np.unique(np.linspace(1, group.width - 1, 8).astype(np.int64))
        values = rng.uniform(0.5, 2.0) * (counts / group.width) ** 2
        found.append(Curve(group.index, tuple(rng.permutation(group.units)[:-1].tolist()), counts, values))
    return found


def kept(context: PruningContext, budget: Budget, prefer: str | None, seed: int = 0) -> dict[str, float]:
    state = PruningState(context, Limits(multiple_of=1), None if prefer is None else Preference.of(prefer))
    spend(state, curves_of(context, seed), budget)
    assert state.meets(budget)
    return {name: state.level(name) for name in ("macs", "params", "filters", "size")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_what_is_preferred_is_saved(context: PruningContext, budget: Budget, seed: int) -> None:
    faster, smaller = (kept(context, budget, prefer, seed) for prefer in ("faster", "smaller"))
    neither = kept(context, budget, None, seed)
    assert faster["macs"] <= min(neither["macs"], smaller["macs"]) + 0.005
    assert smaller["params"] <= min(neither["params"], faster["params"]) + 0.005
    if budget.macs is None:  # a bound that both just meet
        assert faster["macs"] < smaller["macs"] - 0.01
    if budget.params is budget.size is None:
        assert smaller["params"] < faster["params"] - 0.01


def test_a_preference_for_what_is_bounded_changes_nothing(context: PruningContext) -> None:
    for budget, prefer in ((Budget(macs=0.5), "faster"), (Budget(params=0.5), "smaller")):
        assert kept(context, budget, prefer) == kept(context, budget, None)


def test_no_weight_is_no_preference(context: PruningContext) -> None:
    assert kept(context, Budget(macs=0.5), "0,0") == kept(context, Budget(macs=0.5), None)


@pytest.mark.parametrize("prefer", NAMED)
def test_nothing_is_removed_beyond_the_budget(context: PruningContext, prefer: str) -> None:
    budget = Budget(params=0.6)
    state = PruningState(context, Limits(multiple_of=1), Preference.of(prefer))
    units = spend(state, curves_of(context, 0), budget)
    state.restore(int(units[-1]))
    assert not state.meets(budget)


def test_shares_of_a_mix() -> None:
    totals = {"macs": 100.0, "params": 10.0, "size": 40.0}
    mixed = Preference(3.0, 1.0).mixed({"macs": 0.0, "params": 5.0, "size": 0.0}, totals)
    shares = [mixed[name] * total for name, total in totals.items()]
    np.testing.assert_allclose(shares, [0.6, 0.2 + 0.2, 0.0])  # four fifths by preference, the rest by the budget


@pytest.mark.parametrize("value", ["cheaper", "1", "1,2,3", "-1,0", "nan,0", (1.0,), 3])
def test_what_is_no_preference(value: object) -> None:
    with pytest.raises(BudgetError, match="--prefer"):
        Preference.of(value)  # type: ignore[arg-type]


# Whole runs


@pytest.fixture(scope="module")
def runs(models_dir: Path) -> dict[str | None, onnxcop.PruneResult]:
    """The digits model at 60 % of its arithmetic, with and without a preference."""
    return {
        prefer: onnxcop.prune(
            models_dir / "digits_resnet.onnx", macs=0.6, data=models_dir / "digits_calib.npz", samples=120,
            prefer=prefer, settings=RecoverySettings(rounds=1, refine=0), options=CPU,
        )
        for prefer in (None, "smaller")
    }  # fmt: skip


def test_a_preference_leaves_the_default_method_as_it_is(runs: dict[str | None, onnxcop.PruneResult]) -> None:
    plain, smaller = runs[None], runs["smaller"]
    assert plain.plan.settings["allocate"] == smaller.plan.settings["allocate"] == "measured"
    assert smaller.plan.settings["prefer"] == {"beta": 0.0, "gamma": 3.0}
    assert "prefer" not in plain.plan.settings
    assert smaller.report.after.params < 0.95 * plain.report.after.params
    assert smaller.report.quality["divergence"] < 2 * plain.report.quality["divergence"] + 1e-4


def test_a_preference_applies_to_some_modes() -> None:
    """To measured allocation and COP; a criterion of one's own keeps its numbers."""
    cop = Modes.of(PruneOptions(prefer="faster", recover="none"))
    assert (cop.allocate, cop.criterion) == ("cop", Cop(beta=3.0, gamma=0.0))
    own = Modes.of(PruneOptions(prefer="faster", recover="none", criterion=Cop(beta=0.5)))
    assert own.criterion == Cop(beta=0.5)
    measured = Modes.of(PruneOptions(prefer=(1, 2), criterion="l2", allocate="measured"))
    assert measured.preference == Preference(1.0, 2.0)
    with pytest.raises(BudgetError, match="--prefer applies to measured allocation and the cop criteria, not to l2"):
        Modes.of(PruneOptions(prefer="faster", criterion="l2"))
