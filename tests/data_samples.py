"""Inputs and samples that tests of calibration data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from onnxcop.graph.input_spec import InputSpec

F32 = np.dtype(np.float32)
VECTOR = InputSpec("x", F32, ("N", 3))
PICTURE = InputSpec("image", F32, ("N", 3, 8, 8))
TOKENS = InputSpec("ids", np.dtype(np.int64), ("N", 5))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def rows(count: int, start: int = 0) -> np.ndarray:
    """Vectors whose values all equal their number."""
    return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 3, axis=1)


def pictures(count: int, size: int = 8) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)


class Reader:
    """Gives feeds in the manner of ONNX Runtime's CalibrationDataReader."""

    def __init__(self, count: int) -> None:
        self._feeds = iter([{"x": rows(1, start)} for start in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _npz(folder: Path) -> Path:
    path = folder / "data.npz"
    np.savez(path, labels=np.arange(40), x=rows(40))
    return path


def _compressed(folder: Path) -> Path:
    path = folder / "data.npz"
    np.savez_compressed(path, anything=rows(40), labels=np.arange(40))
    return path


def _npy(folder: Path) -> Path:
    path = folder / "rows.npy"
    np.save(path, np.asfortranarray(rows(40)))
    return path


def _folder_of_npy(folder: Path) -> Path:
    (folder / "deep").mkdir()
    for number in range(20):
        np.save(folder / f"{number}.npy", rows(1, number)[0])
        np.save(folder / "deep" / f"{number}.npy", rows(1, 20 + number))
    return folder


def _folder_of_npz(folder: Path) -> Path:
    for number in range(4):
        np.savez(folder / f"{number}.npz", x=rows(10, 10 * number))
    return folder


def _test_sets(folder: Path) -> Path:
    for number in range(40):
        part = folder / f"test_data_set_{number}"
        part.mkdir()
        tensor = numpy_helper.from_array(rows(1, number), "some_name")
        (part / "input_0.pb").write_bytes(tensor.SerializeToString())
        (part / "output_0.pb").write_bytes(b"not read")
    (folder / "model.onnx").write_bytes(b"not read")
    return folder


SCRIPT = """
import numpy as np
import sibling
def load_data():
    for start in range(0, 40, 4):
        yield {"x": sibling.rows(start)}
def other():
    return [{"x": np.full((40, 3), 5, np.float32)}]
number = 3
def broken():
    raise KeyError("lost")
"""


def _script(folder: Path) -> str:
    (folder / "feed.py").write_text(SCRIPT)
    (folder / "sibling.py").write_text(
        "import numpy as np\n"
        "def rows(start):\n"
        "    return np.repeat(np.arange(start, start + 4.0)[:, None], 3, axis=1)\n"
    )
    return f"{folder / 'feed.py'}:load_data"


SOURCES: dict[str, Any] = {
    "npz": _npz,
    "compressed npz": _compressed,
    "npy": _npy,
    "folder of npy": _folder_of_npy,
    "folder of npz": _folder_of_npz,
    "test data sets": _test_sets,
    "script": _script,
    "script, default name": lambda folder: _script(folder).removesuffix(":load_data"),
    "array": lambda _: rows(40),
    "dict of arrays": lambda _: {"x": rows(40), "labels": np.arange(40)},
    "list of samples": lambda _: [{"x": row} for row in rows(40)],
    "list of arrays": lambda _: list(rows(40)),
    "pairs with labels": lambda _: [(row, 1) for row in rows(40)],
    "generator of batches": lambda _: ({"x": rows(8, start)} for start in range(0, 40, 8)),
    "callable": lambda _: lambda: ({"x": rows(8, start)} for start in range(0, 40, 8)),
    "data reader": lambda _: Reader(40),
    "float64": lambda _: rows(40).astype(np.float64),
    "bytes": lambda _: rows(40).astype(np.uint8),
    "batches of batches": lambda _: rows(40).reshape(5, 8, 3),
}
