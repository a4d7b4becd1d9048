"""Building a model node by node, with every shape known on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_node_outputs

from ops.sample import IR_VERSION, Array, ints


class Builder:
    """A graph under construction; tensors are called by name.

    Args:
        opset: The opset of the model.
        seed: Seed of the weights.
        dynamic: Whether the batch of the input is a named size rather than 1.
        style: How constants are stored: as "initializer", as an initializer that is also listed as
            a graph "input", or in Constant "node"s.
    """

    def __init__(self, opset: int, seed: int, *, dynamic: bool, style: str = "initializer") -> None:
        self.opset, self.dynamic, self.style = opset, dynamic, style
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, onnx.TensorProto] = {}
        self.count = 0
        self.story = [f"opset {opset}, seed {seed}, dynamic {dynamic}, {style}"]

    def __repr__(self) -> str:
        return f"Builder({', '.join(self.story)})"

    def input(self, name: str, shape: Sequence[int]) -> str:
        """A graph input; its first axis is the batch."""
        declared = ["batch", *shape[1:]] if self.dynamic else list(shape)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, declared))
        self.types[name] = helper.make_tensor_type_proto(TensorProto.FLOAT, list(shape))
        return name

    def fresh(self, stem: str) -> str:
        """A name that no tensor has."""
        self.count += 1
        return f"{stem}{self.count}"

    def constant(self, values: Array) -> str:
        """A stored tensor."""
        name = self.fresh("w")
        tensor = numpy_helper.from_array(np.asarray(values), name)
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        if values.size <= 16:
            self.values[name] = tensor
        if self.style == "node":
            self.nodes.append(helper.make_node("Constant", [], [name], self.fresh("constant"), value=tensor))
            return name
        self.initializers.append(tensor)
        if self.style == "input":
            self.inputs.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        return name

    def weights(self, shape: Sequence[int], fan_in: int = 1) -> str:
        """Random weights of a scale that keeps activations near 1."""
        values = self.rng.standard_normal(tuple(shape)) / np.sqrt(fan_in)
        return self.constant(values.astype(np.float32))

    def add(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """Append a node; returns its (first) output."""
        return self.add_many(op, inputs, outputs, **attributes)[0]

    def add_many(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs."""
        names = [self.fresh("t") for _ in range(outputs)]
        node = helper.make_node(op, inputs, names, self.fresh(op.lower()), **attributes)
        schema = onnx.defs.get_schema(op, self.opset, "")
        given = [name for name in inputs if name]
        types = {name: self.types[name] for name in given}
        known = {name: self.values[name] for name in given if name in self.values}
        found = infer_node_outputs(
            schema, node, types, known, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION
        )
        self.types.update(found)
        if op == "Shape":
            self.values[names[0]] = numpy_helper.from_array(ints(*self.shape(inputs[0])), names[0])
        self.nodes.append(node)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, with a batch of 1."""
        sizes = tuple(dim.dim_value for dim in self.types[name].tensor_type.shape.dim)
        assert all(size > 0 for size in sizes), f"{name} has the shape {sizes}"
        return sizes

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """The finished model."""
        values = []
        for name in outputs:
            shape = list(self.shape(name))
            declared = ["batch", *shape[1:]] if self.dynamic else shape
            values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, declared))
        graph = helper.make_graph(self.nodes, "random", self.inputs, values, self.initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    # ---- forms that differ between opsets ------------------------------------------------------
    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        """Unsqueeze, its axes an attribute or an input."""
        if self.opset < 13:
            return self.add("Unsqueeze", [x], axes=list(axes))
        return self.add("Unsqueeze", [x, self.constant(ints(*axes))])

    def split(self, x: str, sizes: Sequence[int], axis: int, *, equal: bool = False) -> list[str]:
        """Split into given sizes, or into equal parts without saying how large."""
        count = len(sizes)
        if equal and self.opset >= 18:
            return self.add_many("Split", [x], count, axis=axis, num_outputs=count)
        if equal:
            return self.add_many("Split", [x], count, axis=axis)
        if self.opset < 13:
            return self.add_many("Split", [x], count, axis=axis, split=list(sizes))
        return self.add_many("Split", [x, self.constant(ints(*sizes))], count, axis=axis)

    def reshape(self, x: str, sizes: Sequence[int], form: str) -> str:
        """Reshape to (batch, *sizes).

        Args:
            x: The tensor; its first axis is the batch.
            sizes: The other axes.
            form: How the target is given: the batch as "zero" or "minus" one, the last size inferred
                ("last"), or all computed by a "chain" of Shape, Gather and Concat.
        """
        if form == "chain":
            size = self.add("Gather", [self.add("Shape", [x]), self.constant(np.array(0))], axis=0)
            parts = [self.unsqueeze(size, [0]), self.constant(ints(*sizes[:-1], -1))]
            target = self.add("Concat", parts, axis=0)
            numbers = numpy_helper.from_array(ints(1, *sizes[:-1], -1), target)
            self.values[target] = numbers
            return self.add("Reshape", [x, target])
        targets = {"zero": [0, *sizes], "minus": [-1, *sizes], "last": [0, *sizes[:-1], -1]}
        return self.add("Reshape", [x, self.constant(ints(*targets[form]))])

    def channel_sizes(self, x: str, sizes: Sequence[str]) -> str:
        """A target whose elements are 1-element tensors by name."""
        return self.add("Concat", list(sizes), axis=0)

    def size_of(self, x: str, axis: int) -> str:
        """One size of a tensor as a 1-element tensor, computed at run time."""
        gathered = self.add("Gather", [self.add("Shape", [x]), self.constant(ints(axis))], axis=0)
        self.values[gathered] = numpy_helper.from_array(ints(self.shape(x)[axis]), gathered)
        return gathered

    # ---- layers --------------------------------------------------------------------------------
    def conv(self, x: str, outs: int, kernel: int = 1, groups: int = 1, stride: int = 1, bias: bool = True) -> str:
        """A convolution that keeps the size (at stride 1)."""
        ins = self.shape(x)[1] // groups
        assert ins * groups == self.shape(x)[1] > 0
        inputs = [x, self.weights((outs, ins, kernel, kernel), ins * kernel * kernel)]
        if bias:
            inputs.append(self.weights((outs,)))
        pad = [kernel // 2] * 4
        return self.add("Conv", inputs, kernel_shape=[kernel] * 2, group=groups, strides=[stride] * 2, pads=pad)

    def leaky(self, x: str) -> str:
        """An activation that never dies, so that outputs depend on inputs however little is left."""
        return self.add("LeakyRelu", [x], alpha=0.3)

    def norm(self, x: str) -> str:
        """A batch normalization."""
        width = self.shape(x)[1]
        spread = self.constant((self.rng.random(width) + 0.5).astype(np.float32))
        return self.add("BatchNormalization", [x, *(self.weights((width,)) for _ in range(3)), spread])

    def linear(self, x: str, outs: int) -> str:
        """A matrix product on the last axis, with a bias."""
        ins = self.shape(x)[-1]
        product = self.add("MatMul", [x, self.weights((ins, outs), ins)])
        return self.add("Add", [product, self.weights((outs,))])
