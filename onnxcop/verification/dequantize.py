"""A quantized model without the rounding of its activations, for comparison only.

Rounding turns the noise of the last bits into whole steps, and in a deep model into many of them.
Two models that are equal but for that noise differ visibly once their activations are rounded, so
before they are compared the pairs of QuantizeLinear and DequantizeLinear on activations are
bypassed in both, those inside of operators that compute on quantized tensors included. Quantized
weights stay as they are.
"""

from __future__ import annotations

from collections import defaultdict

import onnx

from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import MOVES, Trait, traits
from onnxcop.verification.float_twins import computes_rounded, write_twins


def rounds(model: onnx.ModelProto) -> bool:
    """Whether the model quantizes tensors while it runs."""
    return computes_rounded(model) or any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which activations that are quantized to be dequantized stay floats.

    A QuantizeLinear is bypassed where all it reaches, through operators that only move elements,
    are DequantizeLinear nodes; where an integer operator reads its output it stays.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
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
    saved = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.value_info[:]
    graph.value_info.extend(saved)
    return result


class _Flow:
    """Who reads what in a graph."""

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
            elif node.op_type == "Concat":
                self.joins.append(node)

    def reached(self, start: str) -> set[str] | None:
        """Integer tensors from a QuantizeLinear to its ends; None if another operator reads one."""
        found, pending = {start}, [start]
        while pending:
            name = pending.pop()
            if name in self.fixed:
                return None
            for node in self.readers[name]:
                if node.op_type == "DequantizeLinear" and name not in node.input[1:]:
                    continue
                if not traits(node) & (MOVES | Trait.SELECTS) or (len(node.output) != 1 and node.op_type != "Split"):
                    return None
                if name in node.input[1:] and node.op_type != "Concat":
                    return None
                new = [output for output in node.output if output not in found]
                found.update(new)
                pending += new
        return found

    def consistent(self, floats: dict[str, set[str]]) -> set[str]:
        """All bypassed tensors; starts that meet an integer in a Concat are dropped, in place."""
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
