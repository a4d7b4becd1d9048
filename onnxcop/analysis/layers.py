"""Layers as criteria and recovery use them: the weights of a consumer, channel by channel.

For every operator (see :mod:`onnxcop.graph.linear`) a layer is a data tensor with a channel axis and weights [groups,
channels, outputs, taps]. Positions of a flattened map count as taps of their channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import Contraction
from onnxcop.graph.constants import Weights
from onnxcop.graph.linear import Kernel
from onnxcop.graph.subgraphs import Scopes

UNREAD = Kernel(0, 0, 0, kind="other")
"""Stands for weights if channels are only observed."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that sums over prunable channels with trained weights.

    Attributes:
        node: Number of the node (see :mod:`onnxcop.graph.subgraphs`).
        kernel: Storage of its weights.
        tensor: Name of its data input.
        axis: The channel axis of that tensor.
        units: int64 [groups × channels], the unit of every channel, -1 if it cannot be removed.
        outer: How many blocks of all channels follow one another on the axis (a map flattened with
            channels last).
        inner: How many neighbouring positions belong to one channel (a map flattened with channels first).
    """

    node: int
    kernel: Kernel
    tensor: str
    axis: int
    units: IntArray
    outer: int = 1
    inner: int = 1

    @property
    def groups(self) -> int:
        """Convolution groups; channels of different groups do not meet in a sum."""
        return self.kernel.groups

    @property
    def channels(self) -> int:
        """Number of channels over all groups."""
        return len(self.units)

    def read(self, stored: Array) -> FloatArray:
        """Weights float64 [groups, channels, outputs, taps], positions of a channel among the taps."""
        weights = self.kernel.read(stored)
        if self.outer * self.inner == 1:
            return weights
        outputs, taps = weights.shape[2:]
        blocks = weights.reshape(self.outer, self.channels, self.inner, outputs, taps)
        return blocks.transpose(1, 3, 0, 2, 4).reshape(1, self.channels, outputs, -1)

    def write(self, weights: FloatArray, stored: Sequence[int]) -> FloatArray:
        """Inverse of :meth:`read`, in the shape that the weights are stored in."""
        if self.outer * self.inner > 1:
            blocks = weights.reshape(self.channels, weights.shape[2], self.outer, self.inner, -1)
            weights = blocks.transpose(2, 0, 3, 1, 4)
        return self.kernel.write(weights.reshape(self.kernel.shape(stored)), stored)


def layers_of(model: onnx.ModelProto, structure: Structure) -> list[Layer]:
    """All layers that consume prunable channels, in graph order."""
    layers, nodes = [], Scopes.of(model).nodes
    for contraction in structure.coupling.findings.contractions:
        layer = _layer(nodes, structure, contraction)
        if layer is not None:
            layers.append(layer)
    return layers


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
    outer, inner = _blocks(classes) if kernel.groups == 1 else (1, 1)
    width = len(classes) // (outer * inner)
    first = classes.reshape(outer, width, inner)[0, :, 0]
    tensor = nodes[contraction.node].input[data.input]
    return Layer(
        node=contraction.node,
        kernel=kernel,
        tensor=tensor,
        axis=data.axis,
        units=structure.class_unit[first],
        outer=outer,
        inner=inner,
    )


def _blocks(classes: IntArray) -> tuple[int, int]:
    """How a flattened axis consists of channels: (blocks of all channels, positions per channel)."""
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


def layer_weights(weights: Weights, layer: Layer) -> FloatArray | None:
    """Outgoing weights of every channel, float64 [channels / groups, outputs, taps].

    For a grouped layer row j holds stripe j of all groups: channels that are removed together.
    """
    node = weights.nodes[layer.node]
    values = weights.read(node.input[layer.kernel.input])
    if values is None:
        return None
    normal = layer.read(values)
    groups, width, outputs, taps = normal.shape
    return normal.swapaxes(0, 1).reshape(width, groups * outputs, taps)
