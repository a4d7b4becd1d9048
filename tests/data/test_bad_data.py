"""Unusable calibration data, and the messages about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import PICTURE, SOURCES, TOKENS, VECTOR, pictures, rows
from onnx import numpy_helper
from PIL import Image

from onnxcop.data.open import (
    InputSpec,
    open_source,
)
from onnxcop.errors import CalibrationError


def _make_broken(folder: Path, kind: str) -> tuple[Any, tuple[InputSpec, ...], tuple[str, ...]]:
    """A broken source, the inputs, and what the message must say."""
    if kind == "absent":
        return folder / "no", (VECTOR,), ("no: no such file",)
    if kind == "empty folder":
        return folder, (VECTOR,), (folder.name, "no files")
    if kind == "unknown files":
        (folder / "a.xyz").write_text("?")
        return folder, (VECTOR,), (folder.name, r"only \.xyz")
    if kind == "unknown extension":
        (folder / "a.xyz").write_text("?")
        return folder / "a.xyz", (VECTOR,), (r"a\.xyz", r"\.npz")
    if kind == "archive":
        (folder / "pictures.zip").write_bytes(b"PK")
        return folder / "pictures.zip", (VECTOR,), (r"pictures\.zip", "unpack it and give the folder")
    if kind == "mixed folder":
        SOURCES["npy"](folder)
        Image.fromarray(pictures(1)[0]).save(folder / "a.png")
        return folder, (VECTOR,), ("1 images, 1 array files", "one kind")
    if kind == "broken npz":
        (folder / "a.npz").write_bytes(b"PK nonsense")
        return folder / "a.npz", (VECTOR,), (r"a\.npz", "cannot be read")
    if kind == "objects":
        np.save(folder / "a.npy", np.array([{}], object))
        return folder / "a.npy", (VECTOR,), (r"a\.npy", "Python objects")
    if kind == "wrong shape":
        np.save(folder / "a.npy", np.zeros((4, 2), np.float32))
        return (
            folder / "a.npy",
            (VECTOR,),
            (r"a\.npy: 'a'", r"float32\[4, 2\]", r"'x' float32\[N, 3\]"),
        )
    if kind == "missing input":
        np.savez(folder / "a.npz", x=rows(2), y=rows(2))
        return folder / "a.npz", (VECTOR, TOKENS), (r"a\.npz", "no array is for", "'ids'", "'y'")
    if kind == "ambiguous":
        np.savez(folder / "a.npz", y=rows(2), z=rows(2))
        return folder / "a.npz", (VECTOR,), (r"a\.npz", "several arrays fit", "name the array 'x'")
    if kind == "broken tensor":
        (folder / "input_0.pb").write_bytes(b"\xff\xff")
        return folder, (VECTOR,), (r"input_0\.pb", "not an ONNX tensor")
    if kind == "too few tensors":
        (folder / "input_0.pb").write_bytes(numpy_helper.from_array(rows(1)).SerializeToString())
        return folder, (VECTOR, TOKENS), (folder.name, "holds 1 inputs", "has 2")
    if kind == "pictures for two inputs":
        Image.fromarray(pictures(1)[0]).save(folder / "a.png")
        return folder, (PICTURE, TOKENS), (folder.name, "2 .*image, ids")
    if kind == "pictures for vectors":
        Image.fromarray(pictures(1)[0]).save(folder / "a.png")
        return folder, (VECTOR,), ("does not look like an image",)
    script = SOURCES["script"](folder).removesuffix("load_data")
    if kind == "no function":
        return script + "absent", (VECTOR,), (r"feed\.py", "no function 'absent'", "define one")
    if kind == "no callable":
        return script + "number", (VECTOR,), ("no function 'number'",)
    if kind == "failing script":
        return script + "broken", (VECTOR,), (r"feed\.py", "KeyError", "lost")
    return folder / "absent.py", (VECTOR,), (r"absent\.py", "no such script")


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "empty folder",
        "unknown files",
        "unknown extension",
        "archive",
        "mixed folder",
        "broken npz",
        "objects",
        "wrong shape",
        "missing input",
        "ambiguous",
        "broken tensor",
        "too few tensors",
        "pictures for two inputs",
        "pictures for vectors",
        "no function",
        "no callable",
        "failing script",
        "absent script",
    ],
)
def test_errors_name_the_file_and_the_remedy(kind: str, tmp_path: Path) -> None:
    data, inputs, words = _make_broken(tmp_path, kind)
    with pytest.raises(CalibrationError) as caught:
        open_source(data, inputs)
    assert "\n" not in str(caught.value)
    for word in words:
        assert caught.match(word)


def test_a_sample_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    array = rows(6)
    array[3, 0] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CalibrationError, match=r"a\.npy, sample 4: .*'x'.* holds NaN; repair or remove it"):
        list(open_source(tmp_path / "a.npy", [VECTOR]).batches())
    array[3, 0] = -np.inf  # as masks of attention hold
    assert len(next(open_source(array, [VECTOR]).batches())[VECTOR.name]) == 6


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match=r"broken\.png: this image cannot be read"):
        list(open_source(tmp_path, [PICTURE]).batches())


@pytest.mark.parametrize("data", [3, object(), [1, 2], [{"y": "text"}], [], {}])
def test_other_objects_are_refused(data: Any) -> None:
    with pytest.raises(CalibrationError):
        open_source(data, [VECTOR])
