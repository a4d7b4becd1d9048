"""Self-distillation: it improves or keeps the model, ends gracefully, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import chain, disturbed

from onnxcop._base.progress import Progress, silent
from onnxcop.data.open import CalibrationData, open_source
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.distill import Distilled, DistillOptions, distill
from onnxcop.training.schedule import Effort, Schedule
from onnxcop.training.step import initializers_of
from onnxcop.training.trainer import StepResult, Trainer

ENGINE = EngineOptions("cpu", 1)


def samples(count: int = 96) -> CalibrationData:
    """Random images of the small model."""
    values = np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)
    with Session(chain(), ENGINE) as session:
        return open_source({"x": values}, session.inputs, samples=count, batch_size=16)


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {name: numpy_helper.to_array(tensor) for name, tensor in initializers_of(model).items()}


def distilled(progress: Progress = silent, **settings: Any) -> Distilled:
    options = DistillOptions(
        **{"effort": Effort(epochs=6), "rate": 3e-3, "batch_size": 16, "engine": ENGINE} | settings
    )
    return distill(disturbed(), chain(), samples(), options, progress)


def test_the_student_improves_and_keeps_its_form() -> None:
    found = distilled()
    assert found.kept and found.after.value < 0.5 * found.before.value
    assert found.steps == 6 * (72 // 16) and found.rate == 3e-3
    assert "held-out divergence" in str(found) and not found.stops
    student = disturbed()
    onnx.checker.check_model(found.model, full_check=True)
    assert [node.op_type for node in found.model.graph.node] == [node.op_type for node in student.graph.node]
    assert {n: a.shape for n, a in weights(found.model).items()} == {n: a.shape for n, a in weights(student).items()}


def edges(rising: float, falling: float) -> onnx.ModelProto:
    """Edges of grey images [N, 1, 16, 16], from left to right: by how much they rise, and by how much they fall."""
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N, 1, 16, 16] x) => (float[N, 2, 16, 15] y) { e = Conv(x, w) y = Relu(e) }"""
    model = onnx.parser.parse_model(text)
    kernels = np.array([[-1, 1], [1, -1]], np.float32) * np.array([[rising], [falling]], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(kernels.reshape(2, 1, 1, 2), "w"))
    return model


def test_parts_of_very_different_magnitude_are_learned_alike() -> None:
    values = np.random.default_rng(0).random((48, 1, 16, 16), np.float32)
    with Session(edges(200, 1), ENGINE) as session:
        source = open_source({"x": values}, session.inputs, samples=48, batch_size=16)
    options = DistillOptions(effort=Effort(epochs=20), rate=1e-2, batch_size=8, engine=ENGINE)
    found = distill(edges(200, 1.2), edges(200, 1), source, options)
    assert found.kept and found.after.value < 0.5 * found.before.value
    assert weights(found.model)["w"][1, 0, 0, 0] == pytest.approx(1.0, abs=0.1)  # the part that is small


def test_what_came_no_nearer_is_left_as_it_was() -> None:
    found = distilled(rate=30.0)
    assert not found.kept and found.after == found.before
    assert found.model.SerializeToString() == disturbed().SerializeToString()
    assert "the result in closed form is kept" in str(found)


def test_a_rate_is_found_by_trials() -> None:
    found = distilled(rate=None, effort=Effort(epochs=10))
    assert found.kept and found.rate in (1e-3, 3e-4, 1e-4, 3e-5)


class _Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.training.loop._SAVED_EVERY", 0.0)

    def kill(stage: str, done: int, total: int) -> None:
        if done == 9:
            raise _Killed

    whole = distilled()
    path = tmp_path / "run.npz"
    with pytest.raises(_Killed):
        distilled(kill, checkpoint=path)
    began: list[int] = []
    resumed = distilled(lambda stage, done, total: began.append(done), checkpoint=path)
    assert began[0] == 9  # the step after the eighth, which was the last that was kept
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    with pytest.raises(CalibrationError, match="checkpoint of another run"):
        distilled(checkpoint=path, seed=1)
    path.write_bytes(b"PK")
    with pytest.raises(CalibrationError, match="not a checkpoint, or is damaged"):
        distilled(checkpoint=path)


def test_ctrl_c_keeps_the_best_so_far() -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    found = distilled(stop)
    assert found.interrupted and found.steps == 15
    assert found.kept and found.after.value < found.before.value


def test_ctrl_c_in_a_trial_of_rates_ends_training_too() -> None:
    stages: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if done == 3:
            raise KeyboardInterrupt

    found = distilled(stop, rate=None, effort=Effort(epochs=10))
    assert found.interrupted and found.steps == 3 and found.rate == 1e-3
    assert set(stages) == {"trial at 0.001"}
    assert not found.kept or found.after.value < found.before.value


def test_a_rate_at_which_the_loss_is_infinite_is_left_for_a_lower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(self: Trainer, loss: float, gradient: Any, rate: float) -> StepResult:
        return StepResult(float("nan"), 1.0) if rate > 5e-5 else update(self, loss, gradient, rate)

    def whole(self: Trainer, feeds: Any, rate: float) -> StepResult:
        return StepResult(float("nan"), 1.0) if rate > 5e-5 else step(self, feeds, rate)

    update, step = Trainer.update, Trainer.step
    monkeypatch.setattr(Trainer, "update", fragile)
    monkeypatch.setattr(Trainer, "step", whole)
    found = distilled(rate=None, effort=Effort(epochs=10))
    assert found.rate == 3e-5 and found.steps > 0
    with pytest.raises(ModelError, match=r"look at the batch \(samples .*\), or leave --distill out"):
        distilled(rate=1.0)


def test_time_settles_the_number_of_steps() -> None:
    found = distilled(effort=Effort(seconds=1.0))
    assert found.steps >= 1 and found.seconds < 20


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 8 samples"):
        distill(disturbed(), chain(), samples(4), DistillOptions(engine=ENGINE))


@pytest.mark.parametrize(
    ("text", "effort"),
    [("5m", Effort(seconds=300)), ("90 s", Effort(seconds=90)), ("0.5h", Effort(seconds=1800)),
     ("20 epochs", Effort(epochs=20)), ("1 epoch", Effort(epochs=1)), ("auto", Effort(epochs=20))],
)  # fmt: skip
def test_efforts_are_read(text: str, effort: Effort) -> None:
    assert Effort.of(text) == effort


@pytest.mark.parametrize("text", ["", "5", "-3m", "0 epochs", "five minutes"])
def test_other_efforts_are_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match="not a training length"):
        Effort.of(text)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    schedule = Schedule(1.0, 100)
    rates = [schedule.at(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 1e-3
