"""If nodes that always take the same branch, replaced by that branch.

Exporters write an If that depends on a size (a Squeeze of an axis that may have size 1). If no input can change the
condition, because it is a constant or all sizes are fixed, the other branch is dead and often does not even fit the
shapes. The pass changes the working copy before tracing.
"""

from __future__ import annotations

import onnx

from onnxcop.graph.edit import copied, replace_all
from onnxcop.graph.shapes import ShapeMap, has_dynamic_dims, taken_branch
from onnxcop.graph.subgraphs import initializers_are_inputs, made, rename


def inline_settled(model: onnx.ModelProto, shapes: ShapeMap) -> int:
    """Replace every If whose condition no input can change, in place.

    Args:
        model: The model, with unique names.
        shapes: Its shapes and folded values.

    Returns:
        How many were replaced.
    """
    if initializers_are_inputs(model):
        return 0
    return _Inliner(shapes, has_dynamic_dims(model.graph.input)).visit(model.graph)


class _Inliner:
    def __init__(self, shapes: ShapeMap, dynamic: bool) -> None:
        self.shapes, self.dynamic = shapes, dynamic

    def visit(self, graph: onnx.GraphProto) -> int:
        """Inline in a graph and in the bodies it holds; return how many were replaced."""
        count, nodes = 0, []
        for source in graph.node:
            node = copied(source)
            for attribute in node.attribute:
                if attribute.type == attribute.GRAPH:
                    count += self.visit(attribute.g)
            branch = self._settled(node)
            if branch is None:
                nodes.append(node)
            else:
                count += 1
                nodes += _opened(graph, node, branch)
        if count:
            replace_all(graph.node, nodes)
        return count

    def _settled(self, node: onnx.NodeProto) -> onnx.GraphProto | None:
        if node.op_type != "If" or (self.dynamic and self.shapes[node.input[0]].sized):
            return None
        taken = taken_branch(node, self.shapes)
        return next((a.g for a in node.attribute if a.name == taken), None)


def _opened(graph: onnx.GraphProto, node: onnx.NodeProto, branch: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a branch under the names of the node's outputs; stored tensors go to `graph`."""
    inner = {name for entry in branch.node for name in entry.output}
    names: dict[str, str] = {}
    copies = []
    for value, outer in zip(branch.output, node.output, strict=True):
        if value.name in inner and value.name not in names:
            names[value.name] = outer
        elif outer:
            copies.append((value.name, outer))
    rename(branch, names)
    known = {value.name for value in (*graph.value_info, *graph.output)} | made(graph)
    graph.value_info.extend(value for value in branch.value_info if value.name not in known)
    graph.initializer.extend(branch.initializer)
    graph.sparse_initializer.extend(branch.sparse_initializer)
    identities = [
        onnx.helper.make_node("Identity", [names.get(name, name)], [outer], f"{node.name or outer}_{outer}")
        for name, outer in copies
    ]
    return [*branch.node, *identities]
