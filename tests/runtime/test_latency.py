"""Latency: turns, ratios, spread, and their display. No test depends on real times."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import chain, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import EngineError
from onnxcop.pipeline import finish as conclusion
from onnxcop.report.summary import slowness
from onnxcop.runtime import latency
from onnxcop.runtime.latency import Latency, Measurement, Timing, measure_times
from onnxcop.runtime.session import Session
from onnxcop.runtime.turns import take_turns

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
FEEDS = {"x": np.zeros((1, 3, 8, 8), np.float32)}


class Machine:
    """A machine whose speed changes, on which a model takes a given number of seconds at full speed."""

    def __init__(self, costs: Sequence[float], slowness: Iterator[float]) -> None:
        self.now, self.costs, self.slowness, self.runs = 0.0, costs, slowness, list[int]()

    def clock(self) -> float:
        return self.now

    def sessions(self) -> list[Any]:
        return [self._session(number) for number in range(len(self.costs))]

    def _session(self, number: int) -> Any:
        machine = self

        def run() -> None:
            machine.runs.append(number)
            machine.now += machine.costs[number] * next(machine.slowness)

        return run


def drift() -> Iterator[float]:
    """Three times as slow after a while, and again as fast, over and over."""
    step = 0
    while True:
        yield 2.0 + np.sin(step / 25)
        step += 1


def test_models_take_turns_in_both_orders() -> None:
    machine = Machine((0.01, 0.02, 0.03), iter(lambda: 1.0, 0.0))
    found = take_turns(machine.sessions(), 0.18, machine.clock)
    assert machine.runs[:6] == [0, 0, 1, 1, 2, 2]  # to warm up
    first, second, third = (machine.runs[start : start + 3] for start in (6, 9, 12))
    assert sorted(first) == sorted(third) == [0, 1, 2]
    assert second == first[::-1]
    assert len(machine.runs) == 15
    np.testing.assert_allclose(found, [(0.01, 0.02, 0.03)] * 3, rtol=1e-6)


def test_the_ratio_is_robust_to_changes_of_speed() -> None:
    machine = Machine((0.010, 0.006), drift())
    found = Measurement(take_turns(machine.sessions(), 3.0, machine.clock), "CPU").latency(1)
    assert found.ratio == pytest.approx(0.6, rel=0.02)
    assert found.error < 0.02
    spread = (found.before.high - found.before.low) / found.before.median
    assert spread > 10 * found.error
    assert found.before.low <= found.before.median <= found.before.high


def test_short_runs_are_repeated_within_a_turn() -> None:
    machine = Machine((1e-4, 5e-4), iter(lambda: 1.0, 0.0))
    found = take_turns(machine.sessions(), 0.004, machine.clock)
    change_basis = machine.runs[4:]
    assert 20 <= change_basis.count(0) < 40
    assert 4 <= change_basis.count(1) < 8
    assert sum(one != two for one, two in itertools.pairwise(change_basis)) == 1
    np.testing.assert_allclose(found, [(1e-4, 5e-4)], rtol=1e-6)


def test_measuring_ends_when_the_ratio_is_known_or_time_is_up() -> None:
    steady = Machine((0.01, 0.005), iter(lambda: 1.0, 0.0))
    assert len(take_turns(steady.sessions(), 10.0, steady.clock)) == pytest.approx(2.5 / 0.015, abs=1.5)
    slow = Machine((100.0, 50.0), iter(lambda: 1.0, 0.0))
    assert len(take_turns(slow.sessions(), 2.0, slow.clock)) == 1


def test_real_models_are_measured() -> None:
    found = measure_times([chain(), chain(widths=(4, 4))], FEEDS, CPU, seconds=0.05)
    assert found.provider == "CPUExecutionProvider"
    assert found.seconds.shape[1] == 2
    assert (found.seconds > 0).all()
    itself = found.latency(0)
    assert (itself.ratio, itself.error, itself.before) == (1.0, 0.0, itself.after)


def test_models_that_load_quickly_are_loaded_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load has its own ratio here: the spread between loads counts, and not that within them."""
    of_loads = (0.9, 1.0, 0.8, 0.9, 0.9, 1.0, 0.8, 0.9)
    ratios = iter(of_loads)

    def turns(runs: Sequence[Any], seconds: float, clock: Any, enough: float) -> Any:
        assert seconds == pytest.approx(2.0 / 8)
        return np.array([(0.01, 0.01 * next(ratios))] * 50)

    monkeypatch.setattr(latency, "take_turns", turns)
    found = measure_times([chain(), chain(widths=(4, 4))], FEEDS, CPU, seconds=2.0).latency(1)
    assert found.turns == 400
    assert found.ratio == pytest.approx(0.9)
    assert found.error == pytest.approx(np.std(of_loads) / 8**0.5, rel=0.5)
    monkeypatch.setattr(latency, "_LOADING", 0.0)
    monkeypatch.setattr(latency, "take_turns", lambda *_: np.array([(0.01, 0.009)]))
    assert measure_times([chain()] * 2, FEEDS, CPU, seconds=2.0).latency(1).turns == 1


def test_on_a_device_no_tensor_is_copied_while_a_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own memory stands for the device."""
    monkeypatch.setattr(latency, "device_of", lambda options: "cpu")
    monkeypatch.setattr(Session, "run", None)
    assert (measure_times([chain(), chain(widths=(4, 4))], FEEDS, CPU, seconds=0.05).seconds > 0).all()
    with pytest.raises(EngineError, match="could not be run"):
        measure_times([chain()], {"x": np.zeros((1, 5, 8, 8), np.float32)}, CPU, seconds=0.01)


def test_what_cannot_be_on_a_device_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "device_of", lambda options: "abacus")
    assert (measure_times([chain(), chain(widths=(4, 4))], FEEDS, CPU, seconds=0.05).seconds > 0).all()


@pytest.mark.parametrize(("cpu", "cuda", "chosen"), [(1e-3, 2e-3, "cpu"), (2e-3, 1e-3, "auto")])
def test_auto_is_the_cpu_for_models_that_are_quicker_there(
    monkeypatch: pytest.MonkeyPatch, cpu: float, cuda: float, chosen: str
) -> None:
    def measured(models: Any, feeds: Any, options: onnxcop.EngineOptions, **_: Any) -> Measurement:
        return Measurement(np.array([[cpu if options.provider == "cpu" else cuda]]), "made up")

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(latency, "resolve_provider", lambda name: both if name == "auto" else both[1:])
    monkeypatch.setattr(latency, "measure_times", measured)
    choose = latency.on_quicker_provider
    assert choose(chain(), {"x": (1, 3, 8, 8)}, onnxcop.EngineOptions()).provider == chosen
    assert choose(chain(), {"x": (1, 3, 8, 8)}, onnxcop.EngineOptions(provider="cuda")).provider == "cuda"

    def fail(*_: Any, **__: Any) -> Measurement:
        raise EngineError("no memory")

    monkeypatch.setattr(latency, "measure_times", fail)
    assert choose(chain(), {"x": (1, 3, 8, 8)}, onnxcop.EngineOptions()).provider == "auto"


def test_auto_without_a_device_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure_times", None)
    monkeypatch.setattr(latency, "resolve_provider", lambda name: ["CPUExecutionProvider"])
    assert latency.on_quicker_provider(chain(), {}, onnxcop.EngineOptions()) == onnxcop.EngineOptions()


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(EngineError):
        measure_times([chain()], {"x": np.zeros((1, 5, 8, 8), np.float32)}, CPU, seconds=0.01)


@pytest.mark.parametrize(
    ("timing", "text"),
    [
        (Timing(0.00312, 0.0030, 0.0032), "3.12 ms ±0.10"),
        (Timing(0.0224, 0.0220, 0.0230), "22.4 ms ±0.5"),
        (Timing(0.4, 0.38, 0.42), "400 ms ±20"),
        (Timing(2.0, 1.9, 2.1), "2.00 s ±0.10"),
        (Timing(0.0000345, 0.0000340, 0.0000350), "34.5 µs ±0.5"),
    ],
)
def test_timings_are_written_with_their_spread(timing: Timing, text: str) -> None:
    assert str(timing) == text


def beside(ratio: float, error: float) -> Latency:
    one = Timing(1.0, 0.9, 1.1)
    return Latency(one, one, ratio, error, 9, "CPU")


def test_only_a_certain_slowdown_is_called_one() -> None:
    assert slowness(None) == slowness(beside(0.9, 0.01)) == slowness(beside(1.03, 0.02)) == ()
    (line,) = slowness(beside(1.2, 0.02))
    assert "slower" in line
    assert "120.0%" in line


def test_the_report_holds_the_latency() -> None:
    result = onnxcop.prune(chain(), macs=0.7, recover="none", options=CPU, latency_seconds=0.02)
    found = json.loads(json.dumps(result.report.to_dict()))["latency"]
    assert found["before"]["median"] > 0
    assert found["after"]["median"] > 0
    assert found["turns"] >= 1
    assert onnxcop.prune(chain(), macs=0.7, recover="none", options=CPU).report.latency is None


def test_the_table_shows_the_latency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def timed(*arguments: Any) -> Latency:
        asked.append(arguments[-1])
        return Latency(Timing(0.003, 0.0029, 0.0031), Timing(0.004, 0.0039, 0.0041), 1.334, 0.01, 50, "CPU")

    monkeypatch.setattr(conclusion, "timed", timed)
    path = written(chain(), tmp_path / "net.onnx")
    command = [str(path), "--provider", "cpu", "--threads", "1", "--recover", "none", "--multiple-of", "1"]
    assert cli.run([*command, "--latency-seconds", "0.5"]) == 0
    shown = capsys.readouterr()
    for text in ("latency", "3.00 ms ±0.10", "4.00 ms ±0.10", "133 ±2%"):
        assert text in shown.out
    assert "slower than the original" in shown.err
    assert cli.run([*command, "--latency-seconds", "0"]) == 0
    assert "latency" not in capsys.readouterr().out
    assert asked == [0.5]
