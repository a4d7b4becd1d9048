"""Statistics of all features that a layer sums over: channels by taps of a patch, or by entries of a flattened axis.

With the covariance of channels alone, a removed channel can only be compensated at the same position of the map. A
kernel sees a neighbourhood, and with the covariance of the whole patch every tap of every kept channel helps. The
patches are unfolded in the graph by a convolution with one-hot kernels, so they stay on the device, are padded as in
the layer, and are reduced there. In a large map every other position is unfolded: a grid of twice the stride meets the
border equally often.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcop.analysis.layers import Layer
from onnxcop.calibration.spilled import ChangedMoments
from onnxcop.calibration.statistics import CalibrationStats, Moments, tap_key
from onnxcop.graph.edit import copied
from onnxcop.graph.linear import kernel_of
from onnxcop.graph.shapes import ShapeMap
from onnxcop.graph.subgraphs import initializers_are_inputs

WIDEST = 1152  # features of a patch; larger patches get no covariance
_ENOUGH = 2  # observations of every feature of a flattened axis; with fewer, all entries of a channel count as one
_LARGE = 256  # positions of a map; more add little to the covariance from a sample

_GEOMETRY = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


@dataclass(frozen=True, slots=True)
class PatchStatistics:
    """Moments of the features that layers sum over.

    Attributes:
        stats: The gathered statistics.
        patches: By node, the layer that represents a convolution's unfolded input.
    """

    stats: CalibrationStats
    patches: Mapping[int, Layer]

    def moments(self, layer: Layer) -> Moments | None:
        """Moments of [channels × taps] features, channel by channel, if all were observed, else of [channels]."""
        moments = self._of_features(layer)
        if moments is not None and (layer.outer * layer.inner == 1 or moments.count >= _ENOUGH * len(moments.mean)):
            return moments
        return self.stats.moments(layer) if moments is None else averaged(moments, layer.channels)

    def _of_features(self, layer: Layer) -> Moments | None:
        moments = self.stats.moments(self.patches[layer.node]) if layer.node in self.patches else None
        if moments is None or layer.outer * layer.inner == 1:
            return moments
        places = np.arange(len(moments.mean)).reshape(layer.outer, layer.channels, layer.inner)
        order = places.transpose(1, 0, 2).reshape(-1)
        return Moments(moments.count, moments.mean[order], moments.scatter[np.ix_(order, order)])

    def by_channel(self, layers: Iterable[Layer]) -> CalibrationStats:
        """The same by channel alone, averaged over taps if patches were unfolded."""
        changed = {}
        for layer in layers:
            moments = self._of_features(layer)
            if moments is not None:
                changed[tap_key(layer)] = averaged(moments, layer.channels)
        dropped = frozenset(tap_key(patch) for patch in self.patches.values())
        taps = ChangedMoments(self.stats.taps, changed, dropped)
        return CalibrationStats(self.stats.model, self.stats.samples, taps)


def averaged(moments: Moments, channels: int) -> Moments:
    """Moments of [channels × taps] features, averaged over the taps."""
    block = len(moments.mean) // channels
    scatter = np.einsum("itjt->ij", moments.scatter.reshape(channels, block, channels, block)) / block
    return Moments(moments.count, moments.mean.reshape(channels, block).mean(axis=1), scatter)


def unfolded(
    model: onnx.ModelProto, layers: Iterable[Layer], shapes: ShapeMap, widest: int = WIDEST
) -> tuple[onnx.ModelProto, dict[int, Layer]]:
    """Append the patches of convolutions to a copy of a model, and observe flattened axes entry by entry.

    Args:
        model: The model; it is not changed.
        layers: Its layers.
        shapes: Shapes of its tensors.
        widest: Convolutions whose patches have more features are left out.

    Returns:
        The copy, and by node a layer whose channels are the features of its patches or the entries of its axis.
    """
    copy = copied(model)
    made: dict[tuple[str, str], str] = {}
    unfolded_layers: dict[int, Layer] = {}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer in layers:
        if layer.node >= len(model.graph.node):
            continue  # inside a body of control flow
        node = model.graph.node[layer.node]
        if _flattened(layer, shapes, widest):
            units = np.tile(np.repeat(layer.units, layer.inner), layer.outer)
            unfolded_layers[layer.node] = replace(layer, outer=1, inner=1, units=units)
            continue
        weight = stored.get(node.input[1]) if _unfolds(layer, node) else None
        if weight is None:
            continue
        shape = tuple(weight.dims[2:])
        taps = int(np.prod(shape, dtype=int))
        if taps < 2 or layer.channels * taps > widest:
            continue
        geometry = _geometry(node, shape, shapes[node.output[0]].shape)
        key = (layer.tensor, str((shape, sorted(geometry.items()))))
        if key not in made:
            made[key] = f"{layer.tensor}, patches {len(made)}"
            kind = weight.data_type
            hot = np.tile(np.eye(taps, dtype=helper.tensor_dtype_to_np_dtype(kind)), (layer.channels, 1)).reshape(
                -1, 1, *shape
            )
            kernel = f"{made[key]}_kernel"
            copy.graph.initializer.append(numpy_helper.from_array(hot, kernel))
            unfold = helper.make_node(
                "Conv", [layer.tensor, kernel], [made[key]], made[key], group=layer.channels, **geometry
            )
            copy.graph.node.append(unfold)
            if initializers_are_inputs(copy):
                copy.graph.input.append(helper.make_tensor_value_info(kernel, kind, hot.shape))
        unfolded_layers[layer.node] = replace(layer, tensor=made[key], units=np.repeat(layer.units, taps))
    return copy, unfolded_layers


def _flattened(layer: Layer, shapes: ShapeMap, widest: int) -> bool:
    """Whether a matrix product sums over an axis with several entries per channel, at many positions."""
    several = 1 < layer.outer * layer.inner <= widest // layer.channels
    rank = len(shapes[layer.tensor].shape or ())
    return several and layer.kernel.kind == "matmul" and layer.groups == 1 and rank > 2


def _geometry(node: onnx.NodeProto, kernel: tuple[int, ...], made: Sequence[int] | None) -> dict[str, Any]:
    """Positions at which a convolution applies its kernel; every other position of a large map."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in _GEOMETRY}
    if made is not None and "auto_pad" not in attributes and int(np.prod(made[2:], dtype=int)) >= _LARGE:
        strides = attributes.get("strides", [1] * len(kernel))
        attributes["strides"] = [2 * step if size > 1 else step for step, size in zip(strides, made[2:], strict=True)]
    return attributes


def _unfolds(layer: Layer, node: onnx.NodeProto) -> bool:
    """Whether a layer is a convolution over all channels of a map together."""
    kernel = kernel_of(node)
    plain = kernel is not None and kernel == layer.kernel and kernel.kind == "conv" and kernel.groups == 1
    return plain and layer.outer * layer.inner == 1 and layer.axis == 1
