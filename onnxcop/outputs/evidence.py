"""Evidence about outputs: the operators that end the graph, its metadata, and the axis of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxcop._base.types import Array
from onnxcop.graph.traits import MOVES, Trait, traits

_ENDS = {"Softmax": "softmax", "LogSoftmax": "log-softmax", "Sigmoid": "sigmoid", "HardSigmoid": "sigmoid"}
_ROUNDS = frozenset(("Cast", "QuantizeLinear", "DequantizeLinear"))
_FARTHEST = 64  # nodes to follow back from an output


def activations(model: onnx.ModelProto) -> dict[str, str]:
    """The final activation of each output, by name; empty for outputs without one."""
    makers = {name: node for node in model.graph.node for name in node.output if name}
    return {value.name: _activation(value.name, makers) for value in model.graph.output}


def _activation(name: str, makers: Mapping[str, onnx.NodeProto], steps: int = _FARTHEST) -> str:
    """The activation before a tensor, behind nodes that only move its elements; for a Concat, the one of all parts."""
    node = makers.get(name)
    if node is None or steps == 0:
        return ""
    if node.op_type in _ENDS:
        return _ENDS[node.op_type]
    if node.op_type == "Div" and _is_written_out_softmax(node, makers):
        return "softmax"
    if not traits(node) & MOVES and node.op_type not in _ROUNDS:
        return ""
    sources = node.input if traits(node) & Trait.JOINS else node.input[:1]
    activations = {_activation(source, makers, steps - 1) for source in sources}
    return activations.pop() if len(activations) == 1 else ""


def _is_written_out_softmax(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    top, bottom = (makers.get(name) for name in node.input)
    return (
        top is not None and bottom is not None and top.op_type == "Exp" and bottom.op_type == "ReduceSum"
        and bottom.input[0] == node.input[0]
    )  # fmt: skip


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata of the model."""
    return {entry.key: entry.value for entry in model.metadata_props}


def sample_axis(shapes: Sequence[Sequence[int]], counts: Sequence[int]) -> int | None:
    """The axis of the samples in an output: its size is their number (or a multiple) in every batch.

    Args:
        shapes: Shapes of the output, batch by batch.
        counts: Number of samples of every batch.

    Returns:
        The axis; None if there is none, so that a batch counts as a whole.
    """
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1 or ranks == {0}:
        return None
    pairs = list(zip(shapes, counts, strict=True))
    for axis in range(ranks.pop()):
        if all(shape[axis] == count for shape, count in pairs):
            return axis
    several = {shape[0] // count for shape, count in pairs if count and shape[0] % count == 0}
    whole = all(count and shape[0] % count == 0 for shape, count in pairs)
    return 0 if whole and len(several) == 1 else None


def by_sample(values: Array, axis: int | None, count: int) -> Array:
    """An output of one batch with its samples along axis 0; one sample if no axis holds them."""
    if axis is None:
        return values[None]
    moved = np.moveaxis(values, axis, 0)
    return moved if len(moved) == count else moved.reshape(count, -1, *moved.shape[1:])
