"""Removal of activation rounding from quantized models, for comparison only.

Rounding turns differences in the last bits into whole steps, and a deep model multiplies them. Two models that are
equal up to such noise then differ visibly. So before two models are compared, pairs of QuantizeLinear and
DequantizeLinear on activations are bypassed in both. Operators that compute on quantized tensors are first replaced by
their floating-point equivalents: `QLinearConv` becomes DequantizeLinear, Conv on floating-point weights, and
QuantizeLinear. Quantized weights stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcop._base.types import Array
from onnxcop.graph.edit import copied, replace_all
from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import MOVES, Trait, traits

Attributes = dict[str, Any]
_OTHER_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)


def rounds(model: onnx.ModelProto) -> bool:
    """Whether the model quantizes tensors at run time."""
    return computes_rounded(model) or any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which activations are not rounded.

    A QuantizeLinear is bypassed if it reaches only DequantizeLinear nodes, through operators that only move elements.
    It stays if an integer operator reads its output.
    """
    result = copied(model)
    write_twins(result)
    graph = result.graph
    flow = _Flow(graph)
    floats: dict[str, set[str]] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in flow.stored:
            reached = flow.reached(node.output[0])
            if reached is not None:
                floats[node.output[0]] = reached
    bypassed = flow.consistent(floats)
    for node in graph.node:
        starts = node.op_type == "QuantizeLinear" and node.output[0] in floats
        ends = node.op_type == "DequantizeLinear" and node.input[0] in bypassed
        if starts or ends:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
            del node.attribute[:]
    kept = [value for value in graph.value_info if value.name not in bypassed]
    replace_all(graph.value_info, kept)
    return result


class _Flow:
    """The readers of every tensor of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.stored = {tensor.name for tensor in graph.initializer}
        self.fixed = {value.name for value in graph.output}
        self.joins: list[onnx.NodeProto] = []
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
            self.fixed |= captured(node)
            if node.op_type == "Constant":
                self.stored.add(node.output[0])
            elif traits(node) & Trait.JOINS:
                self.joins.append(node)

    def reached(self, start: str) -> set[str] | None:
        """Integer tensors from a QuantizeLinear to its ends; None if another operator reads one of them."""
        integer, pending = {start}, [start]
        while pending:
            name = pending.pop()
            if name in self.fixed:
                return None
            for node in self.readers[name]:
                if node.op_type == "DequantizeLinear" and name not in node.input[1:]:
                    continue
                if not traits(node) & (MOVES | Trait.SELECTS) or (len(node.output) != 1 and node.op_type != "Split"):
                    return None
                if name in node.input[1:] and not traits(node) & Trait.JOINS:
                    return None
                new = [output for output in node.output if output not in integer]
                integer.update(new)
                pending += new
        return integer

    def consistent(self, floats: dict[str, set[str]]) -> set[str]:
        """All bypassed tensors; sources that meet an integer tensor in a Concat are dropped, in place."""
        while True:
            bypassed = {name for reached in floats.values() for name in reached}
            mixed = {
                node.output[0]
                for node in self.joins
                if node.output[0] in bypassed and not bypassed.issuperset(node.input)
            }
            if not mixed:
                return bypassed
            for start in [start for start, reached in floats.items() if reached & mixed]:
                del floats[start]


@dataclass(slots=True)
class _Writer:
    """Writes the floating-point equivalent of one node."""

    graph: onnx.GraphProto
    stored: dict[str, onnx.TensorProto]
    node: onnx.NodeProto
    attributes: Attributes
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    added: int = 0

    def has(self, position: int) -> bool:
        return position < len(self.node.input) and bool(self.node.input[position])

    def read(self, position: int) -> Array:
        """A stored operand.||Raises:|    ValueError: The operand is computed."""
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
        """An activation in floating point; `scale` is followed by its zero point among the inputs."""
        operands = [name for name in self.node.input[position : position + 3] if name]
        return self.add("DequantizeLinear", operands)

    def weights(self, position: int, axis: int) -> str:
        """Stored weights in floating point, with scales and zero points along `axis`."""
        values = self.read(position).astype(np.float64)
        for operand, act in ((position + 2, np.subtract), (position + 1, np.multiply)):
            if self.has(operand):
                values = act(values, _along(self.read(operand).astype(np.float64), axis, values.ndim))
        return self.constant(values)

    def rounded(self, result: str, scale: int) -> None:
        """Quantize the result with the scale and zero point at input `scale`."""
        operands = [name for name in self.node.input[scale : scale + 2] if name]
        self.add("QuantizeLinear", [result, *operands], self.node.output[0])


def _along(values: Array, axis: int, rank: int) -> Array:
    """Values of one axis in a shape that broadcasts; a single value as it is."""
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
    """Replace every node that computes on quantized tensors and has an equivalent, in place.

    Nodes with computed weights, channels on the last axis, or scales that are not float32 stay as they are.
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
    replace_all(graph.node, nodes)


def computes_rounded(model: onnx.ModelProto) -> bool:
    """Whether the model has operators that compute on quantized tensors and have a floating-point equivalent."""
    return any(node.op_type in _TWINS for node in model.graph.node)
