"""Ranges of quantized tensors: where the error behind the functions that follow is least.

A range from the smallest to the largest value spends most steps on values that hardly occur, or make no difference.
Behind x · sigmoid(x), all values below -8 are nearly 0, so no step is worth spending on them, and none above 6 behind a
Clip to 6. So the error is that of the function of a tensor, if only functions of single elements read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcop._base.types import Feed, FloatArray
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.io import values_of
from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import MOVES, Trait, traits
from onnxcop.recovery.int8 import tensors_of
from onnxcop.runtime.session import EngineOptions, Session

Range = tuple[float, float]

_BINS = 4096
_SAMPLED = 20_000  # elements of a tensor, from each sample
_STEPS = 255.0
_PARTS = (0.0, 0.02, 0.04, *(part / 20 for part in range(1, 21)))  # of the extremes on either side
_OF_ELEMENTS = frozenset(
    "Abs Add Celu Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mish Mul Neg QuickGelu Relu Selu Sigmoid "
    "Softplus Softsign Sub Swish Tanh ThresholdedRelu".split()
)


def least_error_ranges(
    model: onnx.ModelProto,
    names: Iterable[str],
    feeds: Sequence[Feed],
    options: EngineOptions,
    powers: Sequence[float] = (2.0,),
) -> list[dict[str, Range]]:
    """Ranges of some tensors in which the error is least; each contains 0.

    Args:
        model: The model before quantization.
        names: Tensors of it, inputs included.
        feeds: Calibration samples.
        options: How to run it.
        powers: Of the error. A higher power cuts off fewer rare large values, which detections are made of.

    Returns:
        For every power, by name; tensors that are always 0, or not finite, have none.
    """
    names = list(dict.fromkeys(names))
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for found in tensors_of(model, names, feeds, options):
        for name in names:
            low[name] = min(low[name], float(found[name].min(initial=0)))
            high[name] = max(high[name], float(found[name].max(initial=0)))
    varying = [name for name in names if np.isfinite(high[name] - low[name]) and high[name] > low[name]]
    counts = {name: np.zeros(_BINS) for name in varying}
    for found in tensors_of(model, varying, feeds, options):
        for name in varying:
            elements = found[name].reshape(-1)
            step = max(elements.size // (_SAMPLED * max(len(found[name]), 1)), 1) | 1  # odd: no fixed column of a map
            places = (elements[::step].astype(np.float64) - low[name]) * (_BINS / (high[name] - low[name]))
            counts[name] += np.bincount(np.clip(places.astype(np.int64), 0, _BINS - 1), minlength=_BINS)
    functions = Functions(model, options)
    best: list[dict[str, Range]] = [{} for _ in powers]
    for name in varying:
        values: FloatArray = low[name] + (np.arange(_BINS, dtype=np.float64) + 0.5) * ((high[name] - low[name]) / _BINS)
        function = functions.following(name, values)
        for power, found_ranges in zip(powers, best, strict=True):
            found_ranges[name] = _least_error((low[name], high[name]), values, counts[name], function, power)
    return best


def _least_error(
    extremes: Range, values: FloatArray, counts: FloatArray, function: Sequence[FloatArray], power: float
) -> Range:
    """The range for values that occur so often, by the errors of functions of them, each relative to its values."""
    sizes = [max(float(np.sum(counts * np.abs(wanted) ** power)), np.finfo(np.float64).tiny) for wanted in function]
    (low, high), best, chosen = extremes, np.inf, extremes
    for start in sorted({part * low for part in _PARTS}):
        for stop in sorted({part * high for part in _PARTS}):
            if stop <= start:
                continue
            step = (stop - start) / _STEPS
            zero = np.clip(np.rint(-start / step), 0, _STEPS)
            places = np.clip(np.rint(values / step) + zero, 0, _STEPS).astype(np.int64)
            levels = (np.arange(_STEPS + 1) - zero) * step
            error = 0.0
            for wanted, size in zip(function, sizes, strict=True):
                missed = np.abs(np.interp(levels, values, wanted)[places] - wanted) ** power
                error += float(np.sum(counts * missed)) / size
            if error < best:
                best, chosen = error, (start, stop)
    return chosen


class Functions:
    """Functions of single elements that follow tensors."""

    def __init__(self, model: onnx.ModelProto, options: EngineOptions) -> None:
        self._model, self._options = model, options
        self._stored = constant_tensors(model)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._inputs = {value.name for value in model.graph.input}
        self._held = {value.name for value in model.graph.output}
        for node in model.graph.node:
            self._held |= captured(node)
            for name in set(node.input):
                self._readers.setdefault(name, []).append(node)

    def following(self, name: str, values: FloatArray) -> list[FloatArray]:
        """What is made of some values of a tensor; the values themselves if they are read as they are.

        Operators that only move elements count as identities.
        """
        inside, moved, nodes = {name}, set[str](), list[onnx.NodeProto]()
        for node in self._model.graph.node:
            given = [entry for entry in node.input if entry]
            met, known = inside.intersection(given), traits(node)
            if not met:
                continue
            if known & MOVES and (known & Trait.JOINS or node.input[0] in inside):
                nodes += [helper.make_node("Identity", [min(met)], [entry]) for entry in node.output]
                moved.update(node.output)
            elif node.op_type in _OF_ELEMENTS and all(entry in inside or self._single(entry) for entry in given):
                if len(met) > 1 and not moved.isdisjoint(met):
                    continue  # elements that were in different places
                nodes.append(node)
                moved.update(node.output if met & moved else ())
            else:
                continue
            inside.update(node.output)
        ends = [
            entry
            for entry in inside
            if entry in self._held or any(inside.isdisjoint(node.output) for node in self._readers.get(entry, ()))
        ]
        if name in ends or not ends or name in self._inputs:
            return [values]
        with Session(self._part(nodes, name, len(values), ends), self._options) as session:
            made = session.run({name: values.astype(np.float32)})
        return [np.asarray(found, np.float64).reshape(-1) for found in made.values()]

    def _part(self, nodes: Sequence[onnx.NodeProto], name: str, size: int, ends: Sequence[str]) -> onnx.ModelProto:
        """The model of some nodes, from a tensor of a number of values to others."""
        part = onnx.ModelProto(ir_version=self._model.ir_version)
        part.opset_import.extend(self._model.opset_import)
        needed = {entry for node in nodes for entry in node.input}
        for entry in sorted(needed & self._stored.keys()):
            part.graph.initializer.append(numpy_helper.from_array(values_of(self._stored[entry]), entry))
        part.graph.name = "part"
        part.graph.node.extend(nodes)
        part.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [size]))
        part.graph.output.extend(onnx.ValueInfoProto(name=entry) for entry in ends)
        return part

    def _single(self, name: str) -> bool:
        return name in self._stored and int(np.prod(self._stored[name].dims, dtype=np.int64)) == 1


def quantized_tensors(plain: onnx.ModelProto, int8: onnx.ModelProto) -> list[str]:
    """Tensors of a model that are quantized in another made of it, without weights."""
    there: set[str] = {value.name for value in plain.graph.input} - {tensor.name for tensor in plain.graph.initializer}
    there |= {name for node in plain.graph.node for name in node.output}
    names = []
    for node in int8.graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.input[0] if node.input[0] in there else node.input[0].removesuffix("_QuantizeLinear_Input")
            names += [name] if name in there else []
    return names


def around_layers(model: onnx.ModelProto) -> list[str]:
    """Tensors that linear layers read or make, without weights."""
    stored = constant_tensors(model)
    layers = [node for node in model.graph.node if traits(node) & Trait.LINEAR]
    return [name for node in layers for name in (*node.input[:2], *node.output) if name and name not in stored]
