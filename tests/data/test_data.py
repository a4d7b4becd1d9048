"""Calibration data: every kind of source, the choice of samples, batches, and errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import F32, MEAN, PICTURE, SOURCES, STD, TOKENS, VECTOR, pictures, rows
from PIL import Image

from onnxcop.data import arrays as array_files
from onnxcop.data import stores as sources
from onnxcop.data.inputs import batch_layout
from onnxcop.data.open import (
    CalibrationData,
    InputSpec,
    open_source,
)
from onnxcop.errors import CalibrationError
from onnxcop.images.preprocess import Preprocess
from onnxcop.images.reader import image_reader


def _seen(data: CalibrationData, name: str = "x") -> list[float]:
    return [float(value) for batch in data.batches() for value in batch[name][:, 0]]


def _imagenet(pixels: np.ndarray) -> np.ndarray:
    """[N, H, W, C] bytes → [N, C, H, W], as the formula says."""
    return ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_every_sample_once_and_again(kind: str, tmp_path: Path) -> None:
    data = open_source(SOURCES[kind](tmp_path), [VECTOR], batch_size=16)
    assert data.count == 40
    first = _seen(data)
    assert sorted(first) == list(range(40))
    assert _seen(data) == first
    shapes = [batch["x"].shape for batch in data.batches()]
    assert shapes == [(16, 3), (16, 3), (8, 3)]
    assert all(batch["x"].dtype == F32 for batch in data.batches(7))
    assert "40" in data.description and "\n" not in data.description


@pytest.mark.parametrize("kind", ["npz", "folder of npz", "generator of batches", "data reader"])
def test_samples_are_drawn_from_the_whole_source(kind: str, tmp_path: Path) -> None:
    def chosen(name: str, seed: int) -> list[float]:
        folder = tmp_path / name
        folder.mkdir()
        return _seen(open_source(SOURCES[kind](folder), [VECTOR], samples=10, seed=seed))

    one, again, other = chosen("a", 0), chosen("b", 0), chosen("c", 1)
    assert one == again
    assert len(set(one)) == 10
    assert sorted(one) != sorted(other)
    assert sorted(one) != list(range(10))


def test_streams_are_sampled_evenly() -> None:
    hits = np.zeros(40)
    for seed in range(400):
        stream = ({"x": row} for row in rows(40))
        hits[np.array(_seen(open_source(stream, [VECTOR], samples=10, seed=seed)), int)] += 1
    # 400 draws of probability 1/4: mean 100, deviation below 8.7
    assert hits.sum() == 4000
    assert hits.min() > 60
    assert hits.max() < 140


def test_endless_streams_end() -> None:
    def forever() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield {"x": rows(1)}

    assert open_source(forever, [VECTOR], samples=5).count == 5


def test_streams_beyond_the_limit_are_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_STREAM", 40)
    stream = ({"x": row} for row in rows(30))
    data = open_source(stream, [VECTOR], samples=20)
    store = data._store
    assert isinstance(store, sources.SpilledStore)
    assert sum(isinstance(item, dict) for item in store._items) <= 3
    assert len(set(_seen(data))) == 20


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "npy"])
def test_arrays_on_disk_stay_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "LARGEST_IN_MEMORY", 0)
    path = SOURCES[kind](tmp_path)
    array_file = array_files.NpyFile(path) if path.suffix == ".npy" else array_files.NpzFile(path)
    key = next(key for key in array_file.outline() if key != "labels")
    array = array_file.load([key])[key]
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, rows(40))


def test_pages_of_mapped_files_are_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAPPED", 0)
    released: list[int] = []
    release_pages = sources.release_pages

    def counted(arrays: Any) -> None:
        released.append(1)
        release_pages(arrays)

    monkeypatch.setattr(sources, "release_pages", counted)
    assert sorted(_seen(open_source(SOURCES["npy"](tmp_path), [VECTOR]))) == list(range(40))
    assert len(released) == 40


def test_split_is_disjoint_whole_and_repeatable() -> None:
    data = open_source(rows(40), [VECTOR], samples=30)
    rest, held = data.split(0.2, seed=3)
    assert (rest.count, held.count) == (24, 6)
    assert sorted(_seen(rest) + _seen(held)) == sorted(_seen(data))
    assert _seen(data.split(0.2, seed=3)[1]) == _seen(held)
    assert _seen(data.split(0.2, seed=4)[1]) != _seen(held)
    assert data.take(5).count == 5
    assert set(_seen(data.take(5))) < set(_seen(data))
    assert data.take(100) is data
    for fraction, source in ((0.0, data), (1.0, data), (0.5, data.take(1))):
        with pytest.raises(CalibrationError, match="cannot hold out"):
            source.split(fraction)


def test_static_batch_is_always_filled() -> None:
    spec = InputSpec("x", F32, (4, 3, 2, 2))
    array = np.random.default_rng(0).standard_normal((18, 3, 2, 2)).astype(np.float32)
    data = open_source(array, [spec], batch_size=16)
    assert data.count == 16
    assert [batch["x"].shape for batch in data.batches(3)] == [(4, 3, 2, 2)] * 4
    rest, held = data.split(0.3)
    assert (rest.count, held.count) == (12, 4)
    with pytest.raises(CalibrationError, match="3 samples, but the model wants batches of 4"):
        open_source(array[:3], [spec])
    one = InputSpec("x", F32, (1, 3))
    assert [batch["x"].shape for batch in open_source(rows(5), [one]).batches()] == [(1, 3)] * 5


def test_static_shape_that_is_no_batch_is_fed_whole() -> None:
    spec = InputSpec("mel", F32, (80, 30))
    array = np.random.default_rng(0).standard_normal((80, 30)).astype(np.float32)
    (batch,) = open_source(array, [spec]).batches()
    np.testing.assert_array_equal(batch["mel"], array)
    batches = list(open_source(np.stack([array, 2 * array]), [spec]).batches())
    assert [batch["mel"].shape for batch in batches] == [(80, 30)] * 2


def test_state_and_scalars_beside_a_batch() -> None:
    specs = [
        InputSpec("input", F32, ("batch", "sequence")),
        InputSpec("state", F32, (2, "batch", 4)),
        InputSpec("rate", np.dtype(np.int64), ()),
    ]
    layout = batch_layout(specs)
    assert (dict(layout.axes), layout.size) == ({"input": 0, "state": 1, "rate": None}, None)
    arrays = {
        "input": np.arange(12).reshape(6, 2),
        "state": np.zeros((2, 6, 4)),
        "rate": np.array(16000),
    }
    (batch,) = open_source(arrays, specs).batches()
    assert [batch[name].shape for name in arrays] == [(6, 2), (2, 6, 4), ()]
    assert int(batch["rate"]) == 16000
    feeds = [{"input": np.zeros(2), "state": np.zeros((2, 4)), "rate": np.array(rate)} for rate in (8, 8, 9)]
    for batch in open_source(feeds, specs, batch_size=3).batches():
        assert batch["input"].shape[0] in (1, 2)  # 8 and 9 never share a run


def test_several_inputs_stay_in_step() -> None:
    arrays = {"ids": np.arange(30).reshape(6, 5), "x": rows(6) * 5, "other": np.zeros(3)}
    for batch in open_source(arrays, [VECTOR, TOKENS]).batches(4):
        np.testing.assert_array_equal(batch["ids"][:, 0], batch["x"][:, 0])
        assert batch["ids"].dtype == np.int64
    arrays["x"] = rows(5)
    with pytest.raises(CalibrationError, match="'x' has 5, 'ids' has 6"):
        open_source(arrays, [VECTOR, TOKENS])


def test_unnamed_arrays_of_npz_are_bound_in_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", rows(6), np.arange(30).reshape(6, 5))
    (batch,) = open_source(tmp_path / "d.npz", [VECTOR, TOKENS]).batches()
    assert (batch["x"].shape, batch["ids"].shape) == ((6, 3), (6, 5))


def test_samples_of_different_shapes_are_in_different_batches() -> None:
    spec = InputSpec("x", F32, ("N", 1, "length"))
    feeds = [{"x": np.ones((1, length))} for length in (4, 4, 6)]
    shapes = [batch["x"].shape for batch in open_source(feeds, [spec]).batches()]
    assert sorted(shapes) in ([(1, 1, 6), (2, 1, 4)], [(1, 1, 4), (1, 1, 4), (1, 1, 6)])
    with pytest.raises(CalibrationError, match=r"expected samples of \[1, 4\]"):
        open_source(feeds, [spec], input_shapes={"x": (1, 1, 4)})


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_arrays_of_pictures_are_preprocessed(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = pictures(6)
    expected = _imagenet(pixels)
    stored = pixels if layout == "nhwc" else pixels.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "d.npz", images=stored, labels=np.arange(6))
    with caplog.at_level(logging.INFO, "onnxcop"):
        data = open_source(tmp_path / "d.npz", [PICTURE])
    assert any("guessed preprocessing 'imagenet'" in line for line in caplog.messages)
    (batch,) = data.batches()
    np.testing.assert_allclose(batch["image"], expected[data._order], atol=1e-5)
    nhwc = InputSpec("image", F32, (None, 8, 8, 3))
    (batch,) = open_source(tmp_path / "d.npz", [nhwc], preprocess=Preprocess.named("imagenet")).batches()
    np.testing.assert_allclose(batch["image"].transpose(0, 3, 1, 2), expected[data._order], atol=1e-5)


def test_gray_arrays_and_raw_bytes() -> None:
    gray = InputSpec("g", F32, ("N", 1, 8, 8))
    pixels = pictures(3)[:, :, :, 0]
    data = open_source(pixels, [gray])
    (batch,) = data.batches()
    np.testing.assert_allclose(batch["g"][:, 0], pixels[data._order] / 255, atol=1e-6)
    (batch,) = open_source(pixels / 255.0, [gray]).batches()  # already prepared, one axis left out
    np.testing.assert_allclose(batch["g"][:, 0], pixels[data._order] / 255, atol=1e-6)
    (batch,) = open_source(pixels, [gray], preprocess=Preprocess.named("mnist")).batches()
    expected = (pixels[data._order] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(batch["g"][:, 0], expected, atol=1e-5)
    raw = InputSpec("g", np.dtype(np.uint8), ("N", 8, 8, 3))
    colour = pictures(3)
    (batch,) = open_source(colour, [raw]).batches()
    assert batch["g"].dtype == np.uint8
    np.testing.assert_array_equal(batch["g"], colour[data._order])


def test_floats_are_taken_as_they_are() -> None:
    array = np.random.default_rng(0).standard_normal((4, 3, 8, 8))
    data = open_source(array, [PICTURE])
    (batch,) = data.batches()
    np.testing.assert_array_equal(batch["image"], array[data._order].astype(np.float32))
    with pytest.raises(CalibrationError, match="channels-last"):
        open_source(array.transpose(0, 2, 3, 1), [PICTURE])


def test_folder_of_pictures(tmp_path: Path) -> None:
    pixels = pictures(4)
    (tmp_path / "class").mkdir()
    for number, suffix in enumerate(("png", "bmp", "webp", "PNG")):
        path = tmp_path / "class" / f"{number}.{suffix}"
        Image.fromarray(pixels[number]).save(path, lossless=True)
    (tmp_path / "readme.txt").write_text("not read")
    data = open_source(tmp_path, [PICTURE], batch_size=3)
    batches = [batch["image"] for batch in data.batches()]
    assert [len(batch) for batch in batches] == [3, 1]
    np.testing.assert_allclose(np.concatenate(batches), _imagenet(pixels)[data._order], atol=1e-5)


def test_pictures_are_resized_and_cropped_in_the_middle(tmp_path: Path) -> None:
    # 16 pixels of crop are kept from a shorter side of 32: the middle quarter, here constant.
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[8:56, 40:88] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    spec = InputSpec("image", F32, (1, 3, 16, 16))
    middle = Preprocess(crop=0.5, scale=1.0)
    (batch,) = open_source(tmp_path, [spec], preprocess=middle).batches()
    np.testing.assert_array_equal(batch["image"][0, :, 8, 8], [10, 20, 30])
    assert (batch["image"] == batch["image"][:, :, :1, :1]).all()
    bgr = Preprocess(crop=0.5, scale=1.0, channels="bgr", mean=(1, 2, 3))
    (batch,) = open_source(tmp_path / "a.png", [spec], preprocess=bgr).batches()
    np.testing.assert_array_equal(batch["image"][0, :, 8, 8], [29, 18, 7])
    (array,) = open_source(pixels, [spec], preprocess=middle).batches()
    np.testing.assert_array_equal(array["image"][0, :, 8, 8], [10, 20, 30])


def test_other_views_of_pictures(tmp_path: Path) -> None:
    for number, array in enumerate(pictures(6, 40)):
        Image.fromarray(array).resize((60, 40)).save(tmp_path / f"{number}.png")
    data = open_source(tmp_path, [PICTURE], preprocess=Preprocess(scale=1.0), samples=5)
    anew = data.with_crops(3)
    (first,), (again,) = anew.batches(15), anew.batches(15)
    (plain,) = data.batches(5)
    views = first["image"].reshape(3, 5, 3, 8, 8)
    assert (anew.count, data.count) == (15, 5)
    assert np.array_equal(first["image"], again["image"])  # the same whenever they are asked for
    assert np.array_equal(views[0], plain["image"])  # the centre crop comes first
    assert len(np.unique(first["image"].reshape(15, -1), axis=0)) == 15
    assert 0 <= first["image"].min() < first["image"].max() <= 255
    assert np.abs(views[1:].mean((0, 3, 4)) - plain["image"].mean((2, 3))).max() < 40  # of the same pictures


def test_views_of_pictures_of_the_right_size_are_not_enlarged(tmp_path: Path) -> None:
    for number, array in enumerate(pictures(12)):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    (found,) = open_source(tmp_path, [PICTURE], preprocess=Preprocess(scale=1.0)).with_crops(2).batches(24)
    plain, other = found["image"][:12], found["image"][12:]
    mirrored = [np.array_equal(a[:, :, ::-1], b) for a, b in zip(plain, other, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(plain, other, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)


@pytest.mark.parametrize("size", [(7, 5), (31, 97), (8, 300), (3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("wanted", [(8, 8), (13, 9)], ids=str)
def test_views_of_pictures_of_any_size(size: tuple[int, int], wanted: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "any.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    prepared = image_reader(InputSpec("image", F32, ("N", 3, *wanted)), Preprocess(scale=1.0))
    for view in range(1, 40):
        assert prepared.from_file(path, view).shape == (3, *wanted)


def test_what_is_no_picture_has_one_view() -> None:
    data = open_source(rows(9), [VECTOR])
    assert data.with_crops(3) is data


def test_pictures_of_other_modes(tmp_path: Path) -> None:
    gray = np.full((8, 8), 51, np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(gray.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    Image.fromarray(gray).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    data = open_source(tmp_path, [PICTURE], preprocess=Preprocess.named("unit"))
    (batch,) = data.batches()
    np.testing.assert_allclose(batch["image"], 0.2, atol=0.01)


def test_large_jpeg_is_close_to_its_full_decoding(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (640, 1)), np.tile(ramp[:, None], (1, 640))] * 2, 2)[..., :3]
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    unit = image_reader(InputSpec("i", F32, ("N", 3, 32, 32)), Preprocess.named("unit"))
    full, fast = unit.from_file(tmp_path / "a.png"), unit.from_file(tmp_path / "a.jpg")
    assert np.abs(full - fast).max() < 0.03


def test_guesses_say_what_they_are() -> None:
    reader = image_reader(PICTURE)
    assert reader.size == (8, 8)
    assert (reader.layout, reader.channels) == ("nchw", "rgb")
    assert reader.mean == Preprocess.named("imagenet").mean
    assert "guessed" in reader.sentence(PICTURE) and "imagenet" in reader.sentence(PICTURE)
    assert "8×8" in reader.sentence(PICTURE)
    nhwc = image_reader(InputSpec("i", F32, (None, 224, 224, 3)))
    assert (nhwc.layout, nhwc.size, nhwc.origin) == ("nhwc", (224, 224), "guess 'keras-tf'")
    gray = image_reader(InputSpec("i", F32, ("N", 1, 28, 28)))
    assert (gray.channels, gray.mean, gray.scale) == ("gray", (), 1 / 255)
    raw = image_reader(InputSpec("i", np.dtype(np.uint8), ("N", 3, 28, 28)))
    assert (raw.scale, raw.mean, raw.std) == (1.0, (), ())
    assert image_reader(InputSpec("i", F32, ("N", 3, None, "w"))).size == (224, 224)
    with pytest.raises(CalibrationError, match="does not look like an image"):
        image_reader(VECTOR)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Preprocess.named("nonesuch"), "imagenet"),
        (lambda: Preprocess(std=(0.0,)), "std holds a zero"),
        (lambda: Preprocess(mean=(0.1, 0.2)), "mean has 2 numbers"),
        (lambda: Preprocess(crop=0.0), "crop"),
        (lambda: image_reader(PICTURE, Preprocess(channels="gray")), "gray images"),
        (lambda: image_reader(PICTURE, Preprocess(size=(9, 9))), "9×9 do not fit"),
    ],
)
def test_impossible_preprocessing_is_refused(make: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        make()


def test_input_shapes_fill_dynamic_axes(tmp_path: Path) -> None:
    Image.fromarray(pictures(1, 64)[0]).save(tmp_path / "a.png")
    spec = InputSpec("image", F32, ("N", 3, "H", "W"))
    data = open_source(tmp_path, [spec], input_shapes={"image": (1, 3, 32, 48)})
    assert [batch["image"].shape for batch in data.batches()] == [(1, 3, 32, 48)]
    array = np.zeros((9, 3, 32, 48), np.float32)
    data = open_source(array, [spec], input_shapes={"image": (4, 3, 32, 48)})
    assert [len(batch["image"]) for batch in data.batches(2)] == [4, 4]
    for shapes, words in (
        ({"image": (1, 1, 32, 32)}, "does not fit"),
        ({"image": (1, 3)}, "does not fit"),
        ({"image": (1, 3, 0, 32)}, "does not fit"),
        ({"picture": (1, 3, 32, 32)}, "inputs are: image"),
    ):
        with pytest.raises(CalibrationError, match=words):
            open_source(array, [spec], input_shapes=shapes)


def test_casts() -> None:
    ids = InputSpec("ids", np.dtype(np.int64), ("N", 3))
    (batch,) = open_source(rows(4).astype(np.int32), [ids]).batches()
    assert batch["ids"].dtype == np.int64
    small = InputSpec("ids", np.dtype(np.int8), ("N", 3))
    (batch,) = open_source(rows(4).astype(np.int64), [small]).batches()
    assert batch["ids"].dtype == np.int8
    with pytest.raises(CalibrationError, match=r"values 300\.\.300 do not fit.*-128\.\.127"):
        list(open_source(np.full((1, 3), 300), [small]).batches())
    with pytest.raises(CalibrationError, match=r"float32.* cannot be converted to int64"):
        open_source(rows(4), [ids])


def test_counts_are_checked() -> None:
    for wrong in ({"samples": 0}, {"batch_size": 0}):
        with pytest.raises(CalibrationError, match="give 1 or more"):
            open_source(rows(2), [VECTOR], **wrong)
    data = open_source(rows(2), [VECTOR])
    assert open_source(data, [VECTOR]) is data


@pytest.mark.zoo
def test_zoo_accuracies(zoo: Path) -> None:
    """What the trained models are known to reach shows that samples, order and values are right."""
    from onnxcop.runtime.session import EngineOptions, Session, run_batched

    for name, source, preprocess, least in (
        ("cifar_resnet20", "cifar10_eval", None, 0.86),
        ("digit_cnn", "mnist_eval", Preprocess.named("mnist"), 0.98),
    ):
        path = zoo / "data" / f"{source}.npz"
        session = Session(zoo / "trained" / f"{name}.onnx", EngineOptions("cpu"))
        data = open_source(path, session.inputs, preprocess=preprocess, samples=1000)
        labels = np.load(path)["labels"][data._order]
        runs = run_batched(session, data.batches(), data.layout.axes)
        found = np.concatenate([result["output"].argmax(1) for _, result in runs])
        assert (found == labels).mean() > least
