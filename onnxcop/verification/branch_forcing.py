"""A model whose branches are chosen from outside, so that what random inputs never reach is compared too."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop.graph.shapes import ShapeMap
from onnxcop.graph.subgraphs import Scopes


def conditions(model: onnx.ModelProto, shapes: ShapeMap) -> set[str]:
    """Names of the conditions on which data decides, not sizes."""
    named = {node.input[0] for node in Scopes.of(model).nodes if node.op_type == "If"}
    return {name for name in named if shapes[name].value is None}


def forced(model: onnx.ModelProto, free: Set[str], branch: bool) -> onnx.ModelProto:
    """Return a copy in which the If nodes with these conditions take their then_branch, or their else_branch.

    Args:
        model: The model; it is not changed.
        free: Names of conditions.
        branch: True for the then_branch.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    scopes = Scopes.of(result)
    name, taken = "forced_branch", scopes.names()
    while name in taken:
        name += "_"
    for node in scopes.nodes:
        if node.op_type == "If" and node.input[0] in free:
            node.input[0] = name
    result.graph.initializer.append(numpy_helper.from_array(np.array(branch), name))
    return result
