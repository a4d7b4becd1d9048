"""Vectors that exporters share between layers, copied for each layer during pruning.

Exporters store equal constants once: two layers with the same bias (e.g. all zeros) then read one initializer, and
pruning one layer would force pruning of the other. Vectors are small, so each use gets a copy before tracing; copies
that end up equal are merged afterwards. Matrices stay shared: tied weights are tied on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from onnxcop.graph.edit import copied, drop, fresh_name
from onnxcop.graph.subgraphs import captured

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True, slots=True)
class UnsharedVectors:
    """The pass that gives every use of a shared vector a copy of its own.

    Attributes:
        copies: The name of the original by the name of each copy.
    """

    copies: Mapping[str, str]

    @classmethod
    def forward(cls, model: onnx.ModelProto) -> UnsharedVectors:
        """Make the copies, in place."""
        return cls(_unshare(model))

    def undo(self, model: onnx.ModelProto) -> None:
        """Merge copies that are equal to their original (or to one another) again, in place."""
        _reshare(model, self.copies)


def _unshare(model: onnx.ModelProto) -> dict[str, str]:
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    fixed = {value.name for value in (*graph.input, *graph.output)}
    for node in graph.node:
        fixed |= captured(node)
    uses: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        for position, name in enumerate(node.input):
            uses[name].append((index, position))
    copies: dict[str, str] = {}
    for tensor in list(graph.initializer):
        vector = sum(dim > 1 for dim in tensor.dims) == 1
        if not vector or tensor.data_type not in _FLOATS or tensor.name in fixed:
            continue
        for number, (index, position) in enumerate(uses[tensor.name][1:], start=2):
            name = fresh_name(f"{tensor.name}__use{number}", taken)
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = name
            graph.node[index].input[position] = name
            copies[name] = tensor.name
    return copies


def _reshare(model: onnx.ModelProto, copies: Mapping[str, str]) -> None:
    graph = model.graph
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    homes: dict[tuple[str, bytes], str] = {}
    for name in copies.values():
        if name in by_name:
            homes[(name, _content(by_name[name]))] = name
    renamed: dict[str, str] = {}
    for name, original in copies.items():
        if name in by_name:
            home = homes.setdefault((original, _content(by_name[name])), name)
            if home != name:
                renamed[name] = home
    if not renamed:
        return
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in renamed:
                node.input[position] = renamed[name]
    drop(graph.initializer, renamed)


def _content(tensor: onnx.TensorProto) -> bytes:
    nameless = copied(tensor)
    nameless.ClearField("name")
    return bytes(nameless.SerializeToString(deterministic=True))
