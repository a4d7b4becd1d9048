"""Images as inputs: four ways of resizing, presets, and what a model or its folder declares."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper
from PIL import Image

from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.declared import read_declared
from onnxcop.images.preprocess import Preprocess
from onnxcop.images.presets import PRESETS
from onnxcop.images.reader import image_reader
from onnxcop.images.resizing import Resizing

F32 = np.dtype(np.float32)
NCHW = InputSpec("x", F32, ("N", 3, 16, 32))
OPEN = InputSpec("x", F32, ("N", 3, "H", "W"))


def _model(**metadata: str) -> ModelProto:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    helper.set_model_props(model, metadata)
    return model


def _halves(height: int, width: int) -> Image.Image:
    """Left half 10, right half 200."""
    pixels = np.full((height, width, 3), 10, np.uint8)
    pixels[:, width // 2 :] = 200
    return Image.fromarray(pixels)


def test_stretch_keeps_all_of_an_image_and_crop_its_middle() -> None:
    wide = _halves(16, 64)  # a square of it is the middle quarter
    stretched = Resizing("stretch", "nearest")(wide, (16, 16))
    assert stretched[0, :, 0].tolist() == [10] * 8 + [200] * 8
    marked = np.asarray(wide).copy()
    marked[:, :16] = marked[:, -16:] = 77
    cropped = Resizing("crop", "nearest", crop=1.0)(Image.fromarray(marked), (16, 16))
    assert 77 not in cropped and set(np.unique(cropped)) == {10, 200}


def test_letterbox_centres_and_pad_does_not() -> None:
    image = _halves(8, 32)
    boxed = Resizing("letterbox", "nearest", fill=114)(image, (32, 32))
    assert (boxed[:12] == 114).all() and (boxed[20:] == 114).all() and 114 not in boxed[12:20]
    assert boxed.dtype == np.uint8
    padded = Resizing("pad", "nearest", fill=127.5)(_halves(16, 16), (16, 48))
    assert padded[0, :, 0].tolist() == [10] * 8 + [200] * 8 + [127.5] * 32
    np.testing.assert_array_equal(Resizing("pad")(image, (8, 32)), np.asarray(image))  # of the right size already


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "area", "lanczos"])
def test_interpolations(interpolation: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    found = Resizing("stretch", interpolation)(Image.fromarray(noise), (16, 16)).astype(float)
    means = noise.reshape(16, 4, 16, 4, 3).mean((1, 3))
    error = np.abs(found - means).mean()
    assert (error < 0.6) == (interpolation == "area"), error  # area is the mean of the pixels covered


@pytest.mark.parametrize("method", ["crop", "stretch", "letterbox", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (5, 200), (90, 7)], ids=str)
def test_other_views_have_the_right_size(method: Any, size: tuple[int, int]) -> None:
    resizing = Resizing(method, fill=114)
    image = _halves(*size)
    views = [resizing.view(image, (16, 24), np.random.default_rng(seed)) for seed in range(8)]
    assert {view.shape for view in views} == {(16, 24, 3)}
    assert resizing(image, (16, 24)).shape == (16, 24, 3)


def test_presets_settle_all_numbers_and_fit() -> None:
    for name, preset in PRESETS.items():
        spec = InputSpec("x", F32, ("N", 1 if name == "mnist" else 3, 16, 16))
        reader = image_reader(spec, preset.preprocess)
        assert not reader.guessed and not reader.origin, name
        left_open = {entry.name for entry in fields(Preprocess) if getattr(preset.preprocess, entry.name) is None}
        assert left_open <= {"size", "layout", "channels"}, name
        gray = reader.from_pixels(np.full((16, 16, 1), 255, np.uint8))
        assert np.isfinite(gray).all()
    white = {
        name: image_reader(NCHW, PRESETS[name].preprocess).from_pixels(np.full((16, 32, 3), 255, np.uint8))
        for name in ("keras-tf", "tflite", "inception", "paddleocr", "efficientnet-lite", "ultralytics", "keras-raw")
    }
    for name, value in (
        ("keras-tf", 1),
        ("tflite", 1),
        ("inception", 1),
        ("paddleocr", 1),
        ("ultralytics", 1),
        ("efficientnet-lite", 1),
        ("keras-raw", 255),
    ):
        np.testing.assert_allclose(white[name], value, atol=1e-6, err_msg=name)


def test_padding_of_paddleocr_is_zero_after_normalization() -> None:
    reader = image_reader(NCHW, Preprocess.named("paddleocr"))
    array = reader.from_pixels(np.full((16, 16, 3), 255, np.uint8))
    np.testing.assert_allclose(array[:, :, :16], 1, atol=1e-6)
    np.testing.assert_allclose(array[:, :, 16:], 0, atol=1e-6)


def test_ultralytics_metadata() -> None:
    model = _model(task="detect", imgsz="[320, 640]", names="{0: 'cat', 1: 'dog'}", stride="32")
    found = read_declared(model)
    assert found is not None and found.origin == "the model's metadata (ultralytics, detect, 2 classes)"
    reader = image_reader(OPEN, None, found)
    assert str(reader) == "320×640, rgb, nchw, letterbox with 114, x/255"
    assert "the model's metadata" in reader.sentence(OPEN)
    classify = read_declared(_model(task="classify", imgsz="[224, 224]", names="{0: 'cat'}"))
    assert classify is not None and classify.preprocess.resize == "crop" and classify.preprocess.mean == ()
    assert read_declared(_model(task="detect")) is None
    broken = read_declared(_model(task="detect", imgsz="(", names="["))
    assert broken is not None and broken.preprocess.size is None


def test_a_list_of_characters_marks_text_recognition() -> None:
    found = read_declared(_model(character="\n".join("abcdefghijklmnop")))
    assert found is not None and found.preprocess == Preprocess.named("paddleocr")


VIT = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
       "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
       "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
RESNET = {**VIT, "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
          "crop_size": {"height": 224, "width": 224}}  # fmt: skip
TIMM = {"architecture": "mobilenetv4", "pretrained_cfg": {"input_size": [3, 224, 224], "interpolation": "bicubic",
        "crop_pct": 0.95, "crop_mode": "center", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "document", "text"),
    [
        ("preprocessor_config.json", VIT, "32×32, rgb, nchw, stretch, x/255, minus (0.5, 0.5, 0.5), over (0.5,"),
        ("preprocessor_config.json", RESNET, "224×224, rgb, nchw, centre crop 0.875, bicubic, x/255, minus"),
        ("preprocessor_config.json", {**VIT, "do_rescale": False, "do_normalize": False}, "32×32, rgb, nchw, stretch"),
        ("preprocessor_config.json", {**RESNET, "size": 240, "crop_size": 224}, "224×224, rgb, nchw, centre crop 0.93"),
        ("preprocessor_config.json", {**VIT, "do_flip_channel_order": True}, "32×32, bgr, nchw, stretch"),
        ("config.json", TIMM, "224×224, rgb, nchw, centre crop 0.95, bicubic, x/255, minus (0.5, 0.5, 0.5)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["", "onnx"])
def test_files_beside_the_model(name: str, document: Any, text: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(document))
    (tmp_path / folder).mkdir(exist_ok=True)
    found = read_declared(_model(), tmp_path / folder / "model.onnx")
    assert found is not None and found.origin.startswith(name)
    assert str(image_reader(OPEN, None, found)).startswith(text)


def test_files_that_say_nothing_or_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.onnx"
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 384}')
    (tmp_path / "preprocessor_config.json").write_text("{not json")
    assert read_declared(_model(), path) is None
    assert not caplog.messages
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true, "image_mean": "grey"}')
    assert read_declared(_model(), path) is None
    assert "preprocessor_config.json: what it says about images is not understood" in caplog.text


def test_the_user_outranks_the_model_and_the_model_the_guess() -> None:
    declared = read_declared(_model(task="detect", imgsz="[320, 320]", names="{0: 'cat'}"))
    stretched = image_reader(OPEN, Preprocess(resize="stretch"), declared)
    assert str(stretched) == "320×320, rgb, nchw, stretch, x/255"
    bare = image_reader(OPEN, Preprocess(mean=(0.5,)), declared)
    assert (bare.mean, bare.std, bare.scale, bare.origin) == ((0.5,), (), 1 / 255, "")
    guessed = image_reader(OPEN, Preprocess(resize="stretch"))
    assert guessed.guessed and guessed.resizing.method == "stretch"
    assert image_reader(OPEN, None, declared, (1, 3, 48, 96)).size == (48, 96)  # what the analysis settled on
    assert image_reader(NCHW, None, declared, (1, 3, 48, 96)).size == (16, 32)  # what the input fixes
    assert image_reader(OPEN, Preprocess(size=(8, 8)), declared, (1, 3, 48, 96)).size == (8, 8)
    with pytest.raises(CalibrationError, match="resize is 'squeeze'; give one of: crop"):
        Preprocess(resize="squeeze")  # type: ignore[arg-type]
