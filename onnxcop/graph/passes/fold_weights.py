"""Weights that the graph computes from constants by mixing channels, computed once and stored.

Weight-standardized networks normalize each filter before its layer: a BatchNormalization in training mode, or means and
roots, on weights alone. The result is a constant; once stored, it can be cut like any other weight. The pass changes
the working copy before tracing. Chains that only move or convert values stay, and so do chains whose result is larger
than what they start from, such as quantized weights, or filters of a spectrogram that are computed from a few numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array
from onnxcop.graph.check import byte_size
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.edit import replace_all
from onnxcop.graph.shapes import RANDOM
from onnxcop.graph.subgraphs import captured, graphs_of, initializers_are_inputs
from onnxcop.graph.traits import MOVES, Trait, traits

Run = Callable[[onnx.ModelProto, Sequence[str]], Mapping[str, Array]]

_KEPT = RANDOM | {"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}
_DROPPED = 1024  # bytes; smaller constants may have other readers


def _is_plain(node: onnx.NodeProto) -> bool:
    """Whether a node keeps every value, up to position and type."""
    return bool(traits(node) & MOVES) or node.op_type in ("Cast", "Constant")


def fold_weights(model: onnx.ModelProto, run: Run) -> int:
    """Compute weights of layers that depend on constants alone, and store them, in place.

    Args:
        model: The model, with unique names.
        run: Computes the named tensors of a model without inputs; its exceptions reach the caller.

    Returns:
        How many were stored.
    """
    if initializers_are_inputs(model):
        return 0
    graph = model.graph
    stored = constant_tensors(model)
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    constant = _constant_nodes(graph)
    chains: dict[str, set[int]] = {}
    given = {value.name for value in graph.output}
    for node in graph.node:
        for name in node.input[1:] if traits(node) & (Trait.LINEAR | Trait.RECURRENT) else ():
            index = makers.get(name, -1)
            if index in constant and name not in given:
                chain = _chain(graph, makers, index)
                nodes = [graph.node[i] for i in chain]
                if not all(map(_is_plain, nodes)) and not any(node.op_type in _KEPT for node in nodes):
                    chains[name] = chain
    chains = _without_shared(graph, chains, stored)
    if not chains:
        return 0
    values = run(_computing(model, chains), list(chains))
    compact = {n: chain for n, chain in chains.items() if values[n].nbytes <= _DROPPED + _stored(graph, chain, stored)}
    chains = _without_shared(graph, compact, stored)
    _replace(graph, {name: numpy_helper.from_array(values[name], name) for name in chains}, chains)
    return len(chains)


def _constant_nodes(graph: onnx.GraphProto) -> set[int]:
    """Positions of the nodes that depend on constants alone."""
    known = {tensor.name for tensor in graph.initializer}
    constant = set()
    for index, node in enumerate(graph.node):
        if all(name in known for name in node.input if name) and next(graphs_of(node), None) is None:
            known.update(node.output)
            constant.add(index)
    return constant


def _chain(graph: onnx.GraphProto, makers: Mapping[str, int], last: int) -> set[int]:
    """A node and all nodes that it depends on."""
    chain: set[int] = set()
    pending = [last]
    while pending:
        index = pending.pop()
        if index not in chain:
            chain.add(index)
            pending += [makers[name] for name in graph.node[index].input if name in makers]
    return chain


def _without_shared(
    graph: onnx.GraphProto, chains: Mapping[str, set[int]], stored: Mapping[str, onnx.TensorProto]
) -> dict[str, set[int]]:
    """The chains that start from no large tensor with other readers, because files must not grow."""
    chains = dict(chains)
    while True:
        folded = set().union(*chains.values()) if chains else set()
        others = {
            name
            for index, node in enumerate(graph.node)
            if index not in folded
            for name in (*node.input, *captured(node))
            if name not in chains
        } | {value.name for value in graph.output}
        shared = {
            name
            for name, chain in chains.items()
            if any(_is_large(stored.get(read)) and read in others for i in chain for read in _touched(graph.node[i]))
        }
        if not shared:
            return chains
        chains = {name: chain for name, chain in chains.items() if name not in shared}


def _stored(graph: onnx.GraphProto, chain: Collection[int], stored: Mapping[str, onnx.TensorProto]) -> int:
    """Bytes of the tensors that a chain starts from."""
    reads = {name for index in chain for name in _touched(graph.node[index]) if name in stored}
    return sum(byte_size(stored[name]) or 0 for name in reads)


def _touched(node: onnx.NodeProto) -> list[str]:
    return [*node.input, *(node.output if node.op_type == "Constant" else ())]


def _is_large(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and (byte_size(tensor) or 0) > _DROPPED


def _computing(model: onnx.ModelProto, chains: Mapping[str, set[int]]) -> onnx.ModelProto:
    """A model without inputs that computes the ends of chains."""
    graph = model.graph
    needed = sorted(set().union(*chains.values()))
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.name = "weights"
    part.graph.node.extend(graph.node[index] for index in needed)
    reads = {name for index in needed for name in graph.node[index].input}
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in reads)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in chains)
    return part


def _replace(graph: onnx.GraphProto, values: Mapping[str, onnx.TensorProto], chains: Mapping[str, set[int]]) -> None:
    """Store tensors in place of the nodes that compute them, and drop everything that is then unread."""
    uses = Counter(name for node in graph.node for name in (*node.input, *captured(node)))
    uses.update(value.name for value in graph.output)
    before, removed = set(uses), set()
    for index in sorted(set().union(*chains.values()), reverse=True):  # readers before their inputs
        node = graph.node[index]
        if all(name in values or not uses[name] for name in node.output if name):
            removed.add(index)
            uses.subtract(node.input)
    nodes = [n for i, n in enumerate(graph.node) if i not in removed]
    made = {name for node in nodes for name in node.output}
    replace_all(graph.node, nodes)
    drop_unread(graph, {name for name in before if not uses[name]})
    graph.initializer.extend(tensor for name, tensor in values.items() if name not in made)


def drop_unread(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Remove stored tensors that have no reader."""
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name in names:
            del graph.initializer[place]
