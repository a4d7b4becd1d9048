#!/usr/bin/env python3
"""Measures how long a large graph takes to analyse, and how much memory.

    python tools/bench_trace.py                    # 1,000 to 10,000 nodes
    python tools/bench_trace.py 2000 --width 64

The graph is a residual network of blocks Conv, BatchNormalization, Relu, Conv, BatchNormalization,
Add, Relu; the width doubles four times on the way. Loading is left out. Every size runs in a
process of its own, so that its peak memory is its own; it is counted above what the process holds
before the analysis, in multiples of the model's size.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = (1000, 2000, 5000, 10000)
STAGES = 5


class Builder:
    """Collects the nodes and weights of a network."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """Append a node; returns its output."""
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        """Store a random float32 tensor; returns its name."""
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape, dtype=np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 3) -> str:
        """Convolution and BatchNormalization."""
        pads = [kernel // 2] * 4
        x = self.node("Conv", [x, self.weight(outputs, inputs, kernel, kernel)], pads=pads)
        return self.node("BatchNormalization", [x, *(self.weight(outputs) for _ in range(4))])


def residual_network(nodes: int, width: int) -> onnx.ModelProto:
    """A residual network of (nearly) `nodes` nodes, `width` channels in its first stage."""
    builder = Builder()
    x = builder.conv("input", 3, width)
    stage_length = (nodes - 3 - 2 * STAGES) // (7 * STAGES)
    channels = width
    for stage in range(STAGES):
        if stage:
            x = builder.conv(x, channels, 2 * channels, 1)
            channels *= 2
        for _ in range(stage_length):
            y = builder.node("Relu", [builder.conv(x, channels, channels)])
            y = builder.conv(y, channels, channels)
            x = builder.node("Relu", [builder.node("Add", [x, y])])
    x = builder.node("Flatten", [builder.node("GlobalAveragePool", [x])])
    builder.node("Gemm", [x, builder.weight(10, channels), builder.weight(10)], transB=1)
    builder.nodes[-1].output[0] = "output"
    graph = helper.make_graph(
        builder.nodes, "residual",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 10])],
        builder.weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resident() -> int:
    """Bytes of memory this process holds."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def give_back() -> None:
    """Return freed memory to the system, so that it is not counted as held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only; elsewhere the numbers are rougher
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """The largest resident memory while the block runs, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        give_back()
        self.before = self.most = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, resident())


def measure(nodes: int, width: int) -> dict[str, float]:
    """Analyse one network; all modules are imported and warm before."""
    from onnxcop.analysis.analyze import analyze

    model = residual_network(nodes, width)
    analyze(residual_network(100, 8))
    with Peak() as peak:
        start, busy = time.perf_counter(), time.process_time()
        analysis = analyze(model)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        "nodes": len(model.graph.node), "atoms": len(analysis.structure.coupling.classes.of),
        "groups": len(analysis.structure.groups), "model": model.ByteSize(),
        "seconds": seconds, "busy": busy,
        "memory": peak.most - peak.before,
    }  # fmt: skip


def main() -> None:
    """Measure all sizes and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("nodes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.nodes[0], options.width)))
        return
    print("| nodes | atoms | groups | model, MB | seconds | CPU s | CPU ms per node | MB | × model |")
    print("|---|---|---|---|---|---|---|---|---|")
    for nodes in options.nodes:
        command = [sys.executable, __file__, str(nodes), "--width", str(options.width), "--one"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        print(
            f"| {found['nodes']} | {found['atoms']} | {found['groups']} "
            f"| {found['model'] / 1e6:.1f} "
            f"| {found['seconds']:.2f} | {found['busy']:.2f} "
            f"| {found['busy'] / found['nodes'] * 1e3:.3f} "
            f"| {found['memory'] / 1e6:.0f} | {found['memory'] / found['model']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
