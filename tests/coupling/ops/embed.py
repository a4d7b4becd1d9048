"""A sample between contractions: a small real graph whose channels can be pruned.

Every live axis of a data input comes from a matrix product with trained weights, and every axis of
every output is summed by one, so that whatever the rule leaves live can be removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ops.sample import IR_VERSION, Array, Sample, floats

SOURCE = 2  # size of an axis of the graph input that a producer widens
SINK = 2  # size of an axis of the graph output that a consumer sums into


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.fresh = 0

    def constant(self, values: Array) -> str:
        self.fresh += 1
        name = f"c{self.fresh}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, inputs: Sequence[str], output: str = "", **attributes: object) -> str:
        self.fresh += 1
        output = output or f"t{self.fresh}"
        self.nodes.append(helper.make_node(op, inputs, [output], f"n{self.fresh}", **attributes))
        return output


def embed(sample: Sample, output_shapes: Sequence[tuple[int, ...]], types: Sequence[int]) -> onnx.ModelProto:
    """Build the graph.

    Args:
        sample: The node under test.
        output_shapes: Shapes of its outputs.
        types: Their element types.
    """
    graph = _Graph()
    names = []
    for position, value in enumerate(sample.inputs):
        if value is None:
            names.append("")
        elif position in sample.data:
            name = _produce(graph, position, value, sample.data[position])
            if sample.prepare and value.dtype.kind == "f":
                name = graph.add(sample.prepare, [name])
            names.append(_as_type(graph, name, value.dtype))
        else:
            graph.constants.append(numpy_helper.from_array(value, sample.name(position)))
            names.append(sample.name(position))
    graph.nodes.append(sample.node(names))
    for name, shape, kind in zip(sample.output_names(), output_shapes, types, strict=True):
        _consume(graph, name, shape, kind)
    proto = helper.make_graph(graph.nodes, "embedded", graph.inputs, graph.outputs, graph.constants)
    return helper.make_model(proto, opset_imports=sample.opsets, ir_version=IR_VERSION)


def _produce(graph: _Graph, position: int, value: Array, live: tuple[int, ...]) -> str:
    """A float tensor of the shape of `value` whose axes `live` come from weights."""
    rank = value.ndim
    live = tuple(axis % rank for axis in live)
    shape = [SOURCE if axis in live else size for axis, size in enumerate(value.shape)]
    name = f"x{position}"
    graph.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for axis in live:
        weights = floats((SOURCE, value.shape[axis]), seed=10 * position + axis)
        if rank == 2 and axis == 1:
            bias = graph.constant(floats((value.shape[1],), seed=99))
            name = graph.add("Gemm", [name, graph.constant(weights), bias])
        elif axis == 1 and 3 <= rank <= 5:
            kernel = weights.T.reshape(-1, SOURCE, *[1] * (rank - 2)).copy()
            bias = graph.constant(floats((value.shape[1],), seed=98))
            name = graph.add("Conv", [name, graph.constant(kernel), bias])
        else:
            name = _product(graph, name, axis, rank, weights)
    return name


def _product(graph: _Graph, name: str, axis: int, rank: int, weights: Array) -> str:
    """Multiply one axis of a tensor by a matrix."""
    order = [a for a in range(rank) if a != axis] + [axis]
    swapped = order != list(range(rank))
    if swapped:
        name = graph.add("Transpose", [name], perm=order)
    name = graph.add("MatMul", [name, graph.constant(weights)])
    if swapped:
        name = graph.add("Transpose", [name], perm=np.argsort(order).tolist())
    return name


def _as_type(graph: _Graph, name: str, dtype: np.dtype[np.generic]) -> str:
    """Turn a float tensor into one of another type, element by element."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    if dtype == np.float32:
        return name
    if dtype == np.bool_:
        return graph.add("Greater", [name, graph.constant(np.float32(0.1))])
    if dtype in (np.uint8, np.int8):
        scale = graph.constant(np.float32(0.05))
        zero = graph.constant(np.array(100 if dtype == np.uint8 else 3, dtype=dtype))
        return graph.add("QuantizeLinear", [name, scale, zero])
    if dtype.kind in "iu":
        name = graph.add("Abs", [graph.add("Mul", [name, graph.constant(np.float32(4))])])
    return graph.add("Cast", [name], to=kind)


def _consume(graph: _Graph, name: str, shape: tuple[int, ...], kind: int) -> None:
    """Sum every axis of a tensor against weights, into a graph output."""
    output = f"y_{name}"
    if kind != TensorProto.FLOAT:
        name = graph.add("Cast", [name], to=TensorProto.FLOAT)
    rank = len(shape)
    sizes = list(shape)
    for axis in reversed(range(rank)):
        if sizes[axis] > 1:
            weights = floats((sizes[axis], SINK), seed=200 + axis)
            name = _product(graph, name, axis, rank, weights)
            sizes[axis] = SINK
    if name in graph.nodes[-1].output and graph.nodes[-1].name != "subject":
        graph.nodes[-1].output[0] = output
    else:
        graph.add("Identity", [name], output)
    graph.outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, sizes))
