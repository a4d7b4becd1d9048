"""Biases for layers that have none, or one number for all outputs, so that recovery can correct means.

They are added as zeros before tracing; those that stay zero are removed at the end. A single number is repeated for
every output, and becomes a single number again at the end if all stay equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array
from onnxcop.graph.edit import drop, fresh_name, replace_all
from onnxcop.graph.linear import following_bias, kernel_of
from onnxcop.graph.subgraphs import initializers_are_inputs
from onnxcop.graph.traits import Trait, traits


@dataclass(frozen=True, slots=True)
class AddedBiases:
    """The pass that gives every linear layer with stored weights a bias.

    Attributes:
        names: Names of the vectors that were added.
        repeated: Shapes that biases of one number had, by name.
    """

    names: frozenset[str] = frozenset()
    repeated: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def forward(cls, model: onnx.ModelProto) -> AddedBiases:
        """Add biases of zeros, and repeat those of one number, in place."""
        return cls(_add(model), _repeat(model))

    def undo(self, model: onnx.ModelProto) -> None:
        """Move the biases into a following normalization, if there is one, and remove those that are zero, in place."""
        move_into_normalization(model, self.names)
        drop_idle(model, self.names)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor) if tensor.name in self.repeated else np.zeros(0)
            if values.size and (values == values[0]).all():
                _store(model, tensor, values[:1].reshape(self.repeated[tensor.name]))


def _repeat(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Make biases of one number, each of one layer, vectors of that number; returns their shapes before."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    repeated = {}
    for node in model.graph.node:
        kernel = kernel_of(node)
        if kernel is None or kernel.bias is None or node.input[1] not in stored:
            continue
        groups, _, outs, _ = kernel.shape(stored[node.input[1]].dims)
        bias = stored.get("".join(node.input[kernel.bias : kernel.bias + 1]))
        if bias is not None and readers[bias.name] == 1 and np.prod(bias.dims, dtype=int) == 1 < groups * outs:
            repeated[bias.name] = tuple(bias.dims)
            _store(model, bias, np.repeat(numpy_helper.to_array(bias).reshape(1), groups * outs))
    return repeated


def _store(model: onnx.ModelProto, tensor: onnx.TensorProto, values: Array) -> None:
    """Give a stored tensor other values, of another shape; it may be listed as an input too."""
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in model.graph.input:
        if value.name == tensor.name:
            value.CopyFrom(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, values.shape))


def _add(model: onnx.ModelProto) -> frozenset[str]:
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    taken = set(stored) | {name for node in graph.node for name in (*node.input, *node.output)}
    readers = Counter(name for node in graph.node for name in node.input)
    followers = {name: node for node in graph.node for name in node.input}
    outputs = {value.name for value in graph.output}
    added: list[str] = []
    listed = initializers_are_inputs(model)
    inserts: list[tuple[int, onnx.NodeProto]] = []

    def zeros(base: str, size: int, elem_type: int) -> str:
        name = fresh_name(f"{base}__bias", taken)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
        graph.initializer.append(numpy_helper.from_array(np.zeros(size, dtype), name))
        if listed:
            graph.input.append(onnx.helper.make_tensor_value_info(name, elem_type, [size]))
        added.append(name)
        return name

    for index, node in enumerate(graph.node):
        weight = stored.get(node.input[1]) if traits(node) & Trait.LINEAR and len(node.input) > 1 else None
        kernel = None if weight is None else kernel_of(node, rank=len(weight.dims))
        if weight is None or kernel is None:
            continue
        groups, _, outs, _ = kernel.shape(weight.dims)
        if kernel.bias is not None:
            if not "".join(node.input[kernel.bias : kernel.bias + 1]):
                others = node.input[kernel.bias + 1 :]
                del node.input[kernel.bias :]
                node.input.extend([zeros(node.output[0], groups * outs, weight.data_type), *others])
        elif len(weight.dims) == 2 and weight.data_type in (1, 10, 11):
            follower = followers.get(node.output[0])
            single = readers[node.output[0]] == 1 and node.output[0] not in outputs
            if single and follower is not None and following_bias(follower, node.output[0], stored) is not None:
                continue
            inner = f"{node.output[0]}__unbiased"
            name = zeros(node.output[0], outs, weight.data_type)
            inserts.append(
                (index, onnx.helper.make_node("Add", [inner, name], [node.output[0]], f"{node.output[0]}__bias_add"))
            )
            node.output[0] = inner
    for index, node in reversed(inserts):
        graph.node.insert(index + 1, node)
    return frozenset(added)


def drop_idle(model: onnx.ModelProto, added: frozenset[str]) -> None:
    """Remove the added biases that are still zero, in place."""
    graph = model.graph
    idle = {
        tensor.name for tensor in graph.initializer
        if tensor.name in added and not numpy_helper.to_array(tensor).any()
    }  # fmt: skip
    if not idle:
        return
    kept_nodes: list[onnx.NodeProto] = []
    removed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Add" and len(node.input) == 2 and node.input[1] in idle:
            removed[node.input[0]] = node.output[0]
        else:
            kept_nodes.append(node)
    for node in kept_nodes:
        for position, name in enumerate(node.output):
            if name in removed:
                node.output[position] = removed[name]
        for position in reversed([place for place, name in enumerate(node.input) if name in idle]):
            node.input[position] = ""
            while node.input and not node.input[-1]:
                del node.input[-1]
    replace_all(graph.node, kept_nodes)
    drop(graph.initializer, idle)
    drop(graph.input, idle)


def move_into_normalization(model: onnx.ModelProto, added: frozenset[str]) -> None:
    """Move added biases into the running mean of a BatchNormalization that is their only reader, in place.

    γ(x + b - μ)/σ + β equals the same expression with mean μ - b and no bias.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    normalizations = {
        node.input[0]: node.input[3] for node in graph.node
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx") and len(node.output) == 1
    }  # fmt: skip
    for node in graph.node:
        bias = node.input[-1] if node.input else ""
        mean = normalizations.get(node.output[0]) if node.output else None
        if bias not in added or mean not in stored or uses[bias] != 1 or uses[node.output[0]] != 1 or uses[mean] != 1:
            continue
        shift, old = numpy_helper.to_array(stored[bias]), numpy_helper.to_array(stored[mean])
        if shift.shape != old.shape:
            continue
        moved = (old.astype(np.float64) - shift.astype(np.float64)).astype(old.dtype)
        stored[mean].CopyFrom(numpy_helper.from_array(moved, mean))
        stored[bias].CopyFrom(numpy_helper.from_array(np.zeros_like(shift), bias))
