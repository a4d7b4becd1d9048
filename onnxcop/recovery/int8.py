"""Biases of an int8 model, fitted so that its layers have the means of the model before quantization.

Rounding shifts the mean of a layer's output, and later layers add to the shift. From the first layer to the last, the
difference of the means over calibration samples is subtracted from the bias (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", ICCV 2019, in its empirical form).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Feed, FloatArray
from onnxcop.graph.edit import copied
from onnxcop.graph.subgraphs import excerpt
from onnxcop.graph.traits import Trait, traits
from onnxcop.runtime.session import EngineOptions, Session


@dataclass(frozen=True, slots=True)
class _Biased:
    """A layer of an int8 model with a bias stored in int32.

    Attributes:
        output: Name of its output.
        twin: Name of its output in the model before quantization.
        bias: Name of the stored bias.
        scale: float64, the value of one step of the bias, for all channels or for each.
    """

    output: str
    twin: str
    bias: str
    scale: FloatArray


def with_fitted_biases(
    plain: onnx.ModelProto, int8: onnx.ModelProto, feeds: Sequence[Feed], options: EngineOptions
) -> onnx.ModelProto:
    """Return an int8 model with fitted biases.

    Args:
        plain: The model that was quantized, in single precision, with the same names of nodes.
        int8: The model with QuantizeLinear and DequantizeLinear; it is not changed.
        feeds: Calibration samples.
        options: How to run both.

    Returns:
        A copy; the same model if no layer has a bias in int32.
    """
    layers = _layers(plain, int8)
    if not layers:
        return int8
    targets = _means(plain, [layer.twin for layer in layers], feeds, options)
    result = copied(int8)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    for layer in layers:  # one at a time: the residual of a layer depends on the layers before it
        means = _means(result, [layer.output], feeds, options)
        change = np.rint((targets[layer.twin] - means[layer.output]) / layer.scale)
        old = numpy_helper.to_array(stored[layer.bias])
        limits = np.iinfo(np.int32)
        new = np.clip(old + change.reshape(old.shape), limits.min, limits.max).astype(np.int32)
        stored[layer.bias].CopyFrom(numpy_helper.from_array(new, layer.bias))
    return result


def _layers(plain: onnx.ModelProto, int8: onnx.ModelProto) -> list[_Biased]:
    """Layers with a bias in int32 that only one layer reads, in graph order."""
    twins = {node.name: node for node in plain.graph.node if node.name}
    makers = {name: node for node in int8.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in int8.graph.initializer}
    layers = []
    for node in int8.graph.node:
        twin, maker = twins.get(node.name), makers.get(node.input[2]) if len(node.input) > 2 else None
        if twin is None or maker is None or not traits(node) & Trait.BIASED or twin.op_type != node.op_type:
            continue
        bias, scale = (stored.get(name) for name in maker.input[:2]) if len(maker.input) > 1 else (None, None)
        if bias is None or scale is None or bias.data_type != onnx.TensorProto.INT32:
            continue
        steps = numpy_helper.to_array(scale).astype(np.float64)
        layers.append(_Biased(node.output[0], twin.output[0], bias.name, np.maximum(steps, np.finfo(np.float32).tiny)))
    biases = [layer.bias for layer in layers]
    return [layer for layer in layers if biases.count(layer.bias) == 1]


def _means(
    model: onnx.ModelProto, names: Iterable[str], feeds: Sequence[Feed], options: EngineOptions
) -> Mapping[str, FloatArray]:
    """Mean of every channel of some tensors, float64 [channels]."""
    names = list(names)
    watched = excerpt(model, [onnx.ValueInfoProto(name=name) for name in names])
    total: dict[str, FloatArray] = {}
    count = 0
    with Session(watched, options) as session:
        for feed in feeds:
            outputs = session.run({spec.name: feed[spec.name] for spec in session.inputs})
            for name in names:
                values = np.asarray(outputs[name], np.float64)
                mean = values.mean(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
                total[name] = total.get(name, 0.0) + mean
            count += 1
    return {name: total[name] / max(count, 1) for name in names}
