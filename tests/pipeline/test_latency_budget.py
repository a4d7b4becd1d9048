"""Budgets of time, on a simulated machine whose models take as long as a function of their widths says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain, shapes, times_in_blocks, written

import onnxcop
from onnxcop._base import cache
from onnxcop.allocation.limits import Limits
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError, EngineError
from onnxcop.pipeline import finish as conclusion
from onnxcop.pipeline import timing, widths
from onnxcop.runtime import time_table
from onnxcop.runtime.latency import Latency, Measurement, Timing
from onnxcop.runtime.staircase import Staircase

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
BARE: dict[str, Any] = {"recover": "none", "options": CPU}
WIDE = (64, 96)


class Machine:
    """A machine that computes channels in blocks: seconds by the padded widths of the two convolutions.

    Whole models that are timed before anything is recovered may be given another speed than results.
    """

    def __init__(self, block: int = 1, fixed: float = 0.0, real: float = 1.0) -> None:
        self.block, self.fixed, self.real, self.timed_models = block, fixed, real, 0

    def padded(self, width: int) -> float:
        return float(np.ceil(width / self.block) * self.block)

    def seconds(self, model: onnx.ModelProto) -> float:
        found = shapes(model)
        one, two = (self.padded(found[name][0]) for name in ("w1", "w2"))
        whole = 27 * WIDE[0] + 9 * WIDE[0] * WIDE[1]
        return float(self.fixed + (1 - self.fixed) * (27 * one + 9 * one * two) / whole)

    def kernel_times(self, model: bytes, *_: Any) -> dict[int, float]:
        return times_in_blocks(model, self.padded)

    def measure(self, models: Sequence[onnx.ModelProto], *_: Any, **__: Any) -> Measurement:
        return Measurement(np.array([[self.seconds(model) for model in models]] * 3), "made up")

    def timed(self, original: onnx.ModelProto, other: onnx.ModelProto, *_: Any) -> Latency:
        self.timed_models += 1
        before, after = self.seconds(original), self.seconds(other) ** self.real
        return Latency(Timing(before, before, before), Timing(after, after, after), after / before, 0.0, 3, "made up")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a machine in place of this one."""

    def put(machine: Machine) -> Machine:
        monkeypatch.setenv(cache.FOLDER, str(tmp_path / f"cache{id(machine)}"))
        monkeypatch.setattr(timing, "measure_times", machine.measure)
        monkeypatch.setattr(time_table, "kernel_times", machine.kernel_times)
        monkeypatch.setattr(widths, "staircase_of", lambda _: Staircase(min(4, machine.block), max(4, machine.block)))
        monkeypatch.setattr(conclusion, "timed", machine.timed)
        return machine

    return put


def samples() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((40, 3, 8, 8)).astype(np.float32)


def ratio_of(result: onnxcop.PruneResult) -> float:
    assert result.report.latency is not None
    return result.report.latency.ratio


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("bound", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("fixed", [0.0, 0.2])
def test_the_bound_holds_and_little_more_is_cut(on: Any, bound: float, block: int, fixed: float) -> None:
    on(Machine(block=block, fixed=fixed))
    result = onnxcop.prune(chain(widths=WIDE), latency=bound, **BARE)
    least_step = block / min(WIDE)
    assert bound - 0.03 - least_step <= ratio_of(result) <= bound
    assert result.plan.budget == {"latency": bound}


def test_if_estimates_are_right_one_result_is_enough(on: Any) -> None:
    machine = on(Machine(fixed=0.3))
    onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)
    assert machine.timed_models == 1


def test_a_result_that_is_slower_than_its_cut_is_made_again(on: Any) -> None:
    machine = on(Machine(real=0.9))
    assert 0.5 < ratio_of(onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)) <= 0.6
    assert 2 <= machine.timed_models <= 3


def test_with_data_time_is_spent_over_curves(on: Any) -> None:
    on(Machine(block=8, fixed=0.1))
    result = onnxcop.prune(chain(widths=WIDE), latency=0.6, data=samples(), options=CPU)
    assert 0.45 <= ratio_of(result) <= 0.6


def test_the_same_decision_is_taken_again(on: Any) -> None:
    on(Machine(block=8, fixed=0.1))
    first, second = (onnxcop.prune(chain(widths=WIDE), latency=0.7, **BARE).plan.cuts for _ in range(2))
    assert first == second


def test_what_was_timed_is_not_timed_again(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on(Machine(block=8))
    first = onnxcop.prune(chain(widths=WIDE), latency=0.7, **BARE)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was timed again")

    monkeypatch.setattr(timing, "measure_times", fail)
    monkeypatch.setattr(time_table, "kernel_times", fail)
    assert onnxcop.prune(chain(widths=WIDE), latency=0.7, **BARE).model == first.model


@pytest.mark.parametrize("data", [None, samples()], ids=["weights", "data"])
def test_the_error_names_the_bound_that_was_asked_for(on: Any, data: Any) -> None:
    """Not the one of the first round, which is looser."""
    on(Machine(block=8, fixed=0.6))
    with pytest.raises(BudgetError, match=r"--latency 0\.05 cannot be reached: .* ask for --latency 0\.[67]"):
        onnxcop.prune(chain(widths=WIDE), latency=0.05, data=data, options=CPU)


def test_widths_are_those_of_the_blocks(on: Any) -> None:
    on(Machine(block=16))
    result = onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)
    assert [shapes(result.model)[name][0] % 8 for name in ("w1", "w2")] == [0, 0]
    (choice,) = result.report.choices
    assert choice.startswith("widths: multiples of 16")
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


def test_results_that_never_get_there_end_in_an_error(on: Any) -> None:
    on(Machine(real=0.01))
    with pytest.raises(BudgetError, match=r"--latency 0\.6 cannot be reached: .* takes 9\d\.\d% of the time"):
        onnxcop.prune(chain(widths=WIDE), latency=0.6, **BARE)


@pytest.mark.parametrize("bound", [0.0, -0.5, 1.5])
def test_bounds_are_fractions(bound: float) -> None:
    with pytest.raises(BudgetError, match="--latency is a fraction"):
        onnxcop.prune(chain(), latency=bound, **BARE)


def test_a_model_that_cannot_be_timed_is_an_error(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on(Machine(block=4))

    def fail(*_: Any, **__: Any) -> Mapping[str, Any]:
        raise EngineError("it does not run")

    monkeypatch.setattr(timing, "measure_times", fail)
    with pytest.raises(EngineError, match="does not run"):
        onnxcop.prune(chain(widths=WIDE), latency=0.5, **BARE)


def test_the_command_line(on: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on(Machine(block=4))
    path = written(chain(widths=WIDE), tmp_path / "net.onnx")
    command = [str(path), "--latency", "60%", "--provider", "cpu", "--recover", "none"]
    assert cli.run([*command, "--json", "--plan-out", str(tmp_path / "plan.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latency"]["ratio"] <= 0.6
    assert json.loads((tmp_path / "plan.json").read_text())["budget"] == {"latency": 0.6}
    assert cli.run(["sweep", str(path), "--latency", "0.5"]) == 2
