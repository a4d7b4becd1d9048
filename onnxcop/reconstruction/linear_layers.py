"""Linear layers that can be fitted: their weights, and their inputs and outputs as rows of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, BoolArray, Feed, FloatArray, IntArray
from onnxcop.graph.linear import Kernel, StoredLayer, flipped
from onnxcop.graph.traits import Trait, traits
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.normal_equations import FittedLayer

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

    def drawn(
        self, data: Sequence[int], targets: Sequence[int], count: int, rng: np.random.Generator
    ) -> IntArray | None:
        """The positions of :meth:`rows` for tensors of some shapes, as :func:`drawn_positions` returns them."""
        return drawn_positions(self.working.nodes[self.index], self.kernel, data, targets, count, rng)

    def rows_at(self, data: Array, targets: Array, drawn: IntArray | None) -> Rows:
        """The rows of :meth:`rows` at positions that were drawn."""
        return rows_at(self.working.nodes[self.index], self.kernel, self.shape, data, targets, drawn)

    def counted(self, data: Sequence[int], targets: Sequence[int], count: int) -> int:
        """How many rows :meth:`rows` returns for a batch, without drawing them."""
        if self.kernel.kind == "matmul":
            summed = _summed_axis(self.working.nodes[self.index], self.kernel)
            return min(int(np.prod(data)) // max(1, data[summed]), count * data[0])
        return data[0] * min(count, int(np.prod(targets[2:])))

    def fitted(self) -> FittedLayer:
        """Its weights, as regression needs them."""
        return FittedLayer(*self.read(), self.alive_features(), self.alive_outputs())

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
    drawn = drawn_positions(node, kernel, data.shape, targets.shape, count, rng)
    return rows_at(node, kernel, shape, data, targets, drawn)


def drawn_positions(
    node: onnx.NodeProto, kernel: Kernel, data: Sequence[int], targets: Sequence[int], count: int,
    rng: np.random.Generator,
) -> IntArray | None:  # fmt: skip
    """Draw the positions of :func:`drawn_rows`.

    Args:
        node: A linear layer.
        kernel: Storage of its weights.
        data: Shape of the tensor that it reads.
        targets: Shape of its output.
        count: Positions per sample.
        rng: Drawn from only if there are more positions.

    Returns:
        int64 [samples, count], or [rows] for a matrix product; None for all positions.
    """
    if kernel.kind == "matmul":
        rows, most = int(np.prod(data)) // max(1, data[_summed_axis(node, kernel)]), count * data[0]
        return np.sort(rng.choice(rows, most, replace=False)) if rows > most else None
    total = int(np.prod(targets[2:]))
    if count >= total:
        return None
    return rng.permuted(np.tile(np.arange(total), (data[0], 1)), axis=1)[:, :count]


def rows_at(
    node: onnx.NodeProto, kernel: Kernel, shape: Sequence[int], data: Array, targets: Array, drawn: IntArray | None
) -> Rows:  # fmt: skip
    """The rows of :func:`drawn_rows` at positions that were drawn."""
    found = (
        _rows(node, kernel, data, targets, drawn)
        if kernel.kind == "matmul"
        else _patches(node, shape[2:], data, targets, drawn)
    )
    inputs, outputs = (values.astype(np.float64) for values in found)
    return inputs.reshape(len(inputs), kernel.groups, -1), outputs.reshape(len(outputs), kernel.groups, -1)


def _summed_axis(node: onnx.NodeProto, kernel: Kernel) -> int:
    """The axis of its input that a matrix product sums over."""
    left = kernel.input == 0
    return -2 if left != flipped(node, 1 - kernel.input) else -1


def _rows(
    node: onnx.NodeProto, kernel: Kernel, data: Array, targets: Array, chosen: IntArray | None
) -> tuple[Array, Array]:
    inputs, outputs = (
        np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        for values, axis in ((data, _summed_axis(node, kernel)), (targets, -2 if kernel.input == 0 else -1))
    )
    return (inputs, outputs) if chosen is None else (inputs[chosen], outputs[chosen])


def _patches(
    node: onnx.NodeProto, window: Sequence[int], data: Array, targets: Array, drawn: IntArray | None
) -> tuple[Array, Array]:
    samples, space = len(data), targets.shape[2:]
    flat = np.tile(np.arange(int(np.prod(space))), (samples, 1)) if drawn is None else drawn
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


def shortcut_of(layer: LinearLayer) -> str | None:
    """The other operand of the addition that is the only reader of a layer's output, if it is already known."""
    working, made = layer.working, layer.own.output
    readers = [n for n in working.model.graph.node if made in n.input]
    if len(readers) != 1 or not traits(readers[0]) & Trait.ADDS or len(readers[0].input) != 2:
        return None
    other = next((name for name in readers[0].input if name != made), None)
    if other is None or other in working.partition.constants:
        return None
    known = working.partition.maker.get(other, -1) < layer.index and other in working.partition.crossing(layer.index)
    return other if known else None


def wanted_names(layer: LinearLayer) -> list[str]:
    """Tensors of the original that the target of a layer is made from."""
    shortcut = shortcut_of(layer)
    return [layer.own.output] if shortcut is None else [layer.own.output, shortcut]


def wanted_output(layer: LinearLayer, live: Feed, known: Feed) -> Array:
    """The original's output for a batch, plus the error of the shortcut that it is added to.

    Args:
        layer: The layer.
        live: The original's tensors of :func:`wanted_names`.
        known: Live tensors of the pruned network before the layer.
    """
    made, *shortcuts = wanted_names(layer)
    target = live[made]
    for shortcut in shortcuts:
        if live[shortcut].shape == target.shape:
            target = target + (live[shortcut] - known[shortcut])
    return target


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
