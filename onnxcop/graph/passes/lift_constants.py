"""Weights that nodes compute, stored as initializers so that recovery can change them.

Some exporters keep every weight in a Constant node, or reshape or transpose a stored tensor before its layer. The pass
changes the working copy before tracing. Older files, in which every initializer must be an input, stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx
from onnx import numpy_helper

from onnxcop.graph.constants import Weights
from onnxcop.graph.edit import replace_all
from onnxcop.graph.passes.fold_weights import drop_unread
from onnxcop.graph.subgraphs import captured, initializers_are_inputs
from onnxcop.graph.traits import Trait, traits

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def lift_constants(model: onnx.ModelProto) -> int:
    """Store floating-point constants that nodes hold or compute for layers, in place.

    Returns:
        How many were stored.
    """
    if initializers_are_inputs(model):
        return 0
    graph = model.graph
    fixed = {value.name for value in graph.output}
    lifted = {
        node.output[0]: node.attribute[0].t for node in graph.node
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value"
        and node.attribute[0].t.data_type in _FLOATS and node.output[0] not in fixed
    }  # fmt: skip
    for name, tensor in lifted.items():
        stored = graph.initializer.add()
        stored.CopyFrom(tensor)
        stored.name = name
    _drop(graph, lifted.keys())
    return len(lifted) + _evaluate(model)


def _evaluate(model: onnx.ModelProto) -> int:
    """Store weights of layers that are computed from stored tensors without other readers."""
    graph = model.graph
    uses = Counter(name for node in graph.node for name in (*node.input, *captured(node)))
    uses.update(value.name for value in graph.output)
    makers = {node.output[0]: node for node in graph.node if len(node.output) == 1}
    weights = Weights.of(model)
    lifted: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        if not traits(node) & Trait.LINEAR:
            continue
        for name in node.input[1:]:
            if name in makers and _own_chain(name, makers, uses, weights):
                values = weights.read(name)
                if values is not None and values.dtype.kind == "f" and values.ndim:
                    lifted[name] = numpy_helper.from_array(values, name)
    _drop(graph, lifted.keys())
    graph.initializer.extend(lifted.values())
    return len(lifted)


def _own_chain(name: str, makers: dict[str, onnx.NodeProto], uses: Counter[str], weights: Weights) -> bool:
    """Whether a tensor comes from stored ones through nodes without other readers."""
    while name in makers:
        node = makers[name]
        if uses[name] != 1 or not node.input:
            return False
        if any(other not in weights.stored for other in node.input[1:] if other):
            return False
        name = node.input[0]
    return name in weights.stored and uses[name] == 1


def _drop(graph: onnx.GraphProto, made: Iterable[str]) -> None:
    """Remove the nodes that make these tensors, and nodes that then have no reader."""
    removed = set(made)
    sources: set[str] = set()
    while removed:
        kept = [node for node in graph.node if not set(node.output) <= removed]
        sources |= {name for node in graph.node if set(node.output) <= removed for name in node.input}
        replace_all(graph.node, kept)
        inputs = {name for node in graph.node for name in (*node.input, *captured(node))}
        inputs |= {value.name for value in graph.output}
        removed = {
            name for node in graph.node for name in node.output
            if name in sources and set(node.output).isdisjoint(inputs)
        }  # fmt: skip
    inputs = {name for node in graph.node for name in (*node.input, *captured(node))}
    drop_unread(graph, sources - inputs - {value.name for value in graph.output})
