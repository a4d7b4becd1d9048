"""Images in tar files."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcop.data.open import open_source
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

INPUT = [InputSpec("x", np.dtype(np.float32), ("n", 3, 8, 8))]


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def test_images_are_those_of_a_folder(tmp_path: Path) -> None:
    images, tars = tmp_path / "images", tmp_path / "tars"
    images.mkdir(), tars.mkdir()
    for seed in range(6):
        (images / f"{seed}.png").write_bytes(png(seed))
    for place in range(2):
        members = {f"{seed}.png": png(seed) for seed in range(3 * place, 3 * place + 3)}
        shard(tars / f"{place}.tar", {**members, "0.cls": b"7", "a/b.json": b"{}"})
    one, other = (open_source(str(folder), INPUT, samples=6, batch_size=4) for folder in (images, tars))
    assert one.count == other.count == 6 and one.ranges() == other.ranges() == [(0, 4), (4, 6)]
    for mine, theirs in zip(one.batches(), other.batches(), strict=True):
        np.testing.assert_array_equal(mine["x"], theirs["x"])
    alone = open_source(str(tars / "0.tar"), INPUT, samples=6)
    assert alone.count == 3 and alone.with_crops(2).count == 6
    first, second = (next(alone.with_crops(2).part(3 * view, 3 * view + 3).batches())["x"] for view in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("damage", ["compressed", "text", "cut"])
def test_a_file_that_is_no_plain_tar_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.tar"
    if damage == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a"))
    else:
        whole = shard(path, {"a.png": png(0), "b.png": png(1)}).read_bytes()
        path.write_bytes(b"no archive at all" * 40 if damage == "text" else whole[:700])
    with pytest.raises(CalibrationError, match=r"x\.tar"):
        list(open_source(str(path), INPUT, samples=2).batches())


def test_a_tar_file_without_images_holds_no_samples(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="it holds no samples"):
        open_source(str(shard(tmp_path / "x.tar", {"a.txt": b"hello"})), INPUT)
