"""`--distill` from the command line and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import CPU
from small_models import chain, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.runtime.session import EngineOptions, Session


def test_a_run_with_distillation_says_what_it_gave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = written(chain(), tmp_path / "net.onnx"), tmp_path / "small.onnx"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32))
    arguments = [str(model), "-o", str(out), "--data", str(tmp_path / "x.npy"), *CPU, "--latency-seconds", "0"]
    assert cli.run([*arguments, "--macs", "0.6", "--distill", "3 epochs"]) == 0
    assert "distillation" in capsys.readouterr().err
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_distillation_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="give --data"):
        onnxcop.prune(chain(), distill="5m")
    with pytest.raises(CalibrationError, match="not a training length"):
        onnxcop.prune(chain(), distill="soon", data=np.zeros((16, 3, 8, 8), np.float32))
    with pytest.raises(CalibrationError, match="give --distill"):
        onnxcop.prune(chain(), checkpoint=tmp_path / "state.npz")
    old = chain()
    old.opset_import[0].version = 9
    for node in old.graph.node:
        node.op_type = node.op_type.replace("Relu", "ThresholdedRelu")  # ONNX cannot convert it from opset 9
    with pytest.raises(ModelError, match="cannot be raised from opset 9"):
        onnxcop.prune(old, distill="1 epochs", data=tmp_path / "nowhere.npz")


def test_the_figures_are_those_of_the_distilled_file() -> None:
    values = np.random.default_rng(0).standard_normal((400, 3, 8, 8)).astype(np.float32)
    scored: list[float] = []

    def outputs(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
        with Session(model, EngineOptions("cpu", 1)) as session:
            return np.concatenate([array.ravel() for array in session.run({"x": values}).values()])

    def score(model: onnx.ModelProto) -> float:
        scored.append(-float(np.square(outputs(model) - outputs(chain())).mean()))
        return scored[-1]

    result = onnxcop.prune(
        chain(), macs=0.5, data=values, samples=256, criterion="l1", recover="none", distill="8 epochs", metric=score,
        latency_seconds=0,
    )  # fmt: skip
    assert "distillation: held-out divergence" in result.report.choices[-1]
    assert result.report.quality["score after"] == scored[-1] > scored[-2]
    figures = result.report.figures
    assert figures is not None and figures.divergence.value == result.report.quality["divergence"]
    closed = onnxcop.apply_plan(chain(), result.plan, data=values, samples=256, latency_seconds=0)
    assert closed.report.measured_on == result.report.measured_on
    assert closed.report.quality["divergence"] != result.report.quality["divergence"]


def test_ctrl_c_before_the_first_step_keeps_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcop.pipeline.distillation.distill", stopped)
    values = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    settings: dict[str, Any] = {"macs": 0.5, "data": values, "criterion": "l1", "cross_fit": False}
    result = onnxcop.prune(chain(), distill="8 epochs", **settings)
    assert result.report.choices[-1].startswith("distillation was stopped before its first step")
    assert result.model.graph == onnxcop.prune(chain(), distill="none", **settings).model.graph


def test_what_lowers_the_metric_is_not_kept() -> None:
    values = np.random.default_rng(0).standard_normal((400, 3, 8, 8)).astype(np.float32)
    scores = iter(range(100, 0, -1))
    result = onnxcop.prune(
        chain(), macs=0.5, data=values, samples=256, criterion="l1", recover="none", distill="8 epochs",
        metric=lambda model: next(scores), latency_seconds=0,
    )  # fmt: skip
    assert "distillation lowers the metric" in result.report.choices[-1]
    assert result.report.quality["<lambda> after"] == 99


def test_many_samples_are_distilled_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((128, 3, 8, 8)).astype(np.float32)
    monkeypatch.setattr("onnxcop.pipeline.distillation._ENOUGH", 90)

    def choices(**settings: Any) -> str:
        result = onnxcop.prune(chain(), macs=0.6, data=values, cross_fit=False, latency_seconds=0, **settings)
        return "; ".join(result.report.choices)

    assert "distillation" in choices()
    assert "distillation" not in choices(recover="full")
    assert "distillation" not in choices(distill="none")
