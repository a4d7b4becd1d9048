"""Layers of an int8 model, fitted one after another to what they computed before quantization.

From the first layer to the last, a layer's weights are fitted on the inputs that the int8 layers before it give. The
target is its output before quantization. Then the weights are rounded together (:mod:`onnxcop.recovery.rounding`), and
the bias makes up for the mean of what is left (Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, in its empirical form). Held-out rows decide whether weights are fitted, only rounded
together, or left.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array, Feed, FloatArray
from onnxcop.graph.edit import copied
from onnxcop.graph.linear import Kernel, kernel_of
from onnxcop.graph.subgraphs import excerpt
from onnxcop.reconstruction.linear_layers import drawn_rows
from onnxcop.reconstruction.normal_equations import FittedLayer, RowSums, solve
from onnxcop.recovery.forward import ForwardRun
from onnxcop.recovery.rounding import rounded, rounded_together
from onnxcop.runtime.session import EngineOptions, Session

log = logging.getLogger("onnxcop")

_HELD_OUT = 4  # every fourth batch is held out
_FEWEST_BATCHES = 8
_ROWS = 4  # rows for every feature that an output sums over
_FEWEST, _MOST = 16, 256  # positions of a sample
_FEEDS = 32  # samples that have enough rows together where each has many positions
_WIDEST = 2304  # features; the weights of wider layers stay as they are
_UNUSUAL = 16.0  # times the median squared error of a position, above which it is left out
_LIMIT = 127  # steps of a weight


@dataclass(frozen=True, slots=True)
class _Int8Layer:
    """A layer of an int8 model with weights in int8.

    Attributes:
        node: The node before quantization.
        kernel: Storage of its weights.
        shape: Shape of its weights.
        data: Tensor that the int8 layer reads.
        weight: Name of the stored weights.
        steps: float64 [groups, 1, outputs], the value of one step of a weight.
        bias: Name of the stored bias in int32; None if there is none.
        bias_steps: float64, the value of one step of the bias, for all channels or for each.
    """

    node: onnx.NodeProto
    kernel: Kernel
    shape: tuple[int, ...]
    data: str
    weight: str
    steps: FloatArray
    bias: str | None
    bias_steps: FloatArray

    def rows(self, data: Array, targets: Array, place: int) -> tuple[FloatArray, FloatArray]:
        """Inputs and outputs at some positions of a feed, which depend on its place and the targets' shape alone."""
        features = int(np.prod(self.shape, dtype=np.int64)) // (self.steps.shape[0] * self.steps.shape[2])
        count = min(max(_ROWS * features // _FEEDS, _FEWEST), _MOST)
        return drawn_rows(self.node, self.kernel, self.shape, data, targets, count, np.random.default_rng(place))


def with_fitted_layers(
    plain: onnx.ModelProto, int8: onnx.ModelProto, feeds: Sequence[Feed], options: EngineOptions
) -> onnx.ModelProto:
    """Return an int8 model with fitted weights and biases.

    Args:
        plain: The model that was quantized, in single precision, with the same names of nodes.
        int8: The model with QuantizeLinear and DequantizeLinear; it is not changed.
        feeds: Calibration samples, at least two batches.
        options: How to run both.

    Returns:
        A copy; the same model if no layer has weights in int8.
    """
    layers = _layers(plain, int8)
    if not layers or len(feeds) < 2:
        return int8
    result = copied(int8)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    floats = {tensor.name: tensor for tensor in plain.graph.initializer}
    targets = _targets(plain, layers, feeds, options)
    run, places = ForwardRun(result, feeds, options), {node.name: place for place, node in enumerate(result.graph.node)}
    for number, layer in enumerate(layers):
        weights = _weights(layer, numpy_helper.to_array(floats[layer.node.input[1]]))
        bias = np.zeros((len(weights), weights.shape[2]))
        if layer.bias is not None:
            bias = numpy_helper.to_array(floats[layer.node.input[2]]).astype(np.float64).reshape(bias.shape)
        fit, hold = (RowSums.empty(*weights.shape) for _ in range(2))
        used = _enough([len(outputs) for _, outputs in targets[number]], weights.shape[1])
        for place, data in enumerate(run.before(places[layer.node.name], layer.data, used)):
            shape, outputs = targets[number][place]
            inputs, _ = layer.rows(data, np.broadcast_to(np.float32(0), shape), place)
            left = outputs - np.matmul(inputs.swapaxes(0, 1), weights).swapaxes(0, 1) - bias
            size = np.sum(left**2, axis=(1, 2))
            usual = size <= _UNUSUAL * np.median(size)  # no weights mend what was cut off at the end of a range
            last = place % _HELD_OUT == _HELD_OUT - 1 or place == used - 1
            (hold if last else fit).add(inputs[usual], left[usual], single=True)
        found, shift = _fitted(layer, weights, fit, hold)
        _write(layer, stored, found, bias + shift)
    return result


def _enough(rows: Sequence[int], features: int) -> int:
    """The number of batches that have enough rows for a layer, given the rows of each."""
    reached = np.cumsum(rows) >= _ROWS * features
    first = int(np.argmax(reached)) + 1 if reached.any() else len(rows)
    return min(max(first, _FEWEST_BATCHES), len(rows))


def _fitted(layer: _Int8Layer, weights: FloatArray, fit: RowSums, hold: RowSums) -> tuple[FloatArray, FloatArray]:
    """The best rounding of a layer's weights, in steps, and the shift of its bias."""
    every = np.ones((len(weights), weights.shape[2]), np.bool_)
    bias = None if layer.bias is None else np.zeros(every.shape)

    def judged(found: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        change, shift = found * layer.steps - weights, np.zeros(every.shape)
        if bias is not None:
            shift = (fit.missing - np.einsum("gf,gfo->go", fit.inputs, change)) / fit.count
        return hold.error(change, shift, every), found, shift

    candidates = [judged(rounded(weights, layer.steps, _LIMIT))]
    if weights.shape[1] <= _WIDEST:
        moments = fit.gram / fit.count if bias is None else fit.centred()[0]
        solved = solve(FittedLayer(weights, bias, np.ones(weights.shape[:2]), every), fit, hold)
        for target in (weights, *(() if solved is None else (weights + solved.change,))):
            with contextlib.suppress(np.linalg.LinAlgError):
                candidates.append(judged(rounded_together(target, layer.steps, _LIMIT, moments)))
    error, found, shift = min(candidates, key=lambda entry: entry[0])
    log.debug("int8: %s: error %.3g, nearest %.3g", layer.node.name, error, candidates[0][0])
    return found, shift


def _write(layer: _Int8Layer, stored: Mapping[str, onnx.TensorProto], found: FloatArray, bias: FloatArray) -> None:
    """Store weights, in steps, and a bias, in its unit."""
    groups, _, outputs = found.shape
    taps = layer.kernel.shape(layer.shape)[3]
    steps = layer.kernel.write(found.reshape(groups, -1, taps, outputs).swapaxes(2, 3), layer.shape)
    stored[layer.weight].CopyFrom(numpy_helper.from_array(steps.astype(np.int8), layer.weight))
    if layer.bias is not None:
        limits, dims = np.iinfo(np.int32), tuple(stored[layer.bias].dims)
        numbers = np.clip(np.rint(bias.reshape(-1) / layer.bias_steps), limits.min, limits.max).astype(np.int32)
        stored[layer.bias].CopyFrom(numpy_helper.from_array(numbers.reshape(dims), layer.bias))


def _weights(layer: _Int8Layer, stored: Array) -> FloatArray:
    """Weights [groups, features, outputs]; features are channels × taps."""
    weights = layer.kernel.read(stored).swapaxes(2, 3)
    return np.ascontiguousarray(weights.reshape(len(weights), -1, weights.shape[-1]))


def _layers(plain: onnx.ModelProto, int8: onnx.ModelProto) -> list[_Int8Layer]:
    """Layers whose weights and biases only they read, in graph order."""
    twins = {node.name: node for node in plain.graph.node if node.name}
    makers = {name: node for node in int8.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in int8.graph.initializer}
    floats = {tensor.name for tensor in plain.graph.initializer}
    uses = Counter(name for node in int8.graph.node for name in node.input)
    layers = []
    for node in int8.graph.node:
        twin, kernel = twins.get(node.name), kernel_of(node)
        if twin is None or twin.op_type != node.op_type or kernel is None or not kernel.changeable:
            continue
        if (
            kernel.scale != 1.0
            or kernel.bias_scale != 1.0
            or kernel.input != 1
            or not floats.issuperset(twin.input[1:])
        ):
            continue
        weight = _numbers(node.input[1], makers, stored, uses)
        biased = len(node.input) > 2 and bool(node.input[2])
        bias = _numbers(node.input[2], makers, stored, uses) if biased else None
        if weight is None or stored[weight[0]].data_type != onnx.TensorProto.INT8 or (biased and bias is None):
            continue
        shape = tuple(stored[weight[0]].dims)
        groups, _, outs, _ = kernel.shape(shape)
        steps = np.broadcast_to(weight[1].reshape(-1), groups * outs).reshape(groups, 1, outs)
        layers.append(
            _Int8Layer(
                node=twin,
                kernel=kernel,
                shape=shape,
                data=node.input[0],
                weight=weight[0],
                steps=steps,
                bias=None if bias is None else bias[0],
                bias_steps=np.ones(1) if bias is None else bias[1],
            )
        )
    return layers


def _numbers(
    name: str, makers: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto], uses: Mapping[str, int]
) -> tuple[str, FloatArray] | None:
    """Name and step of the whole numbers that a tensor is made of, if their zero is 0 and nothing else reads them."""
    maker = makers.get(name)
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in stored or uses[name] > 1:
        return None
    scale, zero = stored.get(maker.input[1]), stored.get(maker.input[2]) if len(maker.input) > 2 else None
    if scale is None or uses[maker.input[0]] > 1 or (zero is not None and np.any(numpy_helper.to_array(zero))):
        return None
    steps = np.maximum(numpy_helper.to_array(scale).astype(np.float64), np.finfo(np.float32).tiny)
    return maker.input[0], steps


def _targets(
    plain: onnx.ModelProto, layers: Sequence[_Int8Layer], feeds: Sequence[Feed], options: EngineOptions
) -> list[list[tuple[tuple[int, ...], FloatArray]]]:
    """By layer and feed, the shape of the output before quantization, and its rows."""
    found: list[list[tuple[tuple[int, ...], FloatArray]]] = [[] for _ in layers]
    names = [name for layer in layers for name in (layer.node.input[0], layer.node.output[0])]
    for place, tensors in enumerate(tensors_of(plain, names, feeds, options)):
        for layer, rows in zip(layers, found, strict=True):
            output = tensors[layer.node.output[0]]
            rows.append((output.shape, layer.rows(tensors[layer.node.input[0]], output, place)[1]))
    return found


def tensors_of(
    model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[Feed], options: EngineOptions
) -> Iterator[Mapping[str, Array]]:
    """Some tensors of a model, feed by feed; inputs of the model may be among them."""
    inputs = {value.name for value in model.graph.input}
    made = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in inputs]
    if not made:
        yield from feeds
        return
    with Session(excerpt(model, made), options) as session:
        for feed in feeds:
            outputs = session.run({spec.name: feed[spec.name] for spec in session.inputs})
            yield {**feed, **{name: np.asarray(values) for name, values in outputs.items()}}
