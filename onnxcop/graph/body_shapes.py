"""Types and sizes of what goes into the bodies of If, Loop and Scan, and of what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx

from onnxcop.graph.control_flow import Body
from onnxcop.graph.tensor_info import Shape, TensorInfo, from_type


class Infos(Protocol):
    """What is known of tensors, by name."""

    def __getitem__(self, name: str) -> TensorInfo: ...


def entering(node: onnx.NodeProto, body: Body, infos: Infos) -> dict[str, TensorInfo]:
    """What is known of a body's inputs at its first step, but for values, which the steps change."""
    found: dict[str, TensorInfo] = {}
    for value in body.graph.input:
        declared = from_type(value.type)
        found[value.name] = declared if declared.elem_type else TensorInfo()
    if node.op_type == "Loop":
        step, going = (value.name for value in body.graph.input[:2])
        found[step] = TensorInfo(onnx.TensorProto.INT64, found[step].shape or ())
        shape: Shape = found[going].shape or ()
        start = infos[node.input[1]].value if node.input[1] else np.ones((), np.bool_)
        goes = start is not None and bool(np.all(start))
        found[going] = TensorInfo(onnx.TensorProto.BOOL, shape, np.ones(shape, np.bool_) if goes else None)
    for passage in body.enters:
        info = infos[passage.outer]
        outer = info.shape
        if outer is not None and passage.axis is not None:
            axis = passage.axis % len(outer)
            outer = outer[:axis] + outer[axis + 1 :]
        found[passage.inner] = TensorInfo(info.elem_type, outer)
    return found


def leaving(node: onnx.NodeProto, bodies: Sequence[Body], infos: Infos) -> dict[str, TensorInfo]:
    """What is known of a node's outputs once its bodies have been walked."""
    found: dict[str, TensorInfo] = {}
    taken = taken_branch(node, infos)
    for body in bodies:
        if taken is not None and body.attribute != taken:
            continue
        for passage in body.leaves:
            info = infos[passage.inner]
            shape = info.shape
            if shape is not None and passage.axis is not None:
                count = steps(node, body, infos)
                axis = passage.axis % (len(shape) + 1)
                shape = None if count is None else (*shape[:axis], count, *shape[axis:])
            other = found.get(passage.outer)
            if other is not None and other.shape != shape:
                shape = None
            found[passage.outer] = TensorInfo(info.elem_type, shape)
    return found


def taken_branch(node: onnx.NodeProto, infos: Infos) -> str | None:
    """The branch that an If takes at the analysed sizes, None where the data decides."""
    if node.op_type != "If":
        return None
    value = infos[node.input[0]].value
    if value is None:
        return None
    return "then_branch" if bool(np.all(value)) else "else_branch"


def steps(node: onnx.NodeProto, body: Body, infos: Infos) -> int | None:
    """How often a body runs, None where that is not known before the run."""
    if node.op_type == "If":
        return 1
    if node.op_type == "Scan":
        for passage in body.enters:
            shape = infos[passage.outer].shape
            if passage.axis is not None and shape is not None:
                return shape[passage.axis % len(shape)]
        return None
    most = infos[node.input[0]].value if node.input[0] else None
    goes_on = infos[body.rigid[0]].value
    if most is None or goes_on is None or not bool(np.all(goes_on)):
        return None
    return int(np.asarray(most).reshape(-1)[0])
