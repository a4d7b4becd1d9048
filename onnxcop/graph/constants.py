"""Stored tensors of a model, and values computed from them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnxcop._base.types import Array
from onnxcop.graph.edit import opset_of
from onnxcop.graph.io import values_of
from onnxcop.graph.shapes import evaluate
from onnxcop.graph.subgraphs import Scopes


@dataclass(frozen=True)
class Weights:
    """Reads weights of a model as arrays, and evaluates tensors computed from constants."""

    nodes: Sequence[onnx.NodeProto]
    stored: Mapping[str, onnx.TensorProto]
    producers: Mapping[str, int]
    opset: int

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Weights:
        """Index a model."""
        opset = opset_of(model)
        nodes = Scopes.of(model).nodes
        producers = {name: number for number, node in enumerate(nodes) for name in node.output if name}
        return cls(nodes, constant_tensors(model), producers, opset)

    def read(self, name: str) -> Array | None:
        """The value of a tensor that depends on constants alone, None if it cannot be computed."""
        if name in self.stored:
            return values_of(self.stored[name])
        chain: list[str] = []
        pending = [name]
        while pending:
            current = pending.pop()
            if current in self.stored or current in chain:
                continue
            if current not in self.producers:
                return None
            chain.append(current)
            pending += [i for i in self.nodes[self.producers[current]].input if i]
        values: dict[str, Array | None] = {}
        for current in sorted(chain, key=self.producers.__getitem__):
            node = self.nodes[self.producers[current]]
            inputs = [values[i] if i in values else self.read(i) if i else None for i in node.input]
            results = evaluate(node, inputs, self.opset, largest=1 << 31)
            if results is None:
                return None
            values |= dict(zip(node.output, results, strict=False))
        return values[name]


def constant_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers and tensors of Constant nodes, in bodies too, by the name of the tensor in the graph."""
    scopes = Scopes.of(model)
    tensors = {tensor.name: tensor for scope in scopes.all for tensor in scope.graph.initializer}
    for node in scopes.nodes:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return tensors
