"""Sweeps: one budget after another, what they share, and the files that grow with them."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain, written

import onnxcop
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import PruningState
from onnxcop.allocation.limits import Limits
from onnxcop.cli import main as cli
from onnxcop.cli.console_study import curve_line
from onnxcop.errors import BudgetError, ModelError
from onnxcop.pipeline.incremental import IncrementalPruner, budgets_between
from onnxcop.pipeline.sweep import Record, as_csv, sweep
from onnxcop.recovery.rounds import Recovery
from onnxcop.report.plot import check_plot, plot_curve

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
QUIET = ["--provider", "cpu", "--threads", "1", "--recover", "none", "--latency-seconds", "0"]


def samples(count: int = 40) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def statistics_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever recovery looks at the network."""
    taken: list[int] = []
    original = Recovery.statistics

    def counted(self: Recovery) -> Any:
        taken.append(1)
        return original(self)

    monkeypatch.setattr(Recovery, "statistics", counted)
    return taken


@pytest.mark.parametrize("recover", ["none", "full"])
def test_by_a_criterion_each_point_is_what_a_run_makes(recover: str, statistics_taken: list[int]) -> None:
    settings: dict[str, Any] = {"criterion": "wanda", "recover": recover, "data": samples(), "options": CPU}
    points = list(sweep(chain(), [0.6, 0.9, 0.75], **settings))
    assert len(statistics_taken) == (recover == "full")
    assert [point.macs for point in points] == [0.9, 0.75, 0.6]
    for point in points:
        alone = onnxcop.prune(chain(), macs=point.macs, cross_fit=False, **settings)
        assert point.result.model == alone.model
        assert point.result.plan == alone.plan
        assert point.result.report.quality == alone.report.quality


def test_by_measurement_each_point_continues_the_one_before(statistics_taken: list[int]) -> None:
    points = list(sweep(chain(), [0.9, 0.8, 0.7], data=samples(), options=CPU, limits=Limits(multiple_of=1)))
    assert len(statistics_taken) == 3
    cuts = [{(cut.tensor, index) for cut in point.result.plan.cuts for index in cut.indices} for point in points]
    assert cuts[0] < cuts[1] < cuts[2]
    for point in points:
        row = point.row()
        assert row["macs_kept"] == point.result.report.after.macs / point.result.report.before.macs <= point.macs
        assert row["divergence"] == point.result.report.quality["divergence"] > 0
        assert point.result.report.verification is not None


def test_other_budgets_hold_at_every_point() -> None:
    points = list(sweep(chain(), [0.9, 0.8], params=0.5, recover="none", options=CPU))
    assert all(float(point.row()["params_kept"] or 1) <= 0.5 for point in points)


def test_the_curve_ends_if_a_budget_cannot_be_met(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"recover": "none", "options": CPU, "limits": Limits(max_cut=0.5)}
    with caplog.at_level(logging.WARNING, "onnxcop"):
        points = list(sweep(chain(), [0.8, 0.05, 0.01], **settings))
    assert [point.macs for point in points] == [0.8]
    assert "the curve ends here: the budget --macs 0.05 cannot be reached" in caplog.text
    with pytest.raises(BudgetError, match=r"0\.05"):
        list(sweep(chain(), [0.05], **settings))
    with pytest.raises(BudgetError, match="needs budgets"):
        list(sweep(chain(), []))


def test_steps_lead_from_the_current_state_to_the_budget() -> None:
    analysis = onnxcop.analyze(chain(), options=CPU)
    state = PruningState(onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost), Limits())
    first, second = budgets_between(state, Budget(macs=0.5, size=3000), rounds=2)
    assert first.macs == pytest.approx(0.5**0.5)
    now, share = state.level("size", 1.0), state.in_shares(Budget(size=3000)).size
    assert share is not None and 0.3 < share < 0.8
    assert first.size == pytest.approx((now * share) ** 0.5)  # bytes are a share of the original's on the way
    assert second == Budget(macs=0.5, size=3000)
    state.remove(0)
    assert budgets_between(state, Budget(macs=0.99)) == []
    now = state.level("macs")
    assert budgets_between(state, Budget(macs=0.5), rounds=2)[0].macs == pytest.approx((now * 0.5) ** 0.5)
    assert budgets_between(state, Budget(size=3000), rounds=1) == [Budget(size=3000)]


# Files


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_command_writes_a_table_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = written(chain(), tmp_path / "net.onnx"), tmp_path / "models"
    command = ["sweep", str(path), "--macs", "0.7,90%", "--save-models", str(folder), *QUIET]
    assert cli.run(command) == 0
    first, *shown = capsys.readouterr().out.splitlines()
    assert first.startswith("widths: multiples of")
    assert shown[0].split() == ["budget", "MACs", "params", "file"]
    assert [line.split()[0] for line in shown[1:4]] == ["1", "0.9", "0.7"]
    assert shown[4] == f"wrote {tmp_path / 'net.sweep.csv'}, {folder}"
    rows = rows_of(tmp_path / "net.sweep.csv")
    assert [row["budget"] for row in rows] == ["1.0", "0.9", "0.7"]
    assert rows[0]["file"] == str(path)
    for row in rows[1:]:
        model = onnx.load(row["file"])
        onnx.checker.check_model(model, full_check=True)
        assert int(row["bytes"]) == model.ByteSize()
    assert cli.run([*command, "--json", "-o", str(tmp_path / "other.csv")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["table"] == str(tmp_path / "other.csv")
    assert [point["budget"] for point in found["points"]] == [1.0, 0.9, 0.7]


def test_points_that_are_done_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(chain(), tmp_path / "net.onnx")
    original = IncrementalPruner.decide

    def interrupted(self: IncrementalPruner, budget: Budget, clock: Any) -> Any:
        if budget.macs == 0.7:
            raise KeyboardInterrupt
        return original(self, budget, clock)

    monkeypatch.setattr(IncrementalPruner, "decide", interrupted)
    assert cli.run(["sweep", str(path), "--macs", "0.9,0.8,0.7", *QUIET]) == 130
    assert "no file is partly written" in capsys.readouterr().err
    assert [row["budget"] for row in rows_of(tmp_path / "net.sweep.csv")] == ["1.0", "0.9", "0.8"]


def test_the_latency_and_the_metric_are_in_the_table(tmp_path: Path) -> None:
    def weight_count(model: onnx.ModelProto) -> float:
        return float(sum(np.prod(tensor.dims) for tensor in model.graph.initializer))

    point = next(
        sweep(chain(), [0.8], metric=weight_count, recover="none", options=CPU, latency_seconds=0.01)
    )  # fmt: skip
    record = Record(tmp_path / "net.onnx", tmp_path / "out.csv")
    record.add(point)
    first, second = rows_of(tmp_path / "out.csv")
    assert float(first["weight_count"]) == weight_count(chain())
    assert float(second["weight_count"]) == weight_count(point.result.model) < float(first["weight_count"])
    latency = point.result.report.latency
    assert latency is not None
    assert float(first["latency_ms"]) == pytest.approx(1e3 * latency.before.median)
    assert float(second["latency_kept"]) == latency.ratio
    low, high = (float(second[f"latency_kept_{end}"]) for end in ("low", "high"))
    assert (low, high) == pytest.approx(latency.interval)


def test_the_time_of_a_slower_point_is_red() -> None:
    slower: Any = {"budget": 0.7, "latency_kept": 1.2, "latency_kept_low": 1.1, "latency_kept_high": 1.3}
    assert "\x1b[31m" in (line := curve_line(slower, slower))
    assert "120.0% ±10%" in line and "undecided" not in line
    open_one = curve_line(slower | {"latency_kept_low": 0.98, "latency_kept_high": 1.42}, slower)
    assert "120.0% ±22% undecided" in open_one and "\x1b" not in open_one
    assert "±" not in curve_line(slower | {"latency_kept_low": 1.2, "latency_kept_high": 1.2}, slower)


def test_csv_leaves_unknown_cells_empty() -> None:
    assert as_csv([{"a": 1, "b": None}, {"a": 0.5, "b": 2, "c": "x,y"}]) == b'a,b,c\n1,,\n0.5,2,"x,y"\n'


def test_targets_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, table = written(chain(), tmp_path / "net.onnx"), tmp_path / "out.csv"
    with pytest.raises(ModelError, match="input model itself"):
        Record(net, net)
    with pytest.raises(ModelError, match=r"must end in \.svg"):
        Record(net, table, tmp_path / "curve.gif")
    with pytest.raises(ModelError, match="cannot be created"):
        Record(net, table, None, net / "models")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'onnxcop\[plot\]'"):
        check_plot(tmp_path / "curve.svg")


def test_the_plot_is_drawn_and_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path, plot = written(chain(), tmp_path / "net.onnx"), tmp_path / "curve.svg"
    data = tmp_path / "x.npz"
    np.savez(data, x=samples())
    command = ["sweep", str(path), "--macs", "0.9,0.7", "--data", str(data), "--plot", str(plot), "-q", *QUIET[:4]]
    assert cli.run([*command, "--latency-seconds", "0", "--criterion", "l2"]) == 0
    assert plot.read_bytes().startswith(b"<?xml")
    rows: Any = [{"budget": 1.0, "macs_kept": 1.0, "divergence": 0.0}, {"budget": 0.5, "macs_kept": 0.5}]
    assert plot_curve(rows, "net", ".svg") == plot_curve(rows, "net", ".svg")
    assert plot_curve(rows, "net", ".png").startswith(b"\x89PNG")
    timed = [row | {"latency_kept": time} for row, time in zip(rows, (1.0, 0.6), strict=True)]
    assert b"<!-- time kept -->" in plot_curve(timed, "net", ".svg")
    assert b"<!-- time kept -->" not in plot_curve(rows, "net", ".svg")
    elsewhere = [row | {"latency_expected": time} for row, time in zip(rows, (1.0, 0.6), strict=True)]
    assert b"<!-- time (expected) kept -->" in plot_curve(elsewhere, "net", ".svg")
