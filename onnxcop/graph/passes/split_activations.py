"""Layers with a fused activation, split during recovery.

ONNX Runtime's optimizer fuses a convolution, an addition and an activation into one FusedConv, and a Gemm and its
activation into one FusedGemm. The sum inside such a layer is not observable, so no weights could be fitted to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx
from onnx import helper

from onnxcop.graph.edit import copied, drop, fresh_name, opset_of, replace_all
from onnxcop.graph.linear import kernel_of
from onnxcop.graph.traits import MICROSOFT

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "Clip": ("min", "max"), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",),
    "Relu": (), "Selu": ("alpha", "gamma"), "Sigmoid": (), "Softplus": (), "Softsign": (), "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}  # fmt: skip
_PREFIX = "activation"
_CLIP_INPUTS = 11  # since this opset, the bounds of a Clip are inputs


@dataclass(frozen=True, slots=True)
class SplitActivations:
    """The pass that splits fused layers of the top-level graph.

    Attributes:
        split: Each fused layer with its parts: the bounds of a Clip, the layer, the sum, the activation.
    """

    split: tuple[tuple[onnx.NodeProto, tuple[onnx.NodeProto, ...]], ...] = ()

    @classmethod
    def forward(cls, model: onnx.ModelProto) -> SplitActivations:
        """Split fused layers, in place."""
        taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        stand_ins = [_parts(node, taken, types, opset_of(model)) for node in model.graph.node]
        split = [(copied(node), parts) for node, parts in zip(model.graph.node, stand_ins, strict=True) if parts]
        if split:
            nodes = [parts or (node,) for node, parts in zip(model.graph.node, stand_ins, strict=True)]
            replace_all(model.graph.node, [part for parts in nodes for part in parts])
        return cls(tuple(split))

    def undo(self, model: onnx.ModelProto) -> None:
        """Fuse them again if nothing has come between their parts, in place."""
        graph = model.graph
        makers = {name: node for node in graph.node for name in node.output}
        reads = Counter(name for node in graph.node for name in node.input)
        fused: dict[str, onnx.NodeProto] = {}
        dropped: set[str] = set()
        for original, parts in self.split:
            *inner, _ = (part.output[0] for part in parts)
            steps = [part for part in parts if part.op_type != "Constant"]
            current = [makers.get(step.output[0], onnx.NodeProto()) for step in steps]
            linked = all(after.input[:1] == before.output[:1] for before, after in pairwise(current))
            unchanged = [node.op_type for node in current] == [step.op_type for step in steps]
            if linked and unchanged and all(reads[name] == 1 for name in inner):
                fused[original.output[0]] = _fused(original, current)
                dropped.update(inner)
        drop(graph.initializer, dropped)
        replace_all(
            graph.node, [fused.get(node.output[0], node) for node in graph.node if node.output[0] not in dropped]
        )


def _parts(node: onnx.NodeProto, taken: set[str], types: dict[str, int], opset: int) -> tuple[onnx.NodeProto, ...]:
    """The parts of a fused node; empty if it is not fused, or not fully understood."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    activation = attributes.get(_PREFIX, b"").decode()
    if node.domain != MICROSOFT or kernel_of(node) is None or node.input[1] not in types:
        return ()
    if activation not in _PARAMETERS:
        return ()
    named = {name: attributes.get(f"{_PREFIX}_{name}") for name in _PARAMETERS[activation]}
    values = attributes.get(f"{_PREFIX}_params") or list(named.values())
    if len(values) != len(named) or None in values:
        return ()
    parameters = dict(zip(named, values, strict=True))
    made = node.output[0]
    layer = copied(node)
    layer.op_type, layer.domain = node.op_type.removeprefix("Fused"), ""
    layer.output[0] = last = fresh_name(f"{made}__linear", taken)
    replace_all(layer.attribute, [a for a in node.attribute if not a.name.startswith(_PREFIX)])
    del layer.input[3:]
    nodes, bounds = [layer], []
    for other in node.input[3:]:
        name = fresh_name(f"{made}__sum", taken)
        nodes.append(helper.make_node("Add", [last, other], [name], name))
        last = name
    if activation == "Clip" and opset >= _CLIP_INPUTS:
        for bound, value in parameters.items():
            tensor = helper.make_tensor(bound, types[node.input[1]], [], [value])
            name = fresh_name(f"{made}__{bound}", taken)
            bounds.append(helper.make_node("Constant", [], [name], name, value=tensor))
        parameters = {}
    inputs = [last, *(bound.output[0] for bound in bounds)]
    after = helper.make_node(activation, inputs, [made], fresh_name(f"{made}__activation", taken), **parameters)
    return (*bounds, *nodes, after)


def _fused(original: onnx.NodeProto, parts: Sequence[onnx.NodeProto]) -> onnx.NodeProto:
    """One node for a layer, its addition and its activation, in their current form."""
    layer, *sums, _ = parts
    fused = copied(original)
    del fused.input[:]
    fused.input.extend(layer.input)
    if sums:
        fused.input.extend([*[""] * (3 - len(layer.input)), *(one.input[1] for one in sums)])
    own = {a.name: a for a in layer.attribute}
    there = [own.pop(a.name, a) for a in original.attribute if a.name in own or a.name.startswith(_PREFIX)]
    replace_all(fused.attribute, [*there, *own.values()])
    return fused
