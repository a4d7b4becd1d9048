"""`onnxcop finetune`: it learns labels, from the command line and from Python, and refuses what does not fit."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import CPU
from small_models import brightest_channels, chain, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.samples import SampleSet

ENGINE = EngineOptions("cpu", 1)


def task(count: int = 160) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images whose brightest channel is their class."""
    return brightest_channels(count, 8, seed=0)


def of_side(side: int) -> onnx.ModelProto:
    """The network for images of another size."""
    model = chain()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = side
    return model


def trained(**settings: Any) -> Any:
    images, labels = task()
    usual = {"labels": labels, "epochs": 6, "rate": 1e-2, "batch_size": 16, "engine": ENGINE}
    return onnxcop.finetune(chain(), {"x": images}, **usual | settings)


def test_classes_are_learned() -> None:
    found = trained(augment=True)
    assert found.before < 0.6 and found.after > 0.9
    assert [entry["step"] for entry in found.history] == [9, 18, 27, 36, 45, 54]
    onnx.checker.check_model(found.model, full_check=True)


def test_samples_may_be_in_a_file_and_are_read_in_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(augment=True, epochs=2)
    stores, threads = [], set()
    read = SampleSet.batch

    def recorded(samples: SampleSet, *given: Any) -> Any:
        stores.append(samples.arrays["x"])
        threads.add(threading.current_thread().name)
        return read(samples, *given)

    monkeypatch.setattr("onnxcop.training.samples.MOST_BYTES", 1000)
    monkeypatch.setattr(SampleSet, "batch", recorded)
    again = trained(augment=True, epochs=2)
    assert all(isinstance(array, np.memmap) for array in stores)
    assert any(name.startswith("onnxcop-batches") for name in threads)
    assert again.model.SerializeToString() == first.model.SerializeToString()


def test_a_teacher_helps_and_regression_is_learned() -> None:
    first = trained()
    assert trained(teacher=first.model).after > 0.8
    targets = np.tile(task()[1][:, None], (1, 5)).astype(np.float32)
    found = trained(labels=targets)
    assert found.after > 0.5 * found.before and found.before < 0


def test_a_loss_may_be_a_model() -> None:
    loss = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,5] y, int64[N] wanted) => (float loss)'
        " { loss = SoftmaxCrossEntropyLoss(y, wanted) }"
    )
    assert trained(loss=loss).after > -0.6
    own = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,5] y, float[N,5] wanted) => (float loss)'
        "<float[5] importance = {1, 2, 3, 4, 5}>"  # which must not be trained
        " { d = Sub(y, wanted) a = Abs(d) b = Mul(a, importance) loss = ReduceMean<keepdims=0>(b) }"
    )
    targets = np.tile(task()[1][:, None], (1, 5)).astype(np.float32)
    found = trained(labels=targets, loss=own)
    assert found.before < found.after < 0
    vector = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,5] y, float[N,5] wanted) => (float[N,5] loss)'
        " { loss = Sub(y, wanted) }"
    )
    with pytest.raises(ModelError, match="reduce it to one floating-point number"):
        trained(labels=targets, loss=vector)
    one = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,5] y, float[N,5] wanted) => (float[1] loss)'
        "<int64[1] all = {-1}>"
        " { d = Sub(y, wanted) a = Abs(d) f = Reshape(a, all) loss = ReduceMean(f) }"
    )
    found = trained(labels=targets, loss=one)
    assert found.before < found.after < 0


@pytest.mark.parametrize("augment", [False, True])
def test_a_teacher_counts_beside_a_loss_of_ones_own(augment: bool) -> None:
    own = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N,5] y, int64[N] wanted) => (float loss)'
        "<float nothing = {0}> { l = SoftmaxCrossEntropyLoss(y, wanted) loss = Mul(l, nothing) }"
    )
    images, _ = task()

    teacher = trained().model

    def near(model: onnx.ModelProto) -> float:
        found = []
        for one in (model, teacher):
            with Session(one, ENGINE) as session:
                found.append(session.run({"x": images})["y"])
        return -float(np.square(found[0] - found[1]).mean())

    taught = trained(teacher=teacher, loss=own, augment=augment, metric=near)
    assert 0 > taught.after > 0.5 * taught.before
    with pytest.raises(CalibrationError, match="the teacher has no output 'y' of the shape"):
        trained(teacher=chain(classes=4), loss=own)


def test_targets_of_other_types_are_learned() -> None:
    targets = np.tile(task()[1][:, None], (1, 5))
    found = trained(labels=targets, loss="mse")
    assert found.before < found.after < 0
    assert found.after == pytest.approx(trained(labels=targets.astype(np.float32), loss="mse").after, rel=1e-3)


def test_a_classifier_in_half_precision_is_trained() -> None:
    images, labels = task()
    usual: dict[str, Any] = {"epochs": 6, "rate": 1e-2, "batch_size": 16, "engine": ENGINE}
    found = onnxcop.finetune(chain(np.float16), {"x": images.astype(np.float16)}, labels=labels, **usual)
    assert found.after > 0.9
    assert found.model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def in_pairs(images: Any, labels: Any) -> Any:
    yield from (({"x": images[i : i + 16]}, labels[i : i + 16]) for i in range(0, len(images), 16))


def in_tuples(images: Any, labels: Any) -> Any:
    yield from zip(images, labels, strict=True)


def in_dicts(images: Any, labels: Any) -> Any:
    yield from ({"x": image, "label": label} for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("stream", [in_pairs, in_tuples, in_dicts])
def test_a_generator_brings_labels_with_its_samples(stream: Any) -> None:
    images, labels = task()
    usual: dict[str, Any] = {"epochs": 2, "rate": 1e-2, "batch_size": 16, "engine": ENGINE}
    expected = onnxcop.finetune(chain(), {"x": images, "labels": labels}, **usual)
    for data in (stream(images, labels), lambda: stream(images, labels)):
        found = onnxcop.finetune(chain(), data, **usual)
        assert found.after == expected.after and found.before == expected.before
        assert found.model.SerializeToString() == expected.model.SerializeToString()
    with pytest.raises(CalibrationError, match="item 0 of a generator has no labels; yield dicts with"):
        onnxcop.finetune(chain(), ({"x": image} for image in images), **usual)
    some = onnxcop.finetune(chain(), stream(images, labels), samples=64, **usual)
    assert some.steps == 2 * (round(64 * 0.9) // 16)


def test_a_script_yields_samples_with_labels_or_labels_alone(tmp_path: Path) -> None:
    images, labels = task()
    np.savez(tmp_path / "data.npz", x=images, labels=labels)
    script = tmp_path / "gen.py"
    script.write_text(
        "import numpy as np, pathlib\n"
        "with np.load(pathlib.Path(__file__).with_name('data.npz')) as file: found = dict(file)\n"
        "def both():\n"
        "    for i in range(0, 160, 40): yield {name: found[name][i : i + 40] for name in found}\n"
        "def arrays():\n"
        "    return found\n"
        "def labels():\n"
        "    for i in range(0, 160, 40): yield found['labels'][i : i + 40]\n"
    )
    usual: dict[str, Any] = {"epochs": 2, "rate": 1e-2, "batch_size": 16, "engine": ENGINE}
    expected = onnxcop.finetune(chain(), tmp_path / "data.npz", **usual).after
    assert onnxcop.finetune(chain(), f"{script}:both", **usual).after == expected
    assert onnxcop.finetune(chain(), f"{script}:arrays", **usual).after == expected
    assert onnxcop.finetune(chain(), {"x": images}, labels=f"{script}:labels", **usual).after == expected


def test_targets_of_several_numbers_come_one_by_one() -> None:
    images, labels = task()
    targets = np.tile(labels[:, None], (1, 5)).astype(np.float32)
    found = onnxcop.finetune(
        chain(), zip(images, targets, strict=True), epochs=2, rate=1e-2, batch_size=16, engine=ENGINE
    )
    assert found.before < found.after < 0


@pytest.mark.parametrize("other", ["labels", "images", "metric"])
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr("onnxcop.training.loop._SAVED_EVERY", 0.0)
    images, labels = task()
    path, usual = tmp_path / "run.npz", {"epochs": 2, "rate": 1e-2, "batch_size": 16, "engine": ENGINE}
    trained(checkpoint=path, **usual)
    assert path.exists()
    settings: dict[str, Any] = {"checkpoint": path, **usual}
    if other == "labels":
        settings["labels"] = (labels + 1) % 5
    elif other == "metric":
        settings["metric"] = lambda model: 0.0
    with pytest.raises(CalibrationError, match="checkpoint of another run"):
        if other == "images":
            onnxcop.finetune(chain(), {"x": images[::-1].copy()}, labels=labels, **settings)
        else:
            trained(**settings)


def test_the_batch_of_an_infinite_loss_is_named_by_numbers_of_the_source() -> None:
    _, labels = task()
    targets = np.tile(labels[:, None], (1, 5)).astype(np.float32)
    targets[7] = np.nan
    with pytest.raises(ModelError, match=r"look at the batch \(samples (\d+, )*7(, \d+)*\), or give a lower --lr"):
        trained(labels=targets, seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": np.full(160, 7)}, "labels run from 7 to 7, but output 'y' has 5 classes"),
        ({"labels": np.zeros(10, np.int64)}, "there are 10 labels for 160 samples"),
        ({"labels": np.zeros((160, 4), np.float32)}, r"labels have the shape \[4\] for a sample"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; choose one of"),
        ({"teacher": chain(classes=4)}, "the teacher has no output 'y' of the shape"),
        ({"labels": None}, "there are no labels|holds x, but no labels"),
        ({"teacher": of_side(9)}, "the teacher does not run on the model's samples: .*; give a model with the same"),
        ({"metric": lambda _: float("nan")}, "--metric returned no number"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        trained(**settings)


def test_the_command_writes_the_model_its_history_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = written(chain(), tmp_path / "net.onnx"), tmp_path / "trained.onnx"
    images, labels = task()
    np.savez(tmp_path / "data.npz", x=images, labels=labels)
    files = [str(tmp_path / name) for name in ("history.json", "run.svg", "data.npz")]
    arguments = ["finetune", str(model), "-o", str(out), "--data", files[2], "--history", files[0], "--plot", files[1]]
    assert cli.run([*arguments, *CPU, "--epochs", "4", "--lr", "0.01", "--batch-size", "16"]) == 0
    assert "held-out score" in capsys.readouterr().out
    assert len(json.loads(Path(files[0]).read_text())["history"]) == 4
    assert Path(files[1]).read_text().startswith("<?xml")
    onnx.checker.check_model(onnx.load(out), full_check=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("labels", "labels run from 3 to 5, but output 'y' has 5 classes"),
        ("loss", "reduce it to one floating-point number"),
        ("teacher", "the teacher has no output 'y' of the shape"),
        ("nan", "the loss is nan at step 1 although the rate was halved 3 times; look at the batch (samples "),
        ("weights", "nothing can be trained, no gradient reaches a weight"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = task()
    data, out, more = tmp_path / "data.npz", tmp_path / "trained.onnx", list[str]()
    model = written(chain(), tmp_path / "net.onnx")
    if case == "labels":
        labels = labels + 3
    elif case == "nan":
        labels = np.full((len(images), 5), np.nan, np.float32)
    elif case == "teacher":
        more = ["--teacher", str(written(chain(classes=4), tmp_path / "other.onnx"))]
    elif case == "loss":
        vector = onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 18]> g (float[N,5] y, int64[N] wanted) => (float[N,5] loss)'
            " { loss = Identity(y) }"
        )
        more = ["--loss", str(written(vector, tmp_path / "loss.onnx"))]
    elif case == "weights":
        text = '<ir_version: 9, opset_import: ["" : 18]> g (float[N,3,8,8] x) => (float[N,3] y)'
        model = written(
            onnx.parser.parse_model(text + " { m = GlobalAveragePool(x) y = Flatten(m) }"), tmp_path / "pool.onnx"
        )
        labels = labels % 3
    np.savez(data, x=images, labels=labels)
    assert cli.run(["finetune", str(model), "-o", str(out), "--data", str(data), *more, *CPU, "--epochs", "1"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not out.exists()


def test_images_are_labelled_by_their_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rng = np.random.default_rng(0)
    for place, name in enumerate(("blue", "red")):
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
            pixels[..., 2 - 2 * place] += 150
            image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    found = onnxcop.finetune(chain(), tmp_path, epochs=8, rate=1e-2, batch_size=8, held_out=0.25, engine=ENGINE)
    assert found.after == 1.0
