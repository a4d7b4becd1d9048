"""Channels of one tensor brought to one magnitude, without a change of what the network computes.

An int8 tensor has one scale for all channels, so a channel with small values is rounded coarsely beside one with large
values. Between two linear layers with a positively homogeneous function, a channel may be multiplied by a number if the
weights that read it are divided by it (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019). Here that holds for all tensors that such functions and additions join, so the sum of a
residual network is balanced too. How far channels are balanced is where the predicted rounding error is least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array, Feed, FloatArray
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.edit import copied
from onnxcop.graph.io import values_of
from onnxcop.graph.linear import Kernel, kernel_of
from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import Trait, traits
from onnxcop.recovery.int8 import tensors_of
from onnxcop.runtime.session import EngineOptions

_HOMOGENEOUS = frozenset(
    "AveragePool Dropout GlobalAveragePool GlobalMaxPool Identity LeakyRelu MaxPool PRelu Relu".split()
)  # f(s x) = s f(x) for s > 0, channel by channel
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # exponents of the balance to choose from
_SMALLEST = 1 / 64  # of the largest channel: what is smaller is treated like this
_STEPS = 255.0, 127.0  # of activations, and of weights on either side of zero


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer whose weights may be scaled.

    Attributes:
        source: Tensor that it reads.
        output: Tensor that it makes.
        weight: Name of its weights.
        bias: Name of its bias, or nothing.
        kernel: Storage of the weights.
        outputs: Number of output channels.
    """

    source: str
    output: str
    weight: str
    bias: str
    kernel: Kernel
    outputs: int


@dataclass(slots=True)
class _Joined:
    """Tensors whose channels can only be scaled together.

    Attributes:
        tensors: Their names.
        makers: Layers that make one of them.
        readers: Layers that read one of them.
        limit: Number that a Clip among them does not exceed.
    """

    tensors: list[str] = field(default_factory=list)
    makers: list[_Layer] = field(default_factory=list)
    readers: list[_Layer] = field(default_factory=list)
    limit: float = np.inf


@dataclass(frozen=True, slots=True)
class _Channels:
    """Statistics of a tensor's channels: largest absolute values and mean squares, float64 [channels]; its rank."""

    peak: FloatArray
    power: FloatArray
    rank: int


def equalized(model: onnx.ModelProto, feeds: Sequence[Feed], options: EngineOptions) -> onnx.ModelProto:
    """Return a model with balanced channels.

    It computes the same, with one exception: behind a Clip, a channel does not exceed its largest value on the samples.

    Args:
        model: A model in single precision; it is not changed.
        feeds: Calibration samples.
        options: How to run it.

    Returns:
        A copy; the same model if nothing can be balanced.
    """
    joined = _joined(model)
    if not joined:
        return model
    stored = {name: values_of(tensor) for name, tensor in constant_tensors(model).items()}
    statistics = _statistics(model, [name for group in joined for name in group.tensors], feeds, options)
    changed: dict[str, Array] = {}
    for group in joined:
        weights = [changed.get(layer.weight, stored[layer.weight]) for layer in group.readers]
        factors = _factors(group, statistics, weights)
        if factors is None:
            continue
        for layer in group.makers:
            changed[layer.weight] = _scaled(changed.get(layer.weight, stored[layer.weight]), layer.kernel, out=factors)
            if layer.bias:
                bias = changed.get(layer.bias, stored[layer.bias])
                changed[layer.bias] = (bias * factors.reshape(bias.shape)).astype(bias.dtype)
        for layer in group.readers:
            weight = changed.get(layer.weight, stored[layer.weight])
            changed[layer.weight] = _scaled(weight, layer.kernel, into=1 / factors)
    result = copied(model)
    for tensor in result.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
    return result


def _scaled(stored: Array, kernel: Kernel, into: FloatArray | None = None, out: FloatArray | None = None) -> Array:
    """Weights with their input or output channels multiplied."""
    weights = kernel.read(stored)  # [groups, in, out, taps]
    if into is not None:
        weights = weights * into.reshape(kernel.groups, -1, 1, 1)
    if out is not None:
        weights = weights * out.reshape(kernel.groups, 1, -1, 1)
    return kernel.write(weights, stored.shape).astype(stored.dtype)


def _factors(group: _Joined, statistics: Mapping[str, _Channels], weights: Sequence[Array]) -> FloatArray | None:
    """What to multiply channels by, at least 1; None if that would not reduce the rounding error."""
    sizes = {(statistics[name].rank, statistics[name].peak.size) for name in group.tensors}
    made = {layer.outputs for layer in group.makers}
    if len(sizes) != 1 or made != {size for _, size in sizes}:
        return None  # some are broadcast
    share = np.zeros(made.pop())
    for name in group.tensors:  # each channel's part of the range, where it is largest
        peak = np.minimum(statistics[name].peak, group.limit)
        whole = group.limit if np.isfinite(group.limit) else float(peak.max(initial=0.0))
        part = peak / whole if whole > 0 else np.ones_like(peak)
        share = np.maximum(share, part)
    share = np.clip(share, _SMALLEST, 1.0)
    errors = [_error(group, statistics, weights, share**-exponent) for exponent in _SHARES]
    best = int(np.argmin(errors))
    return None if best == 0 else share ** -_SHARES[best]


def _error(group: _Joined, statistics: Mapping[str, _Channels], weights: Sequence[Array], factors: FloatArray) -> float:
    """Predicted rounding error of the layers that read some tensors, relative to their outputs."""
    total = 0.0
    for layer, stored in zip(group.readers, weights, strict=True):
        found = statistics[layer.source]
        kernel = layer.kernel.read(stored)
        scaled = kernel / factors.reshape(kernel.shape[0], -1, 1, 1)
        whole = float((np.minimum(found.peak, group.limit) * factors).max())
        step = whole / _STEPS[0]
        power = (found.power * factors**2).reshape(kernel.shape[0], -1, 1, 1)
        signal = np.sum(kernel**2 * found.power.reshape(kernel.shape[0], -1, 1, 1))
        steps = np.abs(scaled).max(axis=(1, 3), keepdims=True) / _STEPS[1]
        noise = step**2 * np.sum(scaled**2) + np.sum(np.broadcast_to(power * steps**2, kernel.shape))
        total += float(noise / max(signal, np.finfo(np.float64).tiny))
    return total


def _statistics(
    model: onnx.ModelProto, names: Iterable[str], feeds: Sequence[Feed], options: EngineOptions
) -> Mapping[str, _Channels]:
    names = list(dict.fromkeys(names))
    ranks: dict[str, int] = {}
    peak: dict[str, FloatArray] = {}
    power: dict[str, FloatArray] = {}
    for tensors in tensors_of(model, names, feeds, options):
        for name in names:
            values = tensors[name]
            ranks[name] = values.ndim
            values = np.atleast_2d(np.asarray(values, np.float64))
            axes = tuple(axis for axis in range(values.ndim) if axis != 1)
            peak[name] = np.maximum(np.abs(values).max(axis=axes), peak.get(name, 0.0))
            power[name] = power.get(name, 0.0) + (values**2).mean(axis=axes) / len(feeds)
    return {name: _Channels(peak[name], power[name], ranks[name]) for name in names}


def _joined(model: onnx.ModelProto) -> list[_Joined]:
    """Groups of tensors that layers make and layers read, and nothing else but homogeneous functions."""
    graph, stored = model.graph, constant_tensors(model)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for name in (name for node in graph.node for name in node.input):
        uses[name] = uses.get(name, 0) + 1
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    fixed = {value.name for value in (*graph.input, *graph.output)}
    makers: list[_Layer] = []
    limits: dict[str, float] = {}
    for node in graph.node:
        fixed |= captured(node)
        layer = _layer(node, weights, uses)
        names = [name for name in (*node.input, *node.output) if name and name not in stored]
        limit = _limit(node, stored)
        if layer is not None:
            makers.append(layer)
        elif node.op_type in _HOMOGENEOUS or limit is not None or _adds(node, stored):
            for name in names[1:]:
                parents[root(name)] = root(names[0])
            if limit is not None:
                limits[names[0]] = limit
        else:
            fixed.update(names)
    groups: dict[str, _Joined] = {}
    for name in list(parents) + [name for layer in makers for name in (layer.source, layer.output)]:
        group = groups.setdefault(root(name), _Joined())
        group.limit = min(group.limit, limits.get(name, np.inf))
        if name not in group.tensors:
            group.tensors.append(name)
    for layer in makers:
        groups[root(layer.output)].makers.append(layer)
        groups[root(layer.source)].readers.append(layer)
    return [
        group for group in groups.values() if group.makers and group.readers and not fixed.intersection(group.tensors)
    ]


def _layer(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], uses: Mapping[str, int]) -> _Layer | None:
    """A convolution or Gemm with weights and bias of its own; grouped ones only with one channel for each group."""
    kernel = kernel_of(node) if traits(node) & Trait.BIASED else None
    if kernel is None or not kernel.changeable or kernel.kind not in ("conv", "matmul") or len(node.input) < 2:
        return None
    weight, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
    if any(name and (name not in stored or uses[name] > 1) for name in (weight, bias)):
        return None
    groups, ins, outs, _ = kernel.shape(stored[weight].dims)
    whole = node.op_type in ("Conv", "Gemm") and (groups == 1 or ins == outs == 1)
    fits = not bias or int(np.prod(stored[bias].dims, dtype=np.int64)) == groups * outs
    if not whole or not fits or kernel.scale != 1.0 or (node.op_type == "Gemm" and _transposes(node)):
        return None
    return _Layer(
        source=node.input[0], output=node.output[0], weight=weight, bias=bias, kernel=kernel, outputs=groups * outs
    )


def _transposes(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "transA" and attribute.i for attribute in node.attribute)


def _limit(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> float | None:
    """The upper limit of a Clip that begins at zero; None for other nodes."""
    if node.op_type != "Clip":
        return None
    bounds = [float(values_of(stored[name]).item()) for name in node.input[1:] if name in stored]
    if not bounds:
        given = {attribute.name: attribute.f for attribute in node.attribute}
        bounds = [given.get("min", -1.0), given.get("max", -1.0)]
    return bounds[1] if len(bounds) == 2 and bounds[0] == 0.0 < bounds[1] else None


def _adds(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node adds or subtracts tensors, none of which is stored."""
    return bool(traits(node) & Trait.SUMS) and not any(name in stored for name in node.input)
