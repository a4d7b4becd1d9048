"""How much memory a run takes, over the size of the model: models of many sizes, each pruned in a process of its own.

    ONNXCOP_ZOO=... python tools/bench_memory.py                 # all that are found, as a table in Markdown
    python tools/bench_memory.py bert large                      # some of them
    python tools/bench_memory.py large --recover                 # with recovery on synthetic inputs, the default
    python tools/bench_memory.py mobilenet --samples 300

`bert`, `large` and `unet` are made here, with random weights: transformer encoders of BERT-base's shape and of 2.2 GB,
and a UNet of Stable Diffusion's shape of 3.4 GB. The others come from the zoo. A model that will not fit is not run,
and the table says what it would need. Peak is the largest resident set of the process, mapped files included; swap is
not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onnxcop._base.memory import Need  # noqa: E402

ZOO = Path(os.environ.get("ONNXCOP_ZOO") or ROOT.parent / "shared" / "zoo")
# A process counts what its parent held when it was forked, so runs are forked from a process that holds nothing.
_LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(used.ru_maxrss, used.ru_utime + used.ru_stime, process.returncode)
"""
_L2 = ("--criterion", "l2", "--recover", "none")
_L2_RECOVERED = ("--criterion", "l2", "--recover", "full")  # the default, where it fits into memory


@dataclass(frozen=True)
class Case:
    """A model and how it is pruned."""

    name: str
    model: Path
    options: tuple[str, ...]


class Network:
    """A network with random weights, written as exporters write one.

    Args:
        data: Where weights are written, to lie beside the model; None to hold them in it.
    """

    def __init__(self, data: BinaryIO | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self._data = data
        self._rng = np.random.default_rng(0)

    def weight(self, name: str, *shape: int) -> str:
        """Random weights; the first axis of a matrix, all but the first of a kernel, are summed over."""
        inputs = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        values = self._rng.standard_normal(shape, dtype=np.float32) * np.float32(inputs**-0.5)
        if self._data is None:
            self.stored.append(numpy_helper.from_array(values, name))
            return name
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        places = (("location", Path(self._data.name).name), ("offset", self._data.tell()), ("length", values.nbytes))
        for key, value in places:
            tensor.external_data.add(key=key, value=str(value))
        values.tofile(self._data)
        self.stored.append(tensor)
        return name

    def constant(self, name: str, values: Any) -> str:
        """A small tensor."""
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node of one output."""
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """MatMul and Add."""
        product = self.add("MatMul", [x, self.weight(f"{name}.w", inputs, outputs)], f"{name}.product")
        bias = self.constant(f"{name}.b", np.zeros(outputs, np.float32))
        return self.add("Add", [product, bias], f"{name}.out")

    def conv(self, x: str, name: str, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> str:
        """A convolution that keeps rows and columns, or halves them."""
        weights = self.weight(f"{name}.w", outputs, inputs, size, size)
        bias = self.constant(f"{name}.b", np.zeros(outputs, np.float32))
        pads, strides = [size // 2] * 4, [stride] * 2
        return self.add("Conv", [x, weights, bias], f"{name}.out", pads=pads, strides=strides)

    def norm(self, x: str, name: str, width: int) -> str:
        """LayerNormalization."""
        scale = self.constant(f"{name}.scale", np.ones(width, np.float32))
        shift = self.constant(f"{name}.shift", np.zeros(width, np.float32))
        return self.add("LayerNormalization", [x, scale, shift], f"{name}.out", axis=-1)

    def attention(self, x: str, name: str, width: int, heads: int) -> str:
        """Self-attention of tokens [N, S, width], with a residual connection."""
        split = self.constant(f"{name}.splits", np.array([0, 0, heads, width // heads]))
        joined = self.constant(f"{name}.joins", np.array([0, 0, width]))
        root = self.constant(f"{name}.root", np.float32((width // heads) ** -0.5))
        parts = []
        for kind in ("q", "k", "v"):
            shaped = self.add(
                "Reshape", [self.linear(x, f"{name}.{kind}", width, width), split], f"{name}.{kind}.split"
            )
            order = [0, 2, 3, 1] if kind == "k" else [0, 2, 1, 3]
            parts.append(self.add("Transpose", [shaped], f"{name}.{kind}.heads", perm=order))
        scores = self.add("Mul", [self.add("MatMul", parts[:2], f"{name}.scores"), root], f"{name}.scaled")
        seen = self.add("MatMul", [self.add("Softmax", [scores], f"{name}.weights", axis=-1), parts[2]], f"{name}.seen")
        back = self.add("Transpose", [seen], f"{name}.back", perm=[0, 2, 1, 3])
        attended = self.linear(self.add("Reshape", [back, joined], f"{name}.merged"), f"{name}.o", width, width)
        return self.add("Add", [x, attended], f"{name}.sum")

    def model(self, name: str, value: onnx.ValueInfoProto, shape: list[Any]) -> onnx.ModelProto:
        """The model that ends in the last node."""
        self.nodes[-1].output[0] = "y"
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, name, [value], [output], self.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def encoder(
    layers: int, width: int, inner: int, words: int, length: int = 16, heads: int = 12, data: BinaryIO | None = None
) -> onnx.ModelProto:
    """A transformer encoder."""
    net = Network(data)
    x = net.add("Gather", [net.weight("words", words, width), "ids"], "embedded")
    for place in range(layers):
        name = f"layer{place}"
        x = net.norm(net.attention(x, name, width, heads), f"{name}.norm1", width)
        hidden = net.add("Erf", [net.linear(x, f"{name}.up", width, inner)], f"{name}.act")
        down = net.linear(hidden, f"{name}.down", inner, width)
        x = net.norm(net.add("Add", [x, down], f"{name}.sum2"), f"{name}.norm2", width)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", length])
    return net.model("encoder", ids, ["N", length, width])


def unet(widths: Sequence[int], data: BinaryIO | None = None, rows: int = 16) -> onnx.ModelProto:
    """The shape of a Stable Diffusion UNet: residual and transformer blocks down and up, joined by Concat."""
    net = Network(data)

    def residual(x: str, name: str, inputs: int, outputs: int) -> str:
        inner = net.conv(net.add("LeakyRelu", [x], f"{name}.act1"), f"{name}.conv1", inputs, outputs)
        made = net.conv(net.add("LeakyRelu", [inner], f"{name}.act2"), f"{name}.conv2", outputs, outputs)
        short = x if inputs == outputs else net.conv(x, f"{name}.short", inputs, outputs, 1)
        return net.add("Add", [made, short], f"{name}.sum")

    def transformer(x: str, name: str, width: int, side: int) -> str:
        flat = net.constant(f"{name}.flat", np.array([0, width, side * side]))
        square = net.constant(f"{name}.square", np.array([0, width, side, side]))
        tokens = net.add("Transpose", [net.add("Reshape", [x, flat], f"{name}.r1")], f"{name}.t1", perm=[0, 2, 1])
        tokens = net.norm(net.attention(tokens, f"{name}.self", width, 8), f"{name}.norm1", width)
        tokens = net.norm(net.attention(tokens, f"{name}.cross", width, 8), f"{name}.norm2", width)
        gate = net.add("Sigmoid", [net.linear(tokens, f"{name}.gate", width, 4 * width)], f"{name}.sigmoid")
        up = net.add("Mul", [gate, net.linear(tokens, f"{name}.up", width, 4 * width)], f"{name}.gated")
        tokens = net.add("Add", [tokens, net.linear(up, f"{name}.down", 4 * width, width)], f"{name}.tokens")
        back = net.add("Transpose", [tokens], f"{name}.t2", perm=[0, 2, 1])
        return net.add("Add", [x, net.add("Reshape", [back, square], f"{name}.r2")], f"{name}.out")

    x, side, width = net.conv("x", "stem", 4, widths[0]), rows, widths[0]
    kept = [(x, width)]
    for level, wide in enumerate(widths):
        for number in range(2):
            x, width = residual(x, f"down{level}.{number}", width, wide), wide
            if level < len(widths) - 1:
                x = transformer(x, f"down{level}.{number}.t", width, side)
            kept.append((x, width))
        if level < len(widths) - 1:
            x, side = net.conv(x, f"down{level}.half", width, width, stride=2), side // 2
            kept.append((x, width))
    x = transformer(residual(x, "middle.0", width, width), "middle.t", width, side)
    x = transformer(residual(x, "middle.1", width, width), "middle.t2", width, side)
    for level in reversed(range(len(widths))):
        for number in range(3):
            other, others = kept.pop()
            joined = net.add("Concat", [x, other], f"up{level}.{number}.joined", axis=1)
            x, width = residual(joined, f"up{level}.{number}", width + others, widths[level]), widths[level]
            if level < len(widths) - 1:
                x = transformer(x, f"up{level}.{number}.t", width, side)
        if level:
            factors = net.constant(f"up{level}.factors", np.array([1, 1, 2, 2], np.float32))
            x, side = net.add("Resize", [x, "", factors], f"up{level}.twice", mode="nearest"), 2 * side
            x = net.conv(x, f"up{level}.after", width, width)
    net.conv(x, "head", width, 4)
    return net.model("unet", helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, rows, rows]),
                     ["N", 4, rows, rows])  # fmt: skip


def cases(names: list[str], samples: int, folder: Path, *, recover: bool = False) -> Iterator[Case]:
    """The chosen cases, whose models are made or found one by one; with or without recovery on synthetic inputs."""
    plain, how = (_L2_RECOVERED, "l2 and recovery") if recover else (_L2, "l2")
    if "bert" in names:
        onnx.save(encoder(12, 768, 3072, 30522), folder / "bert.onnx")
        yield Case(f"BERT-base's shape, {how}", folder / "bert.onnx", plain)
    if "large" in names:
        with (folder / "large.data").open("wb") as data:
            onnx.save(encoder(16, 1600, 6400, 30522, heads=25, data=data), folder / "large.onnx")
        yield Case(f"transformer encoder, weights beside it, {how}", folder / "large.onnx", plain)
    if "unet" in names:
        with (folder / "unet.data").open("wb") as data:
            onnx.save(unet((320, 640, 1280, 1280), data), folder / "unet.onnx")
        yield Case(f"UNet, weights beside it, {how}", folder / "unet.onnx", plain)
    for name, skeleton in (("alexnet", "tv_alexnet.legacy"), ("resnet50", "resnet50.legacy")):
        if name in names and (ZOO / "skeletons" / f"{skeleton}.onnx").exists():
            path = folder / f"{name}.onnx"
            source = ZOO / "skeletons" / f"{skeleton}.onnx"
            subprocess.run([sys.executable, ZOO / "skeleton.py", "fill", source, path], check=True)
            yield Case(f"{name}, {how}", path, plain)
    data = ("--data", str(ZOO / "data" / "imagenet_calib"), "--samples", str(samples))
    model = ZOO / "trained" / "imagenet_mobilenet_v2.onnx"
    if "mobilenet" in names and model.exists():
        yield Case(f"MobileNetV2, {samples} images, measured", model, data)
    model = ZOO / "trained" / "yolov8n_320.onnx"
    if "yolo" in names and model.exists():
        yield Case(f"YOLOv8n, {how}", model, plain)


def size(path: Path) -> int:
    """Bytes of a model with the weights beside it."""
    data = path.with_suffix(".data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def peak(case: Case, out: Path) -> tuple[float, float, int]:
    """Peak of the resident set in bytes, seconds of CPU, and exit code of a run."""
    command = [sys.executable, "-m", "onnxcop", str(case.model), "-o", str(out), "--provider", "cpu", "--threads", "1",
               "--latency-seconds", "0", "--macs", "0.7", "-q", *case.options]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _LAUNCHER, *command], check=True, stdout=subprocess.PIPE, text=True)
    kilobytes, seconds, code = done.stdout.split()[-3:]
    return float(kilobytes) * 1024, float(seconds), int(code)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["bert", "alexnet", "resnet50", "mobilenet", "yolo", "large", "unet"]
    parser.add_argument("name", nargs="*", help=f"of {', '.join(every)}; all by default")
    parser.add_argument("--samples", type=int, default=300, help="images for MobileNetV2")
    parser.add_argument("--recover", action="store_true", help="cut by l2 with recovery on synthetic inputs")
    options = parser.parse_args()
    print("| model | size | peak | peak / size | CPU |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases(options.name or every, options.samples, folder, recover=options.recover):
            bytes_ = size(case.model)
            shortage = Need(bytes_, recovers=case.options != _L2).shortage()
            if shortage:
                print(f"| {case.name} | {bytes_ / 1e6:.0f} MB | not run: {shortage} | | |", flush=True)
                continue
            found, seconds, code = peak(case, folder / "out.onnx")
            for path in folder.iterdir():  # the next one needs the room
                path.unlink()
            state = "" if code == 0 else f" (exit code {code})"
            print(
                f"| {case.name} | {bytes_ / 1e6:.0f} MB | {found / 1e6:.0f} MB | {found / bytes_:.1f} | "
                f"{seconds:.0f} s{state} |", flush=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
