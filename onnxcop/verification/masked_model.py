"""The masked original: the original graph with removed channels set to zero where they are summed.

Verification compares the pruned model with it. So it shares no function with the rewriter that decides what is cut: it
looks up stored tensors and removed indices by itself. No tensor changes its shape and no size is touched. At every
contraction the weights of the removed channels are set to zero. If two activations are multiplied, one of them is
multiplied by a 0/1 mask. Nodes inside bodies of control flow are masked in place; the weights that they then read are
stored in the top-level graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import Contraction, Operand
from onnxcop.graph.edit import copied
from onnxcop.graph.io import WeightFile, values_of
from onnxcop.graph.shapes import TensorInfo
from onnxcop.graph.subgraphs import Scopes


def masked(
    model: onnx.ModelProto, structure: Structure, removed: IntArray, file: WeightFile | None = None
) -> onnx.ModelProto:
    """Return a copy of `model` in which the given units contribute nothing to any sum.

    Args:
        model: The model.
        structure: Its structure.
        removed: int64, the units.
        file: File for the weights, to keep large ones out of memory.
    """
    result = copied(model if file is None else file.light(model))
    stored, nodes = _stored(model.graph), Scopes.of(model).nodes
    copies, light = Scopes.of(result), {tensor.name: tensor for tensor in result.graph.initializer}
    removed_classes = structure.unit_class[removed]
    cuts: dict[tuple[int, int], list[tuple[Contraction, int, Any]]] = defaultdict(list)
    inserts: list[tuple[int, onnx.NodeProto]] = []
    for contraction in structure.coupling.findings.contractions:
        operand = _side(contraction, nodes, stored)
        if operand is None:
            continue
        dead = np.isin(structure.coupling.classes.of[operand.atoms], removed_classes)
        if not dead.any():
            continue
        name = nodes[contraction.node].input[operand.input]
        if name in stored:
            cuts[contraction.node, operand.input].append((contraction, operand.axis, dead))
        else:
            node, info = copies.nodes[contraction.node], structure.coupling.shapes[name]
            inserts.append((contraction.node, _mask_activation(result, node, info, contraction, operand, dead)))
    for (index, position), cut in cuts.items():
        node, name = copies.nodes[index], nodes[index].input[position]
        values = values_of(stored[name]).copy() if file is None else file.writable(light.get(name, stored[name]))
        for contraction, axis, dead in cut:
            values[(slice(None),) * axis + (dead,)] = _zero(contraction, node, stored)
        label = f"{name}__masked_{index}_{position}"
        tensor = numpy_helper.from_array(values, label) if file is None else file.tensor(label, values)
        result.graph.initializer.append(tensor)
        node.input[position] = tensor.name
    for number, node in reversed(sorted(inserts, key=lambda pair: pair[0])):
        scope = max((s for s in copies.all if s.first <= number), key=lambda s: s.first)
        scope.graph.node.insert(number - scope.first, node)
    return result


def _stored(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Stored tensors of a graph and of the bodies in it, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                tensors[node.output[0]] = attribute.t
            for body in (attribute.g, *attribute.graphs):
                tensors |= _stored(body)
    return tensors


def _side(contraction: Contraction, nodes: Sequence[onnx.NodeProto], stored: dict[str, Any]) -> Operand | None:
    """The operand to mask: stored weights if there are any, else the first activation."""
    if not contraction.operands:
        return None
    inputs = nodes[contraction.node].input
    for operand in contraction.operands:
        if inputs[operand.input] in stored:
            return operand
    return contraction.operands[0]


def _zero(contraction: Contraction, node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> Any:
    """Representation of zero: the zero point of quantized weights, one per output channel or one for all."""
    kernel = contraction.kernel
    if kernel is None or kernel.zero is None or kernel.zero >= len(node.input) or not node.input[kernel.zero]:
        return 0
    zero = values_of(stored[node.input[kernel.zero]])
    shape = [1] * len(stored[node.input[kernel.input]].dims)
    shape[kernel.out_axis] = zero.size
    return zero.reshape(shape)


def _mask_activation(
    result: onnx.ModelProto,
    node: onnx.NodeProto,
    info: TensorInfo,
    contraction: Contraction,
    operand: Operand,
    dead: Any,
) -> onnx.NodeProto:
    """A Mul that zeroes the removed channels of one operand of one node."""
    name = node.input[operand.input]
    shape = [1] * len(info.shape or ())
    shape[operand.axis] = len(dead)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(info.elem_type)
    mask = (~dead).astype(dtype).reshape(shape)
    label = f"{name}__mask_{contraction.node}_{operand.input}_{operand.axis}"
    result.graph.initializer.append(numpy_helper.from_array(mask, label))
    node.input[operand.input] = f"{label}_out"
    return onnx.helper.make_node("Mul", [name, label], [f"{label}_out"], name=label)
