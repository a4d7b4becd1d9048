"""Any linear layer as rows of inputs and outputs: convolutions by their patches, matrices by their rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray
from onnxcop.graph.traits import Trait, traits
from onnxcop.reconstruction.network import MaskedNetwork


@dataclass(frozen=True)
class LinearNode:
    """A convolution or matrix product with weights and bias of its own.

    Attributes:
        kind: "conv" or "matmul".
        data: Name of the tensor it reads.
        output: Name of the tensor it makes, bias included.
        stop: The node after the one that makes `output`.
        weight: Name of its weights.
        bias: Name of its bias, None where it has none.
        groups: Convolution groups.
        features: Inputs that one output sums over: channels of a group × taps.
        transposed: For matrices, whether the outputs come first.
        flipped: For matrices, whether the features of the data come first.
        node: Its number.
        scale: Factor of the product, the bias aside.
    """

    kind: str
    data: str
    output: str
    stop: int
    weight: str
    bias: str | None
    groups: int
    features: int
    transposed: bool
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    node: int = 0
    scale: float = 1.0
    flipped: bool = False

    def read(self, working: MaskedNetwork) -> tuple[FloatArray, FloatArray | None]:
        """Weights [groups, features, outputs of a group], 0 of what is gone, and bias [groups, outputs of a group]."""
        values = working.read(self.weight).astype(np.float64)
        if self.kind == "conv":
            per_group = values.reshape(self.groups, values.shape[0] // self.groups, -1)
            weights = per_group.transpose(0, 2, 1)
        else:
            weights = (values.T if self.transposed else values)[None]
        bias = None
        if self.bias is not None:
            bias = np.broadcast_to(
                working.read(self.bias).astype(np.float64).reshape(-1), (self.groups * weights.shape[2],)
            ).reshape(self.groups, -1)
        return np.ascontiguousarray(self.scale * weights * self.alive_features(working)[:, None]), bias

    def write(self, working: MaskedNetwork, weights: FloatArray, bias: FloatArray | None) -> None:
        """Inverse of :meth:`read`."""
        shape = working.read(self.weight).shape
        if self.kind == "conv":
            values = weights.transpose(0, 2, 1).reshape(shape)
        else:
            values = weights[0].T if self.transposed else weights[0]
        working.write(self.weight, values / self.scale)
        if self.bias is not None and bias is not None:
            working.write(self.bias, bias.reshape(working.read(self.bias).shape))

    def alive_features(self, working: MaskedNetwork) -> FloatArray:
        """1 for features of channels that are still there, float64 [features]."""
        alive = _alive_axis(working, self.weight, self._in_axis())
        taps = self.features // len(alive) if len(alive) else 1
        return np.repeat(alive, taps).astype(np.float64)

    def alive_outputs(self, working: MaskedNetwork) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which outputs are still there, bool [groups, outputs of a group]."""
        alive = _alive_axis(working, self.weight, self._out_axis())
        return alive.reshape(self.groups, -1)

    def _in_axis(self) -> int:
        return 1 if self.kind == "conv" or self.transposed else 0

    def _out_axis(self) -> int:
        return 0 if self.kind == "conv" or self.transposed else 1


def _alive_axis(working: MaskedNetwork, name: str, axis: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    structure = working.analysis.structure
    label = structure.coupling.labels.get(name)
    size = working.partition.stored[name].dims[axis]
    atoms = None if label is None else label[axis]
    if atoms is None:
        return np.ones(size, dtype=np.bool_)
    units = structure.units_on(atoms)
    return np.append(working.alive, True)[units]  # the last stands for what may not be removed


def linear_node(working: MaskedNetwork, index: int) -> LinearNode | None:
    """Describe a node as a linear layer; None if it is none, or its weights are not its own."""
    node = working.model.graph.node[index]
    known = traits(node)
    if not known & Trait.LINEAR or node.op_type == "ConvTranspose" or len(node.input) > 3:
        return None
    weight = working.weight_name(index, 1)
    if weight is None or working.partition.stored[weight].data_type not in (1, 10, 11):
        return None
    shape = tuple(working.partition.stored[weight].dims)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("activation") or attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        return None
    if node.op_type in ("Conv", "FusedConv"):
        return _conv(working, index, node, weight, shape, attributes)
    scale, flipped = float(attributes.get("alpha", 1.0)), bool(attributes.get("transA", 0))
    rank = len(working.partition.shapes[node.input[0]].shape or ())
    if len(shape) != 2 or scale == 0.0 or (flipped and rank != 2) or node.input[0] in working.partition.constants:
        return None
    transposed = bool(attributes.get("transB", 0))
    kind = "gemm" if known & Trait.BIASED else "matmul"
    bias = working.bias_name(index, kind, 2)
    if kind == "gemm" and bias is None and _has_bias(node):
        return None
    output, stop = node.output[0], index + 1
    if bias is not None and int(np.prod(working.partition.stored[bias].dims)) != shape[0 if transposed else 1]:
        if kind == "gemm":
            return None
        bias = None  # one number for all outputs stays as it is
    if kind == "matmul" and bias is not None:
        stop = next(i for i in range(index + 1, working.partition.count) if output in working.model.graph.node[i].input)
        output = working.model.graph.node[stop].output[0]
        stop += 1
    features = shape[1] if transposed else shape[0]
    return LinearNode(
        kind="matmul", data=node.input[0], output=output, stop=stop, weight=weight, bias=bias, groups=1,
        features=features, transposed=transposed, node=index, scale=scale, flipped=flipped,
    )  # fmt: skip


def _conv(
    working: MaskedNetwork,
    index: int,
    node: onnx.NodeProto,
    weight: str,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> LinearNode | None:
    kernel = shape[2:]
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    groups = int(attributes.get("group", 1))
    bias = working.bias_name(index, "conv", 2)
    if bias is None and _has_bias(node):
        return None
    zeros, ones = (0,) * (2 * len(kernel)), (1,) * len(kernel)
    return LinearNode(
        kind="conv", data=node.input[0], output=node.output[0], stop=index + 1, weight=weight, bias=bias,
        groups=groups, features=int(np.prod(shape[1:])), transposed=False, kernel=tuple(kernel),
        strides=tuple(attributes.get("strides", ones)), dilations=tuple(attributes.get("dilations", ones)),
        pads=tuple(attributes.get("pads", zeros)), node=index,
    )  # fmt: skip


def _has_bias(node: onnx.NodeProto) -> bool:
    """Whether the node adds a bias, its own or not."""
    return len(node.input) > 2 and bool(node.input[2])


def rows_of(
    node: LinearNode, data: Array, wanted: Array, count: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Draw up to `count` positions per sample: inputs [rows, groups, features], outputs [rows, groups, outputs]."""
    if node.kind == "matmul":
        data = data.T if node.flipped else data
        a = data.reshape(-1, data.shape[-1])
        b = wanted.reshape(-1, wanted.shape[-1])
        most = count * len(data)
        if len(a) > most:
            chosen = np.sort(rng.choice(len(a), most, replace=False))
            a, b = a[chosen], b[chosen]
        return a[:, None, :].astype(np.float64), b[:, None, :].astype(np.float64)
    rank = len(node.kernel)
    padded = np.pad(data, [(0, 0), (0, 0), *((node.pads[i], node.pads[i + rank]) for i in range(rank))])
    space = wanted.shape[2:]
    total = int(np.prod(space))
    samples = len(data)
    taken = min(count, total)
    flat = (
        rng.permuted(np.tile(np.arange(total), (samples, 1)), axis=1)[:, :taken]
        if taken < total
        else np.tile(np.arange(total), (samples, 1))
    )
    positions = np.unravel_index(flat, space)
    batch = np.arange(samples)[:, None]
    taps = []
    for offset in product(*(range(k) for k in node.kernel)):
        place = (positions[i] * node.strides[i] + offset[i] * node.dilations[i] for i in range(rank))
        taken_at: tuple[Any, ...] = (batch, slice(None), *place)
        taps.append(padded[taken_at])  # [samples, taken, channels]
    stacked = np.stack(taps, axis=-1).astype(np.float64)  # [samples, taken, channels, taps]
    rows = stacked.reshape(samples * taken, node.groups, -1)
    made_at: tuple[Any, ...] = (batch, slice(None), *positions)
    outputs = wanted[made_at].astype(np.float64)
    return rows, outputs.reshape(samples * taken, node.groups, -1)
