"""Layers as criteria and recovery see them: a consumer's weights, channel by channel.

Whatever the operator (convolution of any rank, grouped or transposed, Gemm either way round, MatMul,
a recurrent layer's input), a layer is a data tensor with a channel axis and a weight array
[channels, outputs, taps]. Positions of a flattened map count as taps of their channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import Contraction, Kernel
from onnxcop.graph.constants import Weights
from onnxcop.graph.subgraphs import Scopes


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that sums over prunable channels with trained weights.

    Attributes:
        node: Number of the node (see :mod:`onnxcop.graph.subgraphs`).
        kernel: Where its weights lie.
        tensor: Name of the data tensor it reads.
        axis: The channel axis of that tensor.
        outer: How many blocks of all channels follow one another on the axis (a map flattened with
            channels last).
        inner: How many neighbouring positions belong to one channel (a map flattened with channels first).
        groups: Convolution groups; channels of different groups do not meet in a sum.
        units: int64 [groups × channels], the unit of every channel, -1 where it may not be removed.
    """

    node: int
    kernel: Kernel
    tensor: str
    axis: int
    outer: int
    inner: int
    groups: int
    units: IntArray

    @property
    def channels(self) -> int:
        """Number of channels over all groups."""
        return len(self.units)


def layers_of(model: onnx.ModelProto, structure: Structure) -> list[Layer]:
    """All layers that consume prunable channels, in the order of the graph."""
    found, nodes = [], Scopes.of(model).nodes
    for contraction in structure.coupling.findings.contractions:
        layer = _layer(nodes, structure, contraction)
        if layer is not None:
            found.append(layer)
    return found


def _layer(nodes: Sequence[onnx.NodeProto], structure: Structure, contraction: Contraction) -> Layer | None:
    kernel = contraction.kernel
    if kernel is None or not contraction.operands:
        return None
    data = next((o for o in contraction.operands if o.input != kernel.input), None)
    if data is None:
        return None
    classes = structure.coupling.classes.of[data.atoms]
    if not (structure.class_unit[classes] >= 0).any():
        return None
    outer, inner = 1, 1
    groups = kernel.groups
    if groups == 1:
        outer, inner = _blocks(classes)
    width = len(classes) // (outer * inner)
    first = classes.reshape(outer, width, inner)[0, :, 0]
    tensor = nodes[contraction.node].input[data.input]
    return Layer(
        node=contraction.node,
        kernel=kernel,
        tensor=tensor,
        axis=data.axis,
        outer=outer,
        inner=inner,
        groups=groups,
        units=structure.class_unit[first],
    )


def _blocks(classes: IntArray) -> tuple[int, int]:
    """How a flattened axis is made of channels: (blocks of all channels, positions per channel)."""
    _, counts = np.unique(classes, return_counts=True)
    times = int(counts[0])
    if times == 1 or (counts != times).any():
        return 1, 1
    runs = classes.reshape(-1, times)
    if (runs == runs[:, :1]).all():
        return 1, times
    blocks = classes.reshape(times, -1)
    if (blocks == blocks[:1]).all():
        return times, 1
    return 1, 1


def weight_array(values: Array, layer: Layer) -> FloatArray:
    """Outgoing weights of every channel, float64 [channels / groups, outputs, taps].

    For a grouped layer row j holds stripe j of all groups: channels that are removed together.
    """
    kernel = layer.kernel
    moved = np.moveaxis(values.astype(np.float64), (kernel.in_axis, kernel.out_axis), (0, 1))
    if kernel.groups > 1 and kernel.kind == "deconv":
        split = moved.reshape(kernel.groups, -1, moved.shape[1], int(np.prod(moved.shape[2:], dtype=int)))
        return np.concatenate(list(split), axis=1)
    flat = moved.reshape(moved.shape[0], moved.shape[1], -1)
    if layer.outer * layer.inner == 1:
        return flat
    width = layer.channels
    blocks = flat.reshape(layer.outer, width, layer.inner, flat.shape[1], flat.shape[2])
    return blocks.transpose(1, 3, 0, 2, 4).reshape(width, flat.shape[1], -1)


def layer_weights(weights: Weights, layer: Layer) -> FloatArray | None:
    """Read a layer's weights in normal form (see :func:`weight_array`)."""
    node = weights.nodes[layer.node]
    values = weights.read(node.input[layer.kernel.input])
    return None if values is None else weight_array(values, layer)
