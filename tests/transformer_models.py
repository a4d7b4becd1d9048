"""Small transformers that tests build for themselves, written as exporters write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Net:
    """A graph under construction; tensors are called by name, weights are seeded.

    Args:
        seed: Seed of the weights.
        opset: Opset of ONNX's own operators.
    """

    def __init__(self, seed: int = 0, opset: int = 17) -> None:
        self.rng, self.opset = np.random.default_rng(seed), opset
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Make a tensor a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """A stored tensor."""
        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weights(self, *shape: int, scale: float | None = None) -> str:
        """Random weights that keep activations near 1."""
        scale = shape[0] ** -0.5 if scale is None else scale
        return self.constant(self.rng.standard_normal(shape) * scale)

    def add(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Append a node; returns its first output, the others end in _1, _2 …"""
        name = f"{op.lower()}_{len(self.nodes)}"
        names = [name, *(f"{name}_{number}" for number in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, f"node_{name}", domain=domain, **attributes))
        return name

    def linear(self, x: str, ins: int, outs: int) -> str:
        """A matrix product with a bias, as exporters write nn.Linear on three axes."""
        return self.add("Add", self.weights(outs, scale=0.3), self.add("MatMul", x, self.weights(ins, outs)))

    def norm(self, x: str, width: int) -> str:
        """A layer normalization."""
        scale = self.constant(1 + 0.2 * self.rng.standard_normal(width))
        return self.add("LayerNormalization", x, scale, self.weights(width, scale=0.2), axis=-1, epsilon=1e-5)

    def gelu(self, x: str) -> str:
        """GELU by the error function."""
        half = self.add("Div", x, self.constant(np.sqrt(2.0)))
        grown = self.add("Add", self.add("Erf", half), self.constant(1.0))
        return self.add("Mul", self.add("Mul", x, grown), self.constant(0.5))

    def ints(self, *values: int) -> str:
        """A vector of sizes."""
        return self.constant(values, np.int64)

    def heads(self, x: str, count: int, size: int, order: Sequence[int] = (0, 2, 1, 3)) -> str:
        """Split the last of three axes into heads and move them forward."""
        return self.add("Transpose", self.add("Reshape", x, self.ints(0, 0, count, size)), perm=list(order))

    def merged(self, x: str, width: int) -> str:
        """Undo `heads`."""
        return self.add("Reshape", self.add("Transpose", x, perm=[0, 2, 1, 3]), self.ints(0, 0, width))

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(self.nodes, "transformer", self.inputs, self.outputs, self.stored)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        used = {node.domain for node in self.nodes}
        return helper.make_model(graph, opset_imports=[o for o in opsets if o.domain in used], ir_version=10)


def bert(width: int = 32, heads: int = 4, hidden: int = 48, layers: int = 2, tokens: int = 6) -> onnx.ModelProto:
    """A BERT encoder as PyTorch's exporter writes it: ids and a mask in, the first token's classes out."""
    net, size = Net(), width // heads
    ids = net.input("input_ids", ["batch", tokens], TensorProto.INT64)
    mask = net.input("attention_mask", ["batch", tokens], TensorProto.INT64)
    kinds = net.input("token_type_ids", ["batch", tokens], TensorProto.INT64)
    x = net.add("Gather", net.weights(11, width, scale=1.0), ids, axis=0)
    x = net.add("Add", x, net.add("Gather", net.weights(2, width, scale=1.0), kinds, axis=0))
    places = net.constant([range(tokens)], np.int64)
    x = net.add("Add", x, net.add("Gather", net.weights(16, width, scale=1.0), places, axis=0))
    x = net.norm(x, width)
    wide = net.add("Unsqueeze", net.add("Unsqueeze", mask, net.ints(1)), net.ints(2))
    absent = net.add("Sub", net.constant(1.0), net.add("Cast", wide, to=TensorProto.FLOAT))
    bias = net.add("Mul", absent, net.constant(-10000.0))
    for _ in range(layers):
        q = net.heads(net.linear(x, width, width), heads, size)
        k = net.heads(net.linear(x, width, width), heads, size, (0, 2, 3, 1))
        v = net.heads(net.linear(x, width, width), heads, size)
        scores = net.add("Div", net.add("MatMul", q, k), net.constant(np.sqrt(size)))
        shares = net.add("Softmax", net.add("Add", scores, bias), axis=-1)
        mixed = net.merged(net.add("MatMul", shares, v), width)
        x = net.norm(net.add("Add", net.linear(mixed, width, width), x), width)
        inner = net.gelu(net.linear(x, width, hidden))
        x = net.norm(net.add("Add", net.linear(inner, hidden, width), x), width)
    first = net.add("Gather", x, net.constant(0, np.int64), axis=1)
    pooled = net.add("Tanh", net.add("Gemm", first, net.weights(width, width), net.weights(width, scale=0.3)))
    net.output(net.add("Gemm", pooled, net.weights(width, 3)), ["batch", 3])
    return net.model()
