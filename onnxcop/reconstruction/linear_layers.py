"""Linear layers that can be fitted: their weights, and their inputs and outputs as rows of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, BoolArray, FloatArray
from onnxcop.graph.linear import Kernel, StoredLayer, flipped
from onnxcop.graph.traits import Trait, traits
from onnxcop.reconstruction.network import MaskedNetwork

Rows = tuple[FloatArray, FloatArray]
Fit = tuple[FloatArray, FloatArray | None]

_SAME = (b"SAME_UPPER", b"SAME_LOWER")


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A convolution or matrix product with stored weights that can be fitted.

    Attributes:
        working: The network.
        index: The node's number.
        data: Name of the tensor that it reads.
        own: Location of its weights and bias.
    """

    working: MaskedNetwork
    index: int
    data: str
    own: StoredLayer

    @property
    def kernel(self) -> Kernel:
        """Storage of its weights."""
        return self.own.kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its weights."""
        return tuple(self.working.partition.stored[self.own.weight].dims)

    @property
    def features(self) -> int:
        """Number of inputs that one output sums over: channels of a group × taps."""
        _, channels, _, taps = self.kernel.shape(self.shape)
        return channels * taps

    def read(self) -> Fit:
        """Weights [groups, features, outputs], 0 of what is removed, and bias [groups, outputs]."""
        working, own = self.working, self.own
        weights = self.kernel.read(working.read(own.weight)).swapaxes(2, 3)
        groups, outputs = len(weights), weights.shape[-1]
        weights = weights.reshape(groups, self.features, outputs) * self.alive_features()[..., None]
        if own.bias is None:
            return np.ascontiguousarray(weights), None
        bias = self.kernel.bias_scale * working.read(own.bias).astype(np.float64)
        return np.ascontiguousarray(weights), bias.reshape(groups, outputs)

    def write(self, weights: FloatArray, bias: FloatArray | None) -> None:
        """Inverse of :meth:`read`."""
        groups, channels, outputs, taps = self.kernel.shape(self.shape)
        normal = weights.reshape(groups, channels, taps, outputs).swapaxes(2, 3)
        self.working.write(self.own.weight, self.kernel.write(normal, self.shape))
        if self.own.bias is not None and bias is not None:
            shape = self.working.read(self.own.bias).shape
            self.working.write(self.own.bias, bias.reshape(shape) / self.kernel.bias_scale)

    def rows(self, data: Array, targets: Array, count: int, rng: np.random.Generator) -> Rows:
        """Draw up to `count` positions per sample, as :func:`drawn_rows` does."""
        return drawn_rows(self.working.nodes[self.index], self.kernel, self.shape, data, targets, count, rng)

    def alive_features(self) -> FloatArray:
        """1.0 for features of channels that remain, else 0.0; float64 [groups, features]."""
        alive = self._alive(self.kernel.in_axis)
        return np.repeat(alive, self.features // alive.shape[1], axis=1).astype(np.float64)

    def alive_outputs(self) -> BoolArray:
        """Which outputs remain, bool [groups, outputs]."""
        return self._alive(self.kernel.out_axis)

    def _alive(self, axis: int) -> BoolArray:
        structure = self.working.analysis.structure
        label = structure.coupling.labels.get(self.own.weight)
        atoms = None if label is None else label[axis]
        alive = np.ones(self.shape[axis], dtype=np.bool_)
        if atoms is not None:
            alive = np.append(self.working.alive, True)[structure.units_on(atoms)]  # the last label: not removable
        return self.kernel.by_group(alive, axis)


def linear_layer(working: MaskedNetwork, index: int) -> LinearLayer | None:
    """Return a node as a layer that can be fitted, or None if it is not one."""
    node, own = working.nodes[index], working.stored_layer(index)
    if own is None or not own.plain:
        return None
    data = node.input[0 if own.kernel.input else 1]
    return None if data in working.partition.constants else LinearLayer(working, index, data, own)


def drawn_rows(
    node: onnx.NodeProto, kernel: Kernel, shape: Sequence[int],
    data: Array, targets: Array, count: int, rng: np.random.Generator,
) -> Rows:  # fmt: skip
    """Draw up to `count` positions per sample; a matrix product takes as many rows from the whole batch.

    Args:
        node: A linear layer.
        kernel: Storage of its weights.
        shape: Shape of its weights.
        data: The tensor that it reads.
        targets: What its output should be; which positions are drawn depends on its shape alone.
        count: Positions per sample.
        rng: Source of the draw.

    Returns:
        Inputs float64 [rows, groups, features] and target outputs float64 [rows, groups, outputs].
    """
    if kernel.kind == "matmul":
        drawn = _rows(node, kernel, data, targets, count, rng)
    else:
        drawn = _patches(node, shape[2:], data, targets, count, rng)
    inputs, outputs = (values.astype(np.float64) for values in drawn)
    return inputs.reshape(len(inputs), kernel.groups, -1), outputs.reshape(len(outputs), kernel.groups, -1)


def _rows(
    node: onnx.NodeProto, kernel: Kernel, data: Array, targets: Array, count: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    left = kernel.input == 0
    summed = -2 if left != flipped(node, 1 - kernel.input) else -1
    inputs, outputs = (
        np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        for values, axis in ((data, summed), (targets, -2 if left else -1))
    )
    most = count * len(data)
    if len(inputs) > most:
        chosen = np.sort(rng.choice(len(inputs), most, replace=False))
        inputs, outputs = inputs[chosen], outputs[chosen]
    return inputs, outputs


def _patches(
    node: onnx.NodeProto, window: Sequence[int], data: Array, targets: Array, count: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    samples, space = len(data), targets.shape[2:]
    total = int(np.prod(space))
    flat = np.tile(np.arange(total), (samples, 1))
    if count < total:
        flat = rng.permuted(flat, axis=1)[:, :count]
    positions = np.unravel_index(flat, space)
    batch = np.arange(samples)[:, None]
    met = [
        _met(node, axis, taps, data.shape[2 + axis], space[axis], positions[axis]) for axis, taps in enumerate(window)
    ]
    seen = []
    for tap in product(*map(range, window)):
        places = (place[t] for (place, _), t in zip(met, tap, strict=True))
        there = np.all([exists[t] for (_, exists), t in zip(met, tap, strict=True)], axis=0)
        read_at: tuple[Any, ...] = (batch, slice(None), *places)
        seen.append(np.where(there[..., None], data[read_at], 0))  # [samples, positions, channels]
    made_at: tuple[Any, ...] = (batch, slice(None), *positions)
    stacked, outputs = np.stack(seen, axis=-1), targets[made_at]  # [samples, positions, channels, taps]
    return stacked.reshape(flat.size, -1), outputs.reshape(flat.size, -1)


def _met(node: onnx.NodeProto, axis: int, taps: int, size: int, made: int, positions: Array) -> tuple[Array, Array]:
    """Return the input positions on a spatial axis that each tap reads for given output positions, and which exist.

    The padding of `auto_pad` and `output_shape` follows from the sizes, as ONNX's Conv and ConvTranspose define it.
    """
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    stride, dilation, begin, extra = (
        int(attributes[name][axis]) if attributes.get(name) else default
        for name, default in (("strides", 1), ("dilations", 1), ("pads", 0), ("output_padding", 0))
    )
    spreads = traits(node) & Trait.SPREADS
    if attributes.get("auto_pad") in _SAME or attributes.get("output_shape"):
        small, large = (size, made - extra) if spreads else (made, size)
        added = max((small - 1) * stride + (taps - 1) * dilation + 1 - large, 0)
        begin = added // 2 if attributes.get("auto_pad") == b"SAME_UPPER" else added - added // 2
    steps = np.arange(taps).reshape(-1, *[1] * positions.ndim) * dilation
    if spreads:
        place, left = np.divmod(positions + begin - steps, stride)
    else:
        place, left = positions * stride + steps - begin, np.zeros_like(positions)
    exists = (place >= 0) & (place < size) & (left == 0)
    return np.where(exists, place, 0), exists
