"""Images in Parquet files."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcop.data.open import open_source
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

INPUT = [InputSpec("x", np.dtype(np.float32), ("n", 3, 8, 8))]


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def written(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_images_are_those_of_a_folder(tmp_path: Path, form: str) -> None:
    images, tables = tmp_path / "images", tmp_path / "tables"
    images.mkdir(), tables.mkdir()
    for seed in range(6):
        (images / f"{seed}.png").write_bytes(png(seed))
    for place in range(2):
        found = [png(seed) for seed in range(3 * place, 3 * place + 3)]
        column = found if form == "bytes" else [{"bytes": one, "path": None} for one in found]
        written(tables / f"{place}.parquet", {"image": column, "label": [1, 2, 3]})
    one, other = (open_source(str(folder), INPUT, samples=6, batch_size=6) for folder in (images, tables))
    assert other.count == 6 and other.ranges() == [(0, 6)]
    assert other.numbers.tolist() == [0, 1, 2, 3, 4, 5]  # each row group is read once
    (mine,), (theirs,) = one.batches(), pickle.loads(pickle.dumps(other)).batches()
    np.testing.assert_array_equal(mine["x"][np.argsort(one.numbers)], theirs["x"])
    both = next(other.with_crops(2).batches(12))["x"]
    assert not np.array_equal(both[:6], both[6:])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": [1, 2]}, r"no column of bytes \(label\)"),
        ({"a": [b"1"], "b": [b"2"]}, r"several columns of bytes \(a, b\)"),
        ({"image": [b"no image"]}, "row 0: this image cannot be read"),
        ({"image": [png(0), None]}, "row 1: it holds no image"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, columns: dict[str, list[Any]], said: str) -> None:
    path = written(tmp_path / "x.parquet", columns)
    with pytest.raises(CalibrationError, match=rf"x\.parquet.*{said}"):
        list(open_source(str(path), INPUT).batches())


def test_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.parquet", {"image": [png(0)]})
    written(tmp_path / "b.parquet", {"picture": [png(0)]})
    with pytest.raises(CalibrationError, match=r"b\.parquet: its images are in the column 'picture', .* in 'image'"):
        open_source(str(tmp_path), INPUT)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x.parquet", {"image": [png(0)]})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CalibrationError, match=r"x\.parquet: this Parquet file cannot be read"):
        open_source(str(path), INPUT)
