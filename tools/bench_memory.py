"""How much memory a run takes, over the size of the model: six models, each pruned in a process of its own.

    ONNXCOP_ZOO=... python tools/bench_memory.py                 # all that are found, as a table in Markdown
    python tools/bench_memory.py bert large                      # some of them
    python tools/bench_memory.py mobilenet --samples 300

`bert` and `large` are made here: transformer encoders with random weights, of BERT-base's shape and of 2.2 GB. The
others come from the zoo. Peak is the largest resident set of the process, mapped files included; swap is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
ZOO = Path(os.environ.get("ONNXCOP_ZOO") or ROOT.parent / "shared" / "zoo")
_L2 = ("--criterion", "l2", "--recover", "none")


@dataclass(frozen=True)
class Case:
    """A model and how it is pruned."""

    name: str
    model: Path
    options: tuple[str, ...]


def encoder(layers: int, width: int, inner: int, words: int, length: int = 16, heads: int = 12) -> onnx.ModelProto:
    """A transformer encoder with random weights, as exporters write one: MatMul, Add, Reshape, Transpose, Softmax."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[0] ** -0.5)
        stored.append(numpy_helper.from_array(values, name))
        return name

    def numbers(name: str, *values: int) -> str:
        stored.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def linear(x: str, name: str, inputs: int, outputs: int) -> str:
        product = add("MatMul", [x, weight(f"{name}.w", inputs, outputs)], f"{name}.product")
        stored.append(numpy_helper.from_array(np.zeros(outputs, np.float32), f"{name}.b"))
        return add("Add", [product, f"{name}.b"], f"{name}.out")

    def norm(x: str, name: str) -> str:
        for kind, value in (("scale", 1.0), ("shift", 0.0)):
            stored.append(numpy_helper.from_array(np.full(width, value, np.float32), f"{name}.{kind}"))
        return add("LayerNormalization", [x, f"{name}.scale", f"{name}.shift"], f"{name}.out", axis=-1)

    split, joined = numbers("split", 0, 0, heads, width // heads), numbers("joined", 0, 0, width)
    root = numpy_helper.from_array(np.array((width // heads) ** -0.5, np.float32), "root")
    stored.append(root)
    x = add("Gather", [weight("words", words, width), "ids"], "embedded")
    for place in range(layers):
        name = f"layer{place}"
        parts = []
        for kind in ("q", "k", "v"):
            shaped = add("Reshape", [linear(x, f"{name}.{kind}", width, width), split], f"{name}.{kind}.split")
            order = [0, 2, 3, 1] if kind == "k" else [0, 2, 1, 3]
            parts.append(add("Transpose", [shaped], f"{name}.{kind}.heads", perm=order))
        scores = add("Mul", [add("MatMul", parts[:2], f"{name}.scores"), "root"], f"{name}.scaled")
        seen = add("MatMul", [add("Softmax", [scores], f"{name}.weights", axis=-1), parts[2]], f"{name}.seen")
        back = add("Transpose", [seen], f"{name}.back", perm=[0, 2, 1, 3])
        attended = linear(add("Reshape", [back, joined], f"{name}.merged"), f"{name}.o", width, width)
        x = norm(add("Add", [x, attended], f"{name}.sum"), f"{name}.norm1")
        hidden = add("Erf", [linear(x, f"{name}.up", width, inner)], f"{name}.act")
        x = norm(add("Add", [x, linear(hidden, f"{name}.down", inner, width)], f"{name}.sum2"), f"{name}.norm2")
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes, "encoder", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", length, width])], stored,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cases(names: list[str], samples: int, folder: Path) -> list[Case]:
    """The chosen cases, whose models are made or found."""
    found = []
    if "bert" in names:
        onnx.save(encoder(12, 768, 3072, 30522), folder / "bert.onnx")
        found.append(Case("BERT-base's shape, l2", folder / "bert.onnx", _L2))
    if "large" in names:
        model = encoder(24, 1600, 6400, 30522, heads=25)
        onnx.save(model, folder / "large.onnx", save_as_external_data=True, location="large.data")
        del model
        found.append(Case("2.2 GB beside the model, l2", folder / "large.onnx", _L2))
    for name, skeleton in (("alexnet", "tv_alexnet.legacy"), ("resnet50", "resnet50.legacy")):
        if name in names and (ZOO / "skeletons" / f"{skeleton}.onnx").exists():
            path = folder / f"{name}.onnx"
            source = ZOO / "skeletons" / f"{skeleton}.onnx"
            subprocess.run([sys.executable, ZOO / "skeleton.py", "fill", source, path], check=True)
            found.append(Case(f"{name}, l2", path, _L2))
    data = ("--data", str(ZOO / "data" / "imagenet_calib"), "--samples", str(samples))
    model = ZOO / "trained" / "imagenet_mobilenet_v2.onnx"
    if "mobilenet" in names and model.exists():
        found.append(Case(f"MobileNetV2, {samples} images, measured", model, data))
    model = ZOO / "trained" / "yolov8n_320.onnx"
    if "yolo" in names and model.exists():
        found.append(Case("YOLOv8n, l2", model, _L2))
    return found


def size(path: Path) -> int:
    """Bytes of a model with the weights beside it."""
    data = path.with_suffix(".data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def peak(case: Case, out: Path) -> tuple[float, float, int]:
    """Peak of the resident set in bytes, seconds of CPU, and exit code of a run."""
    command = [sys.executable, "-m", "onnxcop", str(case.model), "-o", str(out), "--provider", "cpu", "--threads", "1",
               "--latency-seconds", "0", "--macs", "0.7", "-q", *case.options]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_maxrss * 1024.0, used.ru_utime + used.ru_stime, process.returncode


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["bert", "alexnet", "resnet50", "mobilenet", "yolo", "large"]
    parser.add_argument("name", nargs="*", help=f"of {', '.join(every)}; all by default")
    parser.add_argument("--samples", type=int, default=300, help="images for MobileNetV2")
    options = parser.parse_args()
    print("| model | size | peak | peak / size | CPU |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases(options.name or every, options.samples, folder):
            found, seconds, code = peak(case, folder / "out.onnx")
            bytes_ = size(case.model)
            state = "" if code == 0 else f" (exit code {code})"
            print(
                f"| {case.name} | {bytes_ / 1e6:.0f} MB | {found / 1e6:.0f} MB | {found / bytes_:.1f} | "
                f"{seconds:.0f} s{state} |", flush=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
