"""Fuzzing of what reads files: the loader of models, and the readers of plans, statistics and arrays.

Whatever the bytes are, a reader gives a value or an OnnxcopError with a message of one line; anything else is a fault.

    pip install atheris
    python tools/fuzz_readers.py model -max_total_time=600      # also: plan, stats, npz, npy
    python tools/fuzz_readers.py plan corpus/ -runs=100000      # options and folders are those of libFuzzer
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["onnxcop"]):
    from onnxcop.calibration.statistics import CalibrationStats, Moments
    from onnxcop.data.arrays import NpyFile, NpzFile
    from onnxcop.errors import OnnxcopError
    from onnxcop.graph import io as models
    from onnxcop.rewrite.plan import Cut, PruningPlan

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def _read_npz(path: Path) -> None:
    array_file = NpzFile(path)
    array_file.load(list(array_file.outline()))


def _read_npy(path: Path) -> None:
    array_file = NpyFile(path)
    array_file.load(list(array_file.outline()))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "model": ("net.onnx", models.load),
    "plan": ("plan.json", PruningPlan.load),
    "stats": ("stats.npz", CalibrationStats.load),
    "npz": ("data.npz", _read_npz),
    "npy": ("data.npy", _read_npy),
}


def seeds(kind: str) -> list[bytes]:
    """Good files to begin with."""
    from onnx import TensorProto, helper, numpy_helper

    if kind == "model":
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
        weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
        nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"], "r")]
        model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]))
        outside = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], b"\0" * 16, raw=True)
        outside.ClearField("raw_data")
        outside.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.data"), ("offset", "0"), ("length", "16")):
            outside.external_data.add(key=key, value=value)
        other = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [outside]))
        return [model.SerializeToString(), other.SerializeToString()]
    if kind == "plan":
        return [PruningPlan("abc", (Cut("w", 0, (1, 2)),), {"x": (1, 2)}).to_json().encode()]
    moments = Moments(4.0, np.zeros(2), np.eye(2))
    if kind == "stats":
        return [CalibrationStats("abc", 4, {"a": moments}).to_bytes(), json.dumps({"version": 1}).encode()]
    out = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(out, x=np.ones((2, 3), np.float32))
    else:
        np.save(out, np.ones((2, 3), np.float32))
    return [out.getvalue()]


def main() -> None:
    """Fuzz one reader until libFuzzer stops."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(__doc__)
    kind = sys.argv.pop(1)
    logging.disable(logging.CRITICAL)
    name, read = READERS[kind]
    path = _FOLDER / name
    (_FOLDER / "w.data").write_bytes(b"\0" * 16)

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                read(path)
            except OnnxcopError as error:
                if "\n" in str(error):
                    raise RuntimeError(f"a message of several lines: {error}") from error

    corpus = _FOLDER / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(kind)):
        (corpus / f"seed{number}").write_bytes(data)
    atheris.Setup([sys.argv[0], *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
