"""How much memory work over data sets of two sizes takes, each in a process of its own.

    python tools/bench_streaming.py                                  # 1,000 and 100,000 images, in every form
    python tools/bench_streaming.py --counts 500 5000 tar            # some forms and other sizes
    python tools/bench_streaming.py --work statistics distillation   # statistics, evaluation, distillation

Images have 32×32 pixels, in shards of 1,000. Peak is the largest resident set of the process, mapped files included.
Distillation goes over the data once.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
_SHARD = 1000  # images
_KINDS = 50  # different pictures: making more takes longer than reading them
_BEGIN = """
import sys, onnxcop
from onnxcop.calibration.calibrate import gather_statistics
from onnxcop.data.open import input_specs, open_source
from onnxcop.graph.io import load
from onnxcop.training.distill import DistillOptions, Effort, distill
model, other, data, count = sys.argv[1:]
cpu = onnxcop.EngineOptions("cpu", 1)
analysis = onnxcop.analyze(model)
source = open_source(data, input_specs(analysis), samples=int(count), batch_size=32)
assert source.count == int(count)
"""
_WORK = {
    "statistics": "assert gather_statistics(analysis, source, cpu).samples == int(count)",
    "evaluation": """
found = onnxcop.compare(model, other, data=data, samples=int(count), options=cpu, latency_seconds=0).agreement
assert found.samples == int(count) and found.figures is not None
""",
    "distillation": """
options = DistillOptions(effort=Effort(epochs=1.0), rate=1e-3, engine=cpu)
assert distill(load(other), load(model), source, options).steps
""",
}
_END = """
print(max(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def pictures() -> list[bytes]:
    """Different images as PNG files."""
    from PIL import Image

    found = []
    for seed in range(_KINDS):
        out = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(out, "PNG", compress_level=0)
        found.append(out.getvalue())
    return found


def folder(path: Path, count: int) -> None:
    """Images in a folder."""
    path.mkdir()
    for number, data in zip(range(count), pictures() * count, strict=False):
        (path / f"{number}.png").write_bytes(data)


def npy(path: Path, count: int) -> None:
    """Arrays of pixels."""
    rng = np.random.default_rng(0)
    np.save(path.with_suffix(".npy"), rng.integers(0, 255, (count, 3, 32, 32), np.uint8).astype(np.float32))


def tar(path: Path, count: int) -> None:
    """Images in a tar file."""
    with tarfile.open(path.with_suffix(".tar"), "w") as file:
        for number, data in zip(range(count), pictures() * count, strict=False):
            about = tarfile.TarInfo(f"{number}.png")
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))


def parquet(path: Path, count: int) -> None:
    """Images in a Parquet file, 100 in a row group."""
    import pyarrow
    from pyarrow.parquet import write_table

    found = (pictures() * (count // _KINDS + 1))[:count]
    write_table(pyarrow.table({"image": found}), path.with_suffix(".parquet"), row_group_size=100)


FORMS: dict[str, Callable[[Path, int], None]] = {"folder": folder, "npy": npy, "tar": tar, "parquet": parquet}


def written(form: str, count: int, place: Path) -> Path:
    """A data set of some images.

    Args:
        form: The form of the data.
        count: How many images.
        place: Where to write them.
    """
    data = place / f"{form}-{count}"
    data.mkdir()
    for first in range(0, count, _SHARD):
        FORMS[form](data / f"{first:07d}", min(_SHARD, count - first))
    return data


def peak(work: str, data: Path, count: int) -> float:
    """MB that some work over a number of images takes."""
    models = [str(network(data.parent, seed)) for seed in (0, 1)]
    command = [sys.executable, "-c", _BEGIN + _WORK[work] + _END, *models, str(data), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.splitlines()[-1]) / 1024


def network(place: Path, seed: int) -> Path:
    """A small convolutional network for these images."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)  # the other model differs a little
    noise = np.random.default_rng(1)
    shapes = {"w0": (8, 3, 3, 3), "w1": (16, 8, 3, 3), "w2": (16, 5)}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], strides=[4, 4]), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]), helper.make_node("MatMul", ["e", "w2"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [
            numpy_helper.from_array((rng.normal(size=n) + 0.1 * seed * noise.normal(size=n)).astype(np.float32), name)
            for name, n in shapes.items()
        ],
    )  # fmt: skip
    path = place / f"small{seed}.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", help=", ".join(FORMS))
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--work", nargs="+", choices=list(_WORK), default=list(_WORK))
    given = parser.parse_args(arguments)
    print("| data | work | " + " | ".join(f"{count:,} images, MB" for count in given.counts) + " |")
    print("|---|---|" + "---|" * len(given.counts))
    for form in given.forms or FORMS:
        peaks: dict[str, list[float]] = {work: [] for work in given.work}
        for count in given.counts:
            with tempfile.TemporaryDirectory(prefix="bench-") as place:
                data = written(form, count, Path(place))
                for work in given.work:
                    peaks[work].append(peak(work, data, count))
        for work, found in peaks.items():
            print(f"| {form} | {work} | " + " | ".join(f"{one:.0f}" for one in found) + " |", flush=True)


if __name__ == "__main__":
    main()
