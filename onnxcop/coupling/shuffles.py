"""Channel shuffles: Reshape, Transpose and Reshape back, which only permute an axis.

Reshape and Transpose cannot express an arbitrary permutation of the remaining indices, so taken separately they tie
channels together. Taken as one, they move atoms and tie nothing; if channels are removed, a Gather replaces them. The
same holds for a flattened tensor of which a Gather picks every element by number, as exporters write a strided view; it
may even be the identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import IntArray
from onnxcop.graph.shapes import Shape, ShapeMap, infer
from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import Trait, traits

_OUTSIDE = -1  # stands for the readers of the graph's outputs
_LONGEST = 6  # nodes
_LARGEST = 1 << 23  # elements that are numbered to follow them


@dataclass(frozen=True, slots=True)
class Shuffle:
    """A chain of nodes that permutes one axis.

    Attributes:
        nodes: Indices of its nodes, in order; tensors between them are not read elsewhere, except for sizes.
        source: The input tensor.
        result: The output tensor, of the same shape.
        axis: The permuted axis; None if every element stays.
        order: int64 [size], source position of every result position; empty if all stay.
    """

    nodes: tuple[int, ...]
    source: str
    result: str
    axis: int | None
    order: IntArray

    def along(self, label: Sequence[IntArray | None]) -> tuple[int, IntArray] | None:
        """An axis that carries atoms, with its order: the permuted axis if there is one, None if no axis has atoms."""
        if self.axis is not None:
            return None if label[self.axis] is None else (self.axis, self.order)
        return next(((axis, np.arange(len(a))) for axis, a in enumerate(label) if a is not None), None)


def find(model: onnx.ModelProto, shapes: ShapeMap) -> dict[int, Shuffle]:
    """Find every shuffle of a graph, by the index of each of its nodes.

    If inputs are dynamic, only chains that are the same permutation at other sizes are returned.
    """
    shuffles = list(_shuffles(model, shapes))
    if shuffles and (larger := _larger(model, shapes)):
        others = infer(model, larger)
        shuffles = [
            shuffle
            for shuffle in shuffles
            if (other := _shuffle(model, others, shuffle.nodes)) is not None
            and other.axis == shuffle.axis
            and np.array_equal(other.order, shuffle.order)
        ]
    return {node: shuffle for shuffle in shuffles for node in shuffle.nodes}


def _larger(model: onnx.ModelProto, shapes: ShapeMap) -> dict[str, Shape]:
    """Input shapes with every dynamic size doubled; {} if there is none."""
    result: dict[str, Shape] = {}
    grown = False
    for value in model.graph.input:
        shape = shapes[value.name].shape
        dims = value.type.tensor_type.shape.dim
        if shape is None or len(dims) != len(shape):
            continue
        dynamic = [dim.dim_value <= 0 for dim in dims]
        grown |= any(dynamic)
        result[value.name] = tuple(2 * size if free else size for size, free in zip(shape, dynamic, strict=True))
    return result if grown else {}


def _shuffles(model: onnx.ModelProto, shapes: ShapeMap) -> Iterator[Shuffle]:
    graph = model.graph
    readers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        for name in {*node.input, *captured(node)}:
            readers[name].append(index)
    for value in graph.output:
        readers[value.name].append(_OUTSIDE)
    taken: set[int] = set()
    for first, node in enumerate(graph.node):
        if node.op_type != "Reshape" or first in taken:
            continue
        chain = [first]
        while len(chain) < _LONGEST:
            after = _only_mover(graph, readers, graph.node[chain[-1]].output[0])
            if after is None:
                break
            chain.append(after)
            shuffle = _shuffle(model, shapes, tuple(chain))
            if shuffle is not None and _is_closed(graph, readers, chain):
                taken.update(chain)
                yield shuffle
                break


def _only_mover(graph: onnx.GraphProto, readers: dict[str, list[int]], name: str) -> int | None:
    """The only node that moves a tensor's elements on (nodes that read its size do not count), or None."""
    moving = [i for i in readers[name] if i == _OUTSIDE or not traits(graph.node[i]) & Trait.SIZES]
    if len(moving) != 1 or moving[0] == _OUTSIDE:
        return None
    node = graph.node[moving[0]]
    moves = traits(node) & Trait.KEEPS or node.op_type == "Gather"
    usual = moves and node.input[0] == name and len(node.output) == 1
    return moving[0] if usual and list(node.input).count(name) == 1 else None


def _is_closed(graph: onnx.GraphProto, readers: dict[str, list[int]], chain: list[int]) -> bool:
    """Whether sizes taken inside a chain only serve the chain itself."""
    waiting = [name for index in chain[:-1] for name in graph.node[index].output]
    while waiting:
        for index in readers[waiting.pop()]:
            if index == _OUTSIDE:
                return False
            if index not in chain:
                waiting.extend(graph.node[index].output)
    return True


def _shuffle(model: onnx.ModelProto, shapes: ShapeMap, chain: tuple[int, ...]) -> Shuffle | None:
    """The chain as a shuffle, if it is one."""
    nodes = [model.graph.node[index] for index in chain]
    source, result = nodes[0].input[0], nodes[-1].output[0]
    shape = shapes[source].shape
    kinds = {node.op_type for node in nodes}
    if shape is None or shapes[result].shape != shape or not kinds & {"Gather", "Transpose"}:
        return None
    if not 1 < int(np.prod(shape)) <= _LARGEST:
        return None
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    moved = numbers
    for node in nodes:
        step = _moved(node, moved, shapes)
        if step is None:
            return None
        moved = step
    if "Gather" in kinds and np.array_equal(moved, numbers):
        return Shuffle(nodes=chain, source=source, result=result, axis=None, order=np.arange(0))
    for axis, size in enumerate(shape):
        line = np.moveaxis(moved, axis, 0).reshape(size, -1)[:, 0]
        picked = np.unravel_index(line, shape)[axis].astype(np.int64)
        if not np.array_equal(picked, np.arange(size)) and np.array_equal(moved, np.take(numbers, picked, axis)):
            return Shuffle(nodes=chain, source=source, result=result, axis=axis, order=picked)
    return None


def _moved(node: onnx.NodeProto, elements: IntArray, shapes: ShapeMap) -> IntArray | None:
    """The positions to which a node moves elements; None if they depend on data or their number changes."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Transpose":
        return elements.transpose(attributes.get("perm"))
    after = shapes[node.output[0]].shape
    if after is None or int(np.prod(after)) != elements.size:
        return None
    if node.op_type != "Gather":
        return elements.reshape(after)
    picks, axis = shapes[node.input[1]].value, int(attributes.get("axis", 0))
    outside = picks is None or (picks >= elements.shape[axis]).any() or (picks < -elements.shape[axis]).any()
    return None if picks is None or outside else np.take(elements, picks, axis)
