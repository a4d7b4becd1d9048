"""Doubts about a guessed preprocessing, and images at the size that the analysis settled on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runs import CPU
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from onnxcop.analysis.analyze import analyze
from onnxcop.cli import main as cli
from onnxcop.data.guess_check import mutual_information
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.images.preprocess import Preprocess
from onnxcop.runtime.session import EngineOptions

ENGINE = EngineOptions("cpu", 1)
LEVELS = (20, 70, 120, 170, 220)


def _dark_room(path: Path, scale: float) -> Path:
    """Five classes by brightness of pixels that are divided by `scale`; a guess that divides them again blurs them."""
    levels = np.array(LEVELS, np.float64)
    weight = np.zeros((5, 3, 8, 8), np.float32)
    weight += (levels / scale / 192).reshape(5, 1, 1, 1).astype(np.float32)
    bias = (-(levels**2) / scale**2 / 2).astype(np.float32)
    sharp = np.float32(20.0 * scale**2 / 255**2 * 8)
    stored = [
        numpy_helper.from_array(weight * sharp, "w"), numpy_helper.from_array(bias * sharp, "b"),
    ]  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("Flatten", ["c"], ["f"]),
            helper.make_node("Softmax", ["f"], ["y"]),
        ],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])], stored,
    )  # fmt: skip
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


def _images(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.full((8, 8, 3), LEVELS[number % 5], np.uint8)
        pixels[:4] -= 10
        pixels[4:] += 10
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_mutual_information_wants_certain_and_different_answers() -> None:
    certain, unsure = np.eye(4), np.full((4, 4), 0.25)
    alike = np.tile(np.eye(4)[:1], (4, 1))
    assert mutual_information(certain) == pytest.approx(np.log(4), abs=1e-6)
    assert mutual_information(unsure) == pytest.approx(0, abs=1e-9)
    assert mutual_information(alike) == pytest.approx(0, abs=1e-9)


def test_a_guess_that_fits_badly_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _images(tmp_path / "images")
    raw = analyze(_dark_room(tmp_path / "raw.onnx", 1.0), options=ENGINE)
    open_data(raw, DataOptions(data=str(folder), preprocess=None, samples=40))
    assert (
        "the preprocessing 'imagenet' is a guess, and with 'none' the model distinguishes 32 of the images"
        in caplog.text
    )
    caplog.clear()
    open_data(raw, DataOptions(data=str(folder), preprocess="none", samples=40))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_pixels_of_zero_and_one_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = analyze(_dark_room(tmp_path / "raw.onnx", 1.0), options=ENGINE)
    dim = np.random.default_rng(0).integers(0, 2, (12, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x=dim)
    open_data(model, DataOptions(data=str(tmp_path / "d.npz"), preprocess=None, samples=12))
    assert "the brightest pixel of the images looked at is 1 of 255" in caplog.text


@pytest.mark.zoo
def test_wrong_guesses_are_doubted(zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, data, suggested in (
        ("digit_cnn", "mnist_calib.npz", "mnist"), ("cifar_resnet20", "cifar10_calib.npz", None),
    ):  # fmt: skip
        caplog.clear()
        model = analyze(zoo / "trained" / f"{name}.onnx", options=ENGINE)
        open_data(model, DataOptions(data=str(zoo / "data" / data), samples=64))
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert (warned == []) == (suggested is None)
        assert suggested is None or f"--preprocess {suggested}" in warned[0] or "--preprocess none" in warned[0]


@pytest.mark.zoo
def test_text_lines_are_read_at_the_size_of_the_model(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lines"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 60 + 30 * number, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    out = tmp_path / "o.onnx"
    model = zoo / "trained" / "ppocr_v4_rec.onnx"
    arguments = [str(model), "-o", str(out), "--size", "9MB", "--data", str(folder), "--criterion", "l2"]
    assert cli.run([*arguments, "--recover", "none", "--latency-seconds", "0", *CPU]) == 0
    err = capsys.readouterr().err
    assert "images are read as the model's metadata (a list of characters: PaddleOCR text recognition) says: " in err
    assert "48×320, bgr, nchw, pad with 127.5, x/255, minus (0.5), over (0.5)" in err
    assert out.stat().st_size <= 9_000_000


def test_a_name_that_does_not_exist_is_refused_with_and_without_data(model: Path, tmp_path: Path) -> None:
    import onnxcop

    for data in (None, str(tmp_path)):
        with pytest.raises(onnxcop.OnnxcopError, match="unknown preprocessing 'imagnet'"):
            onnxcop.prune(str(model), data=data, preprocess="imagnet", options=ENGINE)


def test_names_and_ways_on_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(model), "--preprocess", "imagnet"]) == 2
    assert "unknown preprocessing 'imagnet'; choose imagenet, timm" in " ".join(capsys.readouterr().err.split())
    assert cli.run([str(model), "--resize", "squeeze"]) == 2
    assert Preprocess.named("ultralytics").resize == "letterbox"
