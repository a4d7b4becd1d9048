"""One description of linear layers of all operators: weights [groups, in, out, taps].

Convolutions of any rank (grouped, depthwise or transposed), Gemm with any transposes, and matrix products with weights
on either side all sum the channels of their data with weights. This module finds the weights of a node, reads them in
this form, and writes changed ones back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray
from onnxcop.graph.shapes import ShapeMap
from onnxcop.graph.traits import Trait, traits

_BATCHES = ("transBatchA", "transBatchB")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Storage of the weights of a node.

    Attributes:
        input: Input of the node that holds them.
        in_axis: Axis of the weights over the summed channels (of one group).
        out_axis: Axis over the output channels (of all groups).
        groups: Number of groups.
        bias: Input that holds the bias, None if the operator takes none.
        kind: "conv"; "deconv", whose `in_axis` runs over all groups and `out_axis` over those of one; "matmul";
            "recurrent" or "other" for weights that are read, but never changed.
        zero: Input that holds the zero point of quantized weights.
        scale: Factor of the weights in the operator.
        bias_scale: Factor of the bias.
    """

    input: int
    in_axis: int
    out_axis: int
    groups: int = 1
    bias: int | None = None
    kind: Literal["conv", "deconv", "matmul", "recurrent", "other"] = "matmul"
    zero: int | None = None
    scale: float = 1.0
    bias_scale: float = 1.0

    @property
    def changeable(self) -> bool:
        """Whether the weights can be replaced by others."""
        return self.kind not in ("recurrent", "other") and self.zero is None and self.scale != 0.0

    def shape(self, stored: Sequence[int]) -> tuple[int, int, int, int]:
        """The sizes (groups, in, out, taps) of weights stored in a given shape."""
        ins, outs = stored[self.in_axis], stored[self.out_axis]
        if self.kind == "deconv":
            ins //= self.groups
        else:
            outs //= self.groups
        every = int(np.prod(stored, dtype=np.int64))
        return self.groups, ins, outs, every // max(self.groups * ins * outs, 1)

    def read(self, stored: Array) -> FloatArray:
        """The factors that the node multiplies its data by, float64 [groups, in, out, taps]."""
        values = stored.astype(np.float64)
        return self.arranged(values if self.scale == 1.0 else values * self.scale)

    def arranged(self, stored: Array) -> Array:
        """Weights as they are stored, [groups, in, out, taps] of their own dtype: a view wherever there is one."""
        moved = np.moveaxis(stored, (self.in_axis, self.out_axis), (0, 1))
        groups, ins, outs, taps = self.shape(stored.shape)
        if self.kind == "deconv":
            return moved.reshape(groups, ins, outs, taps)
        return moved.reshape(ins, groups, outs, taps).swapaxes(0, 1)

    def write(self, weights: FloatArray, stored: Sequence[int]) -> FloatArray:
        """Inverse of :meth:`read`, in the stored shape of the weights."""
        both = (self.in_axis, self.out_axis)
        rest = [size for axis, size in enumerate(stored) if axis not in both]
        moved = weights if self.kind == "deconv" else weights.swapaxes(0, 1)
        moved = np.moveaxis(moved.reshape(*(stored[axis] for axis in both), *rest), (0, 1), both)
        return moved if self.scale == 1.0 else moved / self.scale

    def by_group(self, values: Array, axis: int) -> Array:
        """Values for every index of `in_axis` or `out_axis`, as [groups, channels of one group]."""
        all_groups = self.in_axis if self.kind == "deconv" else self.out_axis
        return values.reshape(self.groups, -1) if axis == all_groups else np.tile(values, (self.groups, 1))


def kernel_of(node: onnx.NodeProto, position: int = 1, rank: int = 2) -> Kernel | None:
    """The description of a node's weights; None if its operator is not a linear layer.

    Args:
        node: The node.
        position: Input of a matrix product that holds the weights.
        rank: Number of their axes.
    """
    known = traits(node)
    if not known & Trait.LINEAR or any(a.name in _BATCHES and a.i for a in node.attribute):
        return None
    if known & Trait.SLIDES:
        return deconvolution(node) if known & Trait.SPREADS else convolution(node)
    if node.op_type == "Einsum":
        kernel = einsum_weights(node)
        return kernel if position and rank == 2 and kernel is not None and kernel.changeable else None
    biased = bool(known & Trait.BIASED)
    return None if biased and position == 0 else matrix(node, position, rank, bias=2 if biased else None)


def convolution(node: onnx.NodeProto) -> Kernel:
    """The weights of a convolution, [groups × out, in, *taps]."""
    return Kernel(input=1, in_axis=1, out_axis=0, groups=_attribute(node, "group").i or 1, bias=2, kind="conv")


def deconvolution(node: onnx.NodeProto) -> Kernel:
    """The weights of a transposed convolution, [groups × in, out, *taps]."""
    return Kernel(input=1, in_axis=0, out_axis=1, groups=_attribute(node, "group").i or 1, bias=2, kind="deconv")


def matrix(node: onnx.NodeProto, position: int = 1, rank: int = 2, bias: int | None = None) -> Kernel:
    """The weights of a matrix product, on its right or, as its input 0, on its left."""
    first, last = max(rank - 2, 0), rank - 1
    rows_first = bool(position) != flipped(node, position)
    return Kernel(
        input=position,
        in_axis=first if rows_first else last,
        out_axis=last if rows_first else first,
        bias=bias,
        scale=_attribute(node, "alpha", 1.0).f,
        bias_scale=_attribute(node, "beta", 1.0).f,
    )


def multiply_accumulates(model: onnx.ModelProto, shapes: ShapeMap) -> float:
    """Multiply-accumulates of a model's convolutions and matrix products, for the given shapes."""
    total = 0.0
    for node in model.graph.node:
        if not traits(node) & Trait.LINEAR:
            continue
        data, weights, result = (shapes[name].shape for name in (*node.input[:2], node.output[0]))
        if data is None or weights is None or result is None or len(weights) < 2:
            continue
        kernel = kernel_of(node, rank=len(weights))
        if kernel is None or kernel.kind == "matmul":
            total += math.prod(result) * weights[-2 if kernel is None else kernel.in_axis]
        else:
            total += math.prod(data if kernel.kind == "deconv" else result) * math.prod(weights[1:])
    return total


def einsum_terms(node: onnx.NodeProto) -> tuple[list[str], str]:
    """The letters of every operand of an Einsum, and those of its result."""
    left, arrow, result = _attribute(node, "equation").s.decode().replace(" ", "").partition("->")
    implied = (letter for letter in sorted(set(left)) if letter.isalpha() and left.count(letter) == 1)
    return left.split(","), result if arrow else "".join(implied)


def einsum_weights(node: onnx.NodeProto) -> Kernel | None:
    """The weights of an Einsum, its second operand of two axes; they may be changed where it is a matrix product."""
    terms, result = einsum_terms(node)
    if len(terms) != 2 or len(terms[1]) != 2:
        return None
    data, weights = terms
    summed = [place for place, letter in enumerate(weights) if letter in data and letter not in result]
    if len(summed) != 1 or weights[1 - summed[0]] in data or weights[1 - summed[0]] not in result:
        return None
    in_axis, out_axis = summed[0], 1 - summed[0]
    letters = data.replace(".", "")
    product = (data[:-1] + weights[out_axis], data[-1:]) == (result, weights[in_axis])
    product = product and len(set(letters)) == len(letters)
    return Kernel(input=1, in_axis=in_axis, out_axis=out_axis, kind="matmul" if product else "other")


def flipped(node: onnx.NodeProto, position: int) -> bool:
    """Whether a matrix product transposes an operand."""
    return bool(_attribute(node, "transB" if position else "transA").i)


def _attribute(node: onnx.NodeProto, name: str, default: float = 0.0) -> onnx.AttributeProto:
    return next((a for a in node.attribute if a.name == name), onnx.AttributeProto(name=name, f=default))


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer with weights of its own, which may change.

    Attributes:
        kernel: Storage of the weights.
        weight: Name of the weights.
        bias: Name of a bias of its own, one number for every output; None if it has none.
        output: Name of its output, bias included.
        stop: The node after the one that makes `output`.
        plain: Whether `output` is the weighted sum and that bias, without another bias, sum or activation.
    """

    kernel: Kernel
    weight: str
    bias: str | None
    output: str
    stop: int
    plain: bool


def stored_layer(
    nodes: Sequence[onnx.NodeProto], number: int, kernel: Kernel,
    stored: Mapping[str, onnx.TensorProto], uses: Callable[[str], int],
) -> StoredLayer | None:  # fmt: skip
    """Location of a layer's weights and bias; None if they may not change.

    Args:
        nodes: Nodes of the top-level graph.
        number: Number of the layer's node.
        kernel: Storage of its weights.
        stored: Tensors by name.
        uses: How often a tensor is read.
    """
    node = nodes[number]
    weight: str = node.input[kernel.input]
    if not kernel.changeable or weight not in stored or uses(weight) != 1 or stored[weight].data_type not in _FLOATS:
        return None
    if kernel.kind == "matmul" and len(stored[weight].dims) != 2:
        return None
    groups, _, outs, _ = kernel.shape(stored[weight].dims)
    output, stop, bias = node.output[0], number + 1, None
    if kernel.bias is not None:
        given = "".join(node.input[kernel.bias : kernel.bias + 1]) if kernel.bias_scale != 0.0 else ""
        if given and _own(given, groups * outs, stored, uses):
            bias = given
        plain = given == (bias or "") and not any(node.input[kernel.bias + 1 :]) and not _activated(node)
        return StoredLayer(kernel=kernel, weight=weight, bias=bias, output=output, stop=stop, plain=plain)
    follower = next((i for i in range(stop, len(nodes)) if output in nodes[i].input), None)
    if follower is not None and uses(output) == 1:
        following = following_bias(nodes[follower], output, stored, -1 if kernel.input else -2)
        if following is not None and _own(following, outs, stored, uses):
            bias, output, stop = following, nodes[follower].output[0], follower + 1
    return StoredLayer(kernel=kernel, weight=weight, bias=bias, output=output, stop=stop, plain=True)


def _activated(node: onnx.NodeProto) -> bool:
    return any(a.name == "activation" and a.s for a in node.attribute)


def _own(name: str, size: int, stored: Mapping[str, onnx.TensorProto], uses: Callable[[str], int]) -> bool:
    return name in stored and uses(name) == 1 and int(np.prod(stored[name].dims, dtype=np.int64)) == size


def following_bias(
    follower: onnx.NodeProto, tensor: str, stored: Mapping[str, onnx.TensorProto], axis: int = -1
) -> str | None:
    """The vector that an addition after a matrix product adds along an axis, counted from the end, if it is stored."""
    if not traits(follower) & Trait.ADDS:
        return None
    other: list[str] = [name for name in follower.input if name != tensor]
    if len(other) != 1 or other[0] not in stored:
        return None
    dims = list(stored[other[0]].dims)
    vector = len(dims) >= -axis and all(size == 1 for place, size in enumerate(dims) if place != len(dims) + axis)
    return other[0] if vector else None
