"""Budgets of time, on a made-up machine whose models take as long as a function of their widths says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain, shapes, written

import onnxcop
from onnxcop.allocation.budget import Limits
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError, EngineError
from onnxcop.pipeline import finish as conclusion
from onnxcop.pipeline import latency_target as latency_budget
from onnxcop.pipeline.latency_target import TimeCurve
from onnxcop.runtime.latency import Latency, Measurement, Timing

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
BARE: dict[str, Any] = {"recover": "none", "options": CPU}
WIDE = (64, 96)


class Machine:
    """A machine that computes channels in blocks: seconds by the padded widths of the two convolutions.

    Rough cuts, which are timed together, may be given another speed than results, which are timed one by one.
    """

    def __init__(self, block: int = 1, fixed: float = 0.0, real: float = 1.0) -> None:
        self.block, self.fixed, self.real, self.timed_models = block, fixed, real, 0

    def seconds(self, model: onnx.ModelProto) -> float:
        found = shapes(model)
        one, two = (np.ceil(found[name][0] / self.block) * self.block for name in ("w1", "w2"))
        whole = 27 * WIDE[0] + 9 * WIDE[0] * WIDE[1]
        return float(self.fixed + (1 - self.fixed) * (27 * one + 9 * one * two) / whole)

    def measure(self, models: Sequence[onnx.ModelProto], *_: Any, **__: Any) -> Measurement:
        return Measurement(np.array([[self.seconds(model) for model in models]] * 3), "made up")

    def timed(self, original: onnx.ModelProto, other: onnx.ModelProto, *_: Any) -> Latency:
        self.timed_models += 1
        before, after = self.seconds(original), self.seconds(other) ** self.real
        return Latency(Timing(before, before, before), Timing(after, after, after), after / before, 0.0, 3, "made up")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a machine in place of this one."""

    def put(machine: Machine) -> Machine:
        monkeypatch.setattr(latency_budget, "measure", machine.measure)
        for module in (conclusion, latency_budget):
            monkeypatch.setattr(module, "timed", machine.timed)
        return machine

    return put


def samples() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((40, 3, 8, 8)).astype(np.float32)


def ratio_of(result: onnxcop.PruneResult) -> float:
    assert result.report.latency is not None
    return result.report.latency.ratio


@pytest.mark.parametrize(("bound", "real"), [(0.9, 1.0), (0.6, 0.7), (0.6, 1.4), (0.3, 1.4)])
def test_the_bound_holds_and_little_more_is_cut(on: Any, bound: float, real: float) -> None:
    on(Machine(real=real))
    result = onnxcop.prune(chain(widths=WIDE), latency=bound, **BARE)
    assert 0.8 * bound <= ratio_of(result) <= bound
    assert result.plan.budget == {"latency": bound}


def test_where_rough_cuts_tell_the_truth_one_real_cut_is_enough(on: Any) -> None:
    machine = on(Machine())
    onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)
    assert machine.timed_models == 1


@pytest.mark.parametrize("real", [1.0, 0.6])
def test_with_data_the_way_leads_from_cut_to_cut(on: Any, real: float) -> None:
    machine = on(Machine(real=real))
    result = onnxcop.prune(chain(widths=WIDE), latency=0.6, data=samples(), options=CPU)
    assert 0.6 * 0.75 <= ratio_of(result) <= 0.6
    assert machine.timed_models <= 8
    macs = [point.macs for point in result.evidence.way] if result.evidence else []
    assert macs == sorted(macs, reverse=True)


def test_widths_are_those_that_keep_the_most(on: Any) -> None:
    on(Machine(block=16))
    result = onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)
    assert [shapes(result.model)[name][0] % 16 for name in ("w1", "w2")] == [0, 0]
    (choice,) = result.report.choices
    assert choice.startswith("widths: multiples of 16, by measurement")
    fixed = onnxcop.prune(chain(widths=WIDE), latency=0.6, limits=Limits(multiple_of=32), **BARE)
    assert [shapes(fixed.model)[name][0] % 32 for name in ("w1", "w2")] == [0, 0]
    assert fixed.report.choices == ()


def test_other_budgets_hold_as_well(on: Any) -> None:
    on(Machine())
    result = onnxcop.prune(chain(widths=WIDE), latency=0.9, params=0.5, **BARE)
    assert result.report.after.params <= 0.5 * result.report.before.params
    assert ratio_of(result) <= 0.9
    result = onnxcop.prune(chain(widths=WIDE), latency=0.9, macs=0.4, **BARE)
    assert result.report.after.macs <= 0.4 * result.report.before.macs
    measured: dict[str, Any] = {"data": samples(), "options": CPU, "limits": Limits(multiple_of=4)}
    assert ratio_of(onnxcop.prune(chain(widths=WIDE), latency=0.8, divergence=10.0, **measured)) <= 0.8
    with pytest.raises(BudgetError, match=r"--latency 0\.7 and --divergence 1e-09 cannot both hold"):
        onnxcop.prune(chain(widths=WIDE), latency=0.7, divergence=1e-9, **measured)


def test_another_budget_that_cannot_be_met_is_named(on: Any) -> None:
    on(Machine())
    with pytest.raises(BudgetError, match="--params 1e-06 cannot be reached"):
        onnxcop.prune(chain(widths=WIDE), latency=0.5, params=1e-6, **BARE)


def test_a_drop_of_the_metric_that_is_too_large_is_said(on: Any) -> None:
    on(Machine())

    def size(model: onnx.ModelProto) -> float:
        return float(model.ByteSize())

    with pytest.raises(BudgetError, match=r"--max-drop 5 cannot both hold: .* size has fallen"):
        onnxcop.prune(
            chain(widths=WIDE), latency=0.8, metric=size, max_drop=5.0, data=samples(), options=CPU,
            limits=Limits(multiple_of=4),
        )  # fmt: skip


@pytest.mark.parametrize("limits", [Limits(), Limits(multiple_of=8)])
def test_a_time_that_cannot_be_reached_names_one_that_can(on: Any, limits: Limits) -> None:
    on(Machine(fixed=0.5))
    with pytest.raises(BudgetError, match=r"--latency 0\.3 cannot be reached") as caught:
        onnxcop.prune(chain(widths=WIDE), latency=0.3, limits=limits, **BARE)
    nearest = caught.value.nearest
    assert nearest is not None
    assert 0.5 < nearest < 0.6
    assert ratio_of(onnxcop.prune(chain(widths=WIDE), latency=nearest + 0.05, limits=limits, **BARE)) <= nearest + 0.05


def test_real_cuts_that_never_get_there_end_in_an_error(on: Any) -> None:
    on(Machine(real=0.01))
    with pytest.raises(BudgetError, match=r"--latency 0\.6 cannot be reached: .* takes 9\d% of the time"):
        onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)


def test_curves_do_not_fall_where_less_work_takes_longer() -> None:
    curve = TimeCurve.of(np.array([1.0, 0.5, 0.8, 0.2]), np.array([1.0, 0.9, 0.7, 0.3]))
    np.testing.assert_array_equal(curve.ratios, [0.3, 0.9, 0.9, 1.0])
    assert curve.ratio(0.2) == 0.3
    assert curve.ratio(curve.fraction(0.6)) == pytest.approx(0.6)
    assert 0.2 < curve.fraction(0.6) < 0.5


@pytest.mark.parametrize("bound", [0.0, -0.5, 1.5])
def test_bounds_are_fractions(bound: float) -> None:
    with pytest.raises(BudgetError, match="--latency is a fraction"):
        onnxcop.prune(chain(), latency=bound, **BARE)


def test_a_model_that_cannot_be_timed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Mapping[str, Any]:
        raise EngineError("it does not run")

    monkeypatch.setattr(latency_budget, "measure", fail)
    with pytest.raises(EngineError, match="does not run"):
        onnxcop.prune(chain(), latency=0.5, **BARE)


def test_the_command_line(on: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on(Machine(block=4))
    path = written(chain(widths=WIDE), tmp_path / "net.onnx")
    command = [str(path), "--latency", "60%", "--provider", "cpu", "--recover", "none"]
    assert cli.run([*command, "--json", "--plan-out", str(tmp_path / "plan.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latency"]["ratio"] <= 0.6
    assert json.loads((tmp_path / "plan.json").read_text())["budget"] == {"latency": 0.6}
    assert cli.run(["sweep", str(path), "--latency", "0.5"]) == 2
