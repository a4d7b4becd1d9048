"""Nodes that reduce the inputs of a model's layers to per-channel statistics.

For a tap of C channels the added nodes select positions of every sample, subtract a shift that is fed with every batch,
and return the number of observations, the sum [C] and the second moment [C, C]. The model's own outputs are dropped, so
only nodes that a tap needs are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcop._base.types import Array
from onnxcop.calibration.taps import Tap, stride
from onnxcop.graph.edit import copied, opset_of, replace_all
from onnxcop.graph.subgraphs import initializers_are_inputs, nodes_for

_STEPS_OPSET = 10  # Slice takes steps, and its bounds as inputs
_PREFIX = "onnxcop_tap_"


@dataclass(frozen=True, slots=True)
class TapNames:
    """Tensors of a tap's added nodes: an input [C], and outputs (), [C] and [C, C]."""

    shift: str
    count: str
    total: str
    second: str


@dataclass(frozen=True, slots=True)
class Instrumented:
    """A model that returns statistics.

    Attributes:
        model: The model; it shares nothing with the original.
        taps: The observed tensors.
        names: Inputs and outputs of every tap, in the order of `taps`.
    """

    model: onnx.ModelProto
    taps: tuple[Tap, ...]
    names: tuple[TapNames, ...]


def instrument(model: onnx.ModelProto, taps: Sequence[Tap], positions: int | None) -> Instrumented:
    """Append the statistics of `taps` to a copy of a model.

    Args:
        model: The model; it is not changed.
        taps: The tensors to observe.
        positions: Largest number of positions of a sample, on a grid that follows from the shapes of the taps.
            Models below opset 10 have no Slice with steps; all positions are taken there. None for
            all of them, summed in double precision: sums of many thousand products in single
            precision are good to 1e-5 at best.
    """
    copy = copied(model)
    graph = copy.graph
    opset = opset_of(copy)
    del graph.output[:]
    _remove_unread(graph, {tap.tensor for tap in taps})
    names: list[TapNames] = []
    # ONNX Runtime starts from the last node without readers and runs its inputs. Taps in graph order
    # would run after everything else, while every feature map is still in memory.
    for number, tap in reversed(list(enumerate(taps))):
        builder = _Builder(opset, f"{_PREFIX}{number}_")
        names.insert(0, builder.build(tap, positions))
        graph.node.extend(builder.nodes)
        graph.initializer.extend(builder.constants)
        if initializers_are_inputs(copy):
            graph.input.extend(
                helper.make_tensor_value_info(c.name, c.data_type, list(c.dims)) for c in builder.constants
            )
        graph.input.extend(builder.inputs)
        graph.output.extend(builder.outputs)
    return Instrumented(copy, tuple(taps), tuple(names))


def _remove_unread(graph: onnx.GraphProto, required: set[str]) -> None:
    """Remove the nodes that none of the tensors `required` depends on."""
    kept, _ = nodes_for(graph.node, required)
    if len(kept) < len(graph.node):
        replace_all(graph.node, kept)


@dataclass(slots=True)
class _Builder:
    opset: int
    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.prefix}{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, values: Sequence[int] | Array) -> str:
        name = f"{self.prefix}c{len(self.constants)}"
        array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def build(self, tap: Tap, positions: int | None) -> TapNames:
        double = positions is None or tap.kind == TensorProto.DOUBLE
        kind = TensorProto.DOUBLE if double else TensorProto.FLOAT
        data = tap.tensor
        if positions is not None and self.opset >= _STEPS_OPSET:
            data = self.thin(data, tap, stride(tap, positions))
        last = tap.inner == 1 and tap.axis == len(tap.shape) - 1
        data = self.channels_last(data, tap) if last else self.channels_first(data, tap)
        if tap.kind != kind:
            data = self.node("Cast", data, to=kind)
        shift = f"{self.prefix}shift"
        column = [1, tap.channels] if last else [tap.channels, 1]
        self.inputs.append(helper.make_tensor_value_info(shift, kind, column))
        data = self.node("Sub", data, shift)
        zero = [] if self.opset >= 11 else [self.constant(np.zeros(1, np.float64 if double else np.float32))]
        second = self.node("Gemm", data, data, *zero, **({"transA": 1} if last else {"transB": 1}))
        total = self.sum(data, 0 if last else 1)
        return TapNames(
            shift,
            self.output(self.node("Size", data), TensorProto.INT64, []),
            self.output(total, kind, [tap.channels]),
            self.output(second, kind, [tap.channels, tap.channels]),
        )

    def thin(self, data: str, tap: Tap, stride: int) -> str:
        """Take every `stride`-th entry of the position axes, starting from half a stride.

        Half of the stride is taken from the first entry on, which no map is too small for, then every other entry from
        the second on, if there is one.
        """
        if stride == 1:
            return data
        remaining = list(tap.position_axes)
        axes, zeros = self.constant(remaining), self.constant([0] * len(remaining))
        ends = self.constant([np.iinfo(np.int64).max] * len(remaining))
        half = stride // 2
        if half > 1 and self.is_blocked(tap):
            data = self.node("MaxPool", data, kernel_shape=[1, 1], strides=[half, half])
        elif half > 1:
            steps = self.constant([half] * len(remaining))
            data = self.node("Slice", data, zeros, ends, axes, steps)
        sizes = self.node("Gather", self.node("Shape", data), axes, axis=0)
        starts = self.node("Sign", self.node("Sub", sizes, self.constant([1])))
        return self.node("Slice", data, starts, ends, axes, self.constant([2] * len(remaining)))

    def is_blocked(self, tap: Tap) -> bool:
        """Whether ONNX Runtime may store this map in blocks of channels, as it does on the CPU.

        A pooling of single entries reads that layout and returns a map that is quickly reordered. For any other
        operator the whole map is reordered first.
        """
        spatial = set(tap.position_axes) <= {2, 3}
        return tap.kind == TensorProto.FLOAT and len(tap.shape) == 4 and tap.axis == 1 and spatial

    def channels_last(self, data: str, tap: Tap) -> str:
        """[observations, C]."""
        if len(tap.shape) == 2 and tap.outer == 1:
            return data
        return self.node("Reshape", data, self.constant([-1, tap.channels]))

    def channels_first(self, data: str, tap: Tap) -> str:
        """[C, observations]."""
        rank, place = len(tap.shape), tap.axis
        if tap.outer * tap.inner > 1:
            shape = [*([0] * place), tap.outer, tap.channels, tap.inner, -1]
            data = self.node("Reshape", data, self.constant(shape))
            rank, place = place + 4, place + 1
        if place:
            order = [place, *(axis for axis in range(rank) if axis != place)]
            data = self.node("Transpose", data, perm=order)
        return self.node("Flatten", data, axis=1)

    def sum(self, data: str, axis: int) -> str:
        if self.opset >= 13:
            return self.node("ReduceSum", data, self.constant([axis]), keepdims=0)
        return self.node("ReduceSum", data, axes=[axis], keepdims=0)
