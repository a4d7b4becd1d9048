"""Operators that compute on quantized tensors, written out with their floating point twins.

For comparison only: `QLinearConv` becomes DequantizeLinear, Conv on floating point weights, and
QuantizeLinear, so that what rounds stands apart from what computes and can be left out
(:mod:`onnxcop.verification.dequantize`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcop._base.types import Array

Attributes = dict[str, Any]

_OTHER_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)


@dataclass(slots=True)
class _Writer:
    """Writes the twin of one node."""

    graph: onnx.GraphProto
    stored: dict[str, onnx.TensorProto]
    node: onnx.NodeProto
    attributes: Attributes
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    added: int = 0

    def has(self, position: int) -> bool:
        return position < len(self.node.input) and bool(self.node.input[position])

    def read(self, position: int) -> Array:
        """A stored operand; ValueError where it is computed."""
        name = self.node.input[position]
        if name not in self.stored:
            raise ValueError(name)
        return numpy_helper.to_array(self.stored[name])

    def fresh(self) -> str:
        self.added += 1
        return f"{self.node.output[0]}__twin{self.added}"

    def constant(self, values: Array) -> str:
        name = self.fresh()
        self.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def add(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or self.fresh()
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}__{op}", **attributes))
        return output

    def floats(self, position: int) -> str:
        """An activation in floating point; its scale and zero point follow it."""
        operands = [name for name in self.node.input[position : position + 3] if name]
        return self.add("DequantizeLinear", operands)

    def weights(self, position: int, axis: int) -> str:
        """Stored weights in floating point; their scales and zero points follow, and run along `axis`."""
        values = self.read(position).astype(np.float64)
        for operand, act in ((position + 2, np.subtract), (position + 1, np.multiply)):
            if self.has(operand):
                values = act(values, _along(self.read(operand).astype(np.float64), axis, values.ndim))
        return self.constant(values)

    def rounded(self, result: str, scale: int) -> None:
        """Quantize the result with the scale and zero point at `scale`."""
        operands = [name for name in self.node.input[scale : scale + 2] if name]
        self.add("QuantizeLinear", [result, *operands], self.node.output[0])


def _along(values: Array, axis: int, rank: int) -> Array:
    """Values of one axis, shaped to broadcast; a single one as it is."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if place == axis % rank else 1 for place in range(rank)])


def _conv(w: _Writer) -> None:
    operands = [w.floats(0), w.weights(3, 0)]
    if w.has(8):
        operands.append(w.constant(w.read(8) * w.read(1).astype(np.float64) * w.read(4).reshape(-1)))
    w.rounded(w.add("Conv", operands, **w.attributes), 6)


def _operand(w: _Writer, position: int, axis: int) -> str:
    return w.weights(position, axis) if w.node.input[position] in w.stored else w.floats(position)


def _matmul(w: _Writer) -> None:
    w.rounded(w.add("MatMul", [_operand(w, 0, -2), _operand(w, 3, -1)]), 6)


def _gemm(w: _Writer) -> None:
    columns = 0 if w.attributes.get("transB", 0) else 1
    operands = [w.floats(0), _operand(w, 3, columns)]
    if w.has(6):
        operands.append(w.constant(w.read(6) * w.read(1).astype(np.float64) * w.read(4).reshape(-1)))
    w.rounded(w.add("Gemm", operands, **w.attributes), 7)


def _binary(op: str) -> Callable[[_Writer], None]:
    return lambda w: w.rounded(w.add(op, [w.floats(0), w.floats(3)]), 6)


def _unary(op: str) -> Callable[[_Writer], None]:
    return lambda w: w.rounded(w.add(op, [w.floats(0)], **w.attributes), 3)


def _concat(w: _Writer) -> None:
    parts = [w.floats(position) for position in range(2, len(w.node.input), 3)]
    w.rounded(w.add("Concat", parts, **w.attributes), 0)


_TWINS: dict[str, Callable[[_Writer], None]] = {
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearAveragePool": _unary("AveragePool"),
    "QLinearConcat": _concat,
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearMatMul": _matmul,
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
}


def write_twins(model: onnx.ModelProto) -> None:
    """Write out every node that computes on quantized tensors and can be, in place.

    Left as they are: weights that are not stored, channels on the last axis, scales that are not float32.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        twin = _TWINS.get(node.op_type)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        halves = any(stored[name].data_type in _OTHER_FLOATS for name in node.input if name in stored)
        if twin is None or halves or attributes.pop("channels_last", 0):
            nodes.append(node)
            continue
        writer = _Writer(graph, stored, node, attributes)
        try:
            twin(writer)
        except ValueError:  # an operand that should be stored is computed
            nodes.append(node)
            continue
        nodes += writer.nodes
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def computes_rounded(model: onnx.ModelProto) -> bool:
    """Whether the model has operators that compute on quantized tensors and have a twin."""
    return any(node.op_type in _TWINS for node in model.graph.node)
