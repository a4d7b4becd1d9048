"""Results are not slower than their originals: trials on simulated machines, and the messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain, shapes, written

import onnxcop
from onnxcop._base import cache
from onnxcop.cli import main as cli
from onnxcop.pipeline import finish, never_slower, prune, widths
from onnxcop.pipeline.decide import decide
from onnxcop.report.summary import Report
from onnxcop.runtime.latency import Latency, Measurement, Timing
from onnxcop.runtime.staircase import Staircase

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
WIDE = (64, 96)
RUN: dict[str, Any] = {"criterion": "l2", "recover": "none", "options": CPU, "latency_seconds": 0.1}
Seconds = Callable[[int, int], float]
"""How long a model with so many channels in its two convolutions takes."""


class Machine:
    """A machine on which the two widths alone determine the time of a model."""

    def __init__(self, seconds: Seconds, error: float = 0.001) -> None:
        self.seconds, self.error, self.lasted = seconds, error, list[float]()

    def of(self, model: onnx.ModelProto) -> float:
        found = shapes(model)
        return self.seconds(found["w1"][0], found["w2"][0])

    def timed(self, original: onnx.ModelProto, other: onnx.ModelProto, *rest: Any) -> Latency:
        self.lasted.append(rest[-1])
        before, after = self.of(original), self.of(other)
        timings = [Timing(value, value, value) for value in (before, after)]
        return Latency(*timings, ratio=after / before, error=self.error, turns=9, provider="made up")

    def measure(self, models: Sequence[onnx.ModelProto], *_: Any, **__: Any) -> Measurement:
        return Measurement(np.array([[self.of(model) for model in models]] * 9), "made up")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Machine]:
    """Puts a machine in place of this one."""

    def put(seconds: Seconds, error: float = 0.001, fine: int = 16) -> Machine:
        machine = Machine(seconds, error)
        monkeypatch.setenv(cache.FOLDER, str(tmp_path))
        monkeypatch.setattr(widths, "staircase_of", lambda _: Staircase(fine, 16))
        monkeypatch.setattr(finish, "timed", machine.timed)
        monkeypatch.setattr(never_slower, "measure_times", machine.measure)
        return machine

    return put


def arithmetic(one: int, two: int) -> float:
    return (27 * one + 9 * one * two) / (27 * WIDE[0] + 9 * WIDE[0] * WIDE[1])


def first_is_dear(one: int, two: int) -> float:
    """It takes half as long again as the original as soon as the first layer loses anything."""
    return arithmetic(one, two) + (1.5 if one < WIDE[0] else 0.0)


def any_cut_is_dear(one: int, two: int) -> float:
    return 1.0 if (one, two) == WIDE else 1.2


def deep_cuts_are_dear(one: int, two: int) -> float:
    left = arithmetic(one, two)
    return left if left > 0.7 else 1.1


def kept(report: Report) -> float:
    return report.after.macs / report.before.macs


def test_a_group_that_costs_time_to_cut_stays_whole_and_others_give_more(on: Any) -> None:
    on(first_is_dear)
    result = onnxcop.prune(chain(widths=WIDE), macs=0.6, **RUN)
    found = shapes(result.model)
    assert found["w1"][0] == WIDE[0]
    assert found["w2"][0] < WIDE[1]
    assert kept(result.report) <= 0.6
    assert result.plan.budget == {"macs": 0.6}
    assert result.report.latency is not None
    assert result.report.latency.ratio < 0.7
    assert result.report.choices[-1] == "widths: 1 group stays whole, as cutting costs time there: conv1"
    assert not any("slower" in line for line in result.report.warnings)


def test_if_no_cut_is_faster_the_model_is_unchanged(on: Any, tmp_path: Path, capsys: Any) -> None:
    on(any_cut_is_dear)
    path, out = written(chain(widths=WIDE), tmp_path / "net.onnx"), tmp_path / "small.onnx"
    command = [str(path), "-o", str(out), "--provider", "cpu", "--threads", "1", "--recover", "none", "-q"]
    for budget in ([], ["--macs", "0.5"]):
        assert cli.run([*command, *budget]) == 0
        said = capsys.readouterr().err
        assert said.count("no cut is faster than the original on this machine") == 1
        assert "120 ±0% of its time" in said
        assert "within the budget already" not in said
        assert shapes(onnx.load(out)) == shapes(onnx.load(path))


def test_points_of_a_curve_are_not_slower_either(on: Any) -> None:
    on(deep_cuts_are_dear)
    budgets = (0.9, 0.6)
    points = list(onnxcop.sweep(chain(widths=WIDE), budgets, **RUN))
    for point, macs in zip(points, budgets, strict=True):
        alone = onnxcop.prune(chain(widths=WIDE), macs=macs, **RUN)
        assert point.result.model == alone.model
        assert point.result.report.warnings == alone.report.warnings
        assert point.result.report.latency is not None
        assert point.result.report.latency.ratio < 1
    assert any("makes a model slower" in line for line in points[1].result.report.warnings)


def test_if_a_deep_cut_costs_time_less_is_cut_with_a_warning(on: Any, caplog: pytest.LogCaptureFixture) -> None:
    on(deep_cuts_are_dear)
    for asked, wanted in ({"macs": 0.6}, "--macs 0.6"), ({}, "the default budget"):
        result = onnxcop.prune(chain(widths=WIDE), **asked, **RUN)
        (line,) = [line for line in result.report.warnings if "slower" in line]
        share = kept(result.report)
        assert line.startswith(f"{wanted} makes a model slower than the original")
        assert f"{share:.0%} of the multiply-accumulates are kept instead" in line
        assert line in caplog.messages
        assert 0.7 < share <= result.plan.budget["macs"] <= 0.9
        assert result.report.latency is not None
        assert result.report.latency.ratio < 1


@pytest.mark.parametrize("bound", [{"params": 0.6}, {"filters": 0.7}, {"params": 0.6, "macs": 0.8}])
def test_bounds_on_anything_but_arithmetic_hold_and_the_run_says_what_it_could_not_have(
    on: Any, bound: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    on(any_cut_is_dear)
    result = onnxcop.prune(chain(widths=WIDE), **bound, **RUN)
    report, name = result.report, next(iter(bound))
    held = {"params": report.after.params / report.before.params, "filters": sum(g.kept for g in report.groups) / 160}
    assert held[name] <= bound[name]
    (line,) = [line for line in report.warnings if "slower" in line]
    assert line.startswith(f"--{name} {bound[name]:g} and a model no slower than the original are not both possible")
    assert [message for message in caplog.messages if "slower" in message].count(line) == 1


def test_undecided_is_not_slower(on: Any) -> None:
    machine = on(lambda one, two: 1.0 if (one, two) == WIDE else 1.02, error=0.02)
    result = onnxcop.prune(chain(widths=WIDE), macs=0.6, **RUN)
    assert kept(result.report) <= 0.6
    assert machine.lasted == [0.1]
    assert any("undecided" in line for line in result.report.choices)


def test_a_cut_that_may_save_no_time_is_made_in_whole_blocks(on: Any) -> None:
    def in_blocks(one: int, two: int) -> float:
        return arithmetic(-(-one // 16) * 16, -(-two // 16) * 16)

    model = chain(widths=(32, 40))
    original = in_blocks(32, 40)
    on(lambda one, two: in_blocks(one, two) / original, error=0.004, fine=4)
    result = onnxcop.prune(model, macs=0.9, **RUN)
    assert result.report.latency is not None
    assert result.report.latency.ratio < 0.9
    assert any(line == "widths: multiples of 16, as finer ones saved next to no time" for line in result.report.choices)
    params = onnxcop.prune(model, params=0.9, **RUN)  # stands for no time
    assert params.report.latency is not None
    assert params.report.latency.undecided


def test_a_result_that_may_save_no_time_is_timed_for_longer_before_whole_blocks_are_tried(on: Any) -> None:
    machine = on(arithmetic, fine=4)
    one, answers = Timing(1.0, 1.0, 1.0), iter([0.005, 0.001])

    def timed(*asked: Any) -> Latency:
        machine.lasted.append(asked[-1])
        return Latency(one, one, 0.985, next(answers), 9, "made up")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "timed", timed)
        result = onnxcop.prune(chain(widths=(32, 40)), macs=0.9, **RUN)
    assert machine.lasted == [0.1, pytest.approx(0.2)]
    assert result.report.latency is not None
    assert result.report.latency.error == 0.001


def test_a_trial_that_is_not_kept_counts_among_the_seconds(on: Any, monkeypatch: Any) -> None:
    def slow(request: Any, *, again: bool = False) -> Any:
        if again:
            with request.clock.stage("selection"):
                time.sleep(0.3)
        return decide(request, again=again)

    monkeypatch.setattr(never_slower, "decide", slow)
    monkeypatch.setattr(never_slower, "_worse", lambda *_: True)
    on(lambda one, two: -(-one // 16) + -(-two // 16), error=0.004, fine=4)
    result = onnxcop.prune(chain(widths=(32, 40)), macs=0.9, **RUN)
    assert result.report.latency is not None
    assert result.report.latency.undecided
    assert result.report.seconds["selection"] > 0.3


def test_time_is_not_saved_at_the_cost_of_accuracy(on: Any) -> None:
    on(arithmetic)
    result = onnxcop.prune(chain(widths=WIDE), macs=0.6, **RUN)
    near, less_near, far = (
        replace(result, report=replace(result.report, held_out={"divergence": value})) for value in (0.1, 0.12, 0.13)
    )
    assert not never_slower._worse(less_near, near)
    assert never_slower._worse(far, near)
    assert not never_slower._worse(far, result)  # nothing was held out


def test_what_seems_slower_is_measured_for_longer_before_it_is_believed(on: Any, monkeypatch: Any) -> None:
    machine = on(arithmetic)
    one = Timing(1.0, 1.0, 1.0)
    monkeypatch.setattr(never_slower, "_promising", lambda _: True)
    answers = iter([Latency(one, one, 1.3, 0.01, 9, "made up")])
    monkeypatch.setattr(finish, "timed", lambda *asked: next(answers, None) or machine.timed(*asked))
    result = onnxcop.prune(chain(widths=WIDE), macs=0.6, **RUN)
    assert machine.lasted == [pytest.approx(0.2)]
    assert result.report.latency is not None
    assert result.report.latency.ratio <= 0.6
    assert not any("slower" in line for line in result.report.warnings)


def test_widths_that_the_user_gives_are_taken_whatever_they_cost(on: Any) -> None:
    on(any_cut_is_dear)
    result = onnxcop.prune(chain(widths=WIDE), macs=0.6, limits=onnxcop.Limits(multiple_of=1), **RUN)
    assert kept(result.report) <= 0.6
    assert any("slower than the original on this machine (120.0%" in line for line in result.report.warnings)


@pytest.mark.parametrize("macs", [0.99, 0.9, 0.7, 0.5])
@pytest.mark.parametrize("recover", ["none", "merge"])
def test_no_width_leaves_the_fast_kernels(macs: float, recover: str) -> None:
    limits = onnxcop.Limits(staircase=Staircase(4, 16))
    analysis_widths = (64, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "staircase_of", lambda _: Staircase(4, 16))
        result = onnxcop.prune(chain(widths=analysis_widths), macs=macs, recover=recover, limits=limits, options=CPU)
    assert any(group.kept < group.width for group in result.report.groups)
    assert [group.kept % 4 for group in result.report.groups] == [0, 0]


@pytest.mark.parametrize(("side", "own"), [(8, True), (20, False)])
def test_runs_are_timed_with_a_sample_of_the_data_if_it_has_the_size_of_the_analysis(
    side: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fed = chain(widths=WIDE), list[np.ndarray[Any, Any]]()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"

    def watch(original: onnx.ModelProto, other: onnx.ModelProto, feed: Callable[[], Any], *_: Any) -> None:
        fed.append(feed()["x"])

    monkeypatch.setattr(finish, "timed", watch)
    data = np.random.default_rng(1).random((20, 3, side, side), np.float32)
    shape = (1, 3, 8, 8)
    analysis = onnxcop.analyze(model, input_shapes={"x": shape}, options=CPU)
    monkeypatch.setattr(prune, "analyze_kept", lambda *_, **__: analysis)
    onnxcop.prune(model, macs=0.6, data={"x": data}, **RUN)
    assert [feed.shape for feed in fed] == [shape]
    assert own == any(np.array_equal(fed[0][0], sample) for sample in data)
