"""Appends to a model the nodes that reduce what flows into its layers to per-channel statistics.

For a tap of C channels the added nodes take at most some positions of every sample, subtract a shift
that is fed with every batch, and give the number of observations, the sum [C] and the second moment
[C, C]. The model's own outputs are dropped: what no tap needs is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcop.layers import Layer
from onnxcop.shapes import Array, ShapeMap
from onnxcop.stats import tap_key

_STEPS_OPSET = 10  # Slice takes steps, and its bounds as inputs
_RECURRENT = {"RNN", "GRU", "LSTM"}
_PREFIX = "onnxcop_tap_"


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor whose channels are watched.

    Attributes:
        key: Name of its statistics, see :func:`onnxcop.stats.tap_key`.
        tensor: Name of the tensor.
        axis: Its channel axis, of `outer * channels * inner` entries.
        outer: Blocks of all channels on that axis.
        channels: Number of channels.
        inner: Neighbouring positions of one channel on that axis.
        shape: Shape of the tensor for a batch of one.
        double: Whether it is of double precision.
        recurrent: Whether a recurrent layer reads it, so that its leading axis is time.
    """

    key: str
    tensor: str
    axis: int
    outer: int
    channels: int
    inner: int
    shape: tuple[int, ...]
    double: bool
    recurrent: bool

    @property
    def position_axes(self) -> dict[int, int]:
        """Axes along which positions of one sample lie, with their sizes."""
        batch = 1 if self.recurrent else 0
        return {a: size for a, size in enumerate(self.shape) if a not in (batch, self.axis) and size > 1}

    @property
    def positions(self) -> int:
        """Observations of every channel in one sample."""
        return self.outer * self.inner * math.prod(self.position_axes.values())


@dataclass(frozen=True, slots=True)
class TapNames:
    """What the added nodes read and give: an input [C], and outputs (), [C] and [C, C]."""

    shift: str
    count: str
    total: str
    second: str


def taps_of(model: onnx.ModelProto, layers: Iterable[Layer], shapes: ShapeMap, widest: int) -> tuple[Tap, ...]:
    """The distinct tensors that layers read, without those of more than `widest` channels."""
    taps: dict[str, Tap] = {}
    for layer in layers:
        info = shapes[layer.tensor]
        key = tap_key(layer)
        if layer.channels > widest or key in taps or info.shape is None:
            continue
        taps[key] = Tap(
            key, layer.tensor, layer.axis % len(info.shape), layer.outer, layer.channels, layer.inner,
            info.shape, info.elem_type == TensorProto.DOUBLE,
            model.graph.node[layer.node].op_type in _RECURRENT,
        )  # fmt: skip
    return tuple(taps.values())


def grid(tap: Tap, positions: int) -> dict[int, int]:
    """How many entries of every position axis are taken so that a sample has at most `positions`.

    The axis with the most entries is thinned first, hence grids come out about square. At least one
    entry of every axis is taken.
    """
    sizes = tap.position_axes
    taken = dict(sizes)
    allowed = max(1, positions // (tap.outer * tap.inner))
    while math.prod(taken.values()) > allowed:
        axis = max(taken, key=lambda a: taken[a])
        step = -(-sizes[axis] // taken[axis]) + 1
        taken[axis] = -(-sizes[axis] // step)
    return {axis: count for axis, count in taken.items() if count < sizes[axis]}


@dataclass(frozen=True, slots=True)
class Instrumented:
    """A model that gives statistics.

    Attributes:
        model: The model; it shares nothing with the original.
        taps: What is watched.
        names: Inputs and outputs of every tap, in the order of `taps`.
    """

    model: onnx.ModelProto
    taps: tuple[Tap, ...]
    names: tuple[TapNames, ...]


def instrument(model: onnx.ModelProto, taps: Sequence[Tap], positions: int | None) -> Instrumented:
    """Append the statistics of `taps` to a copy of a model.

    Args:
        model: The model; it is not changed.
        taps: What to watch.
        positions: Most positions taken of a sample, None for all of them. Models below opset 10
            have no strided Slice; all positions are taken there.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    opset = next((o.version for o in copy.opset_import if o.domain in ("", "ai.onnx")), 1)
    del graph.output[:]
    names = []
    for number, tap in enumerate(taps):
        builder = _Builder(opset, f"{_PREFIX}{number}_")
        names.append(builder.build(tap, positions))
        graph.node.extend(builder.nodes)
        graph.initializer.extend(builder.constants)
        if copy.ir_version < 4:  # every initializer is an input there
            graph.input.extend(
                helper.make_tensor_value_info(c.name, c.data_type, list(c.dims)) for c in builder.constants
            )
        graph.input.extend(builder.inputs)
        graph.output.extend(builder.outputs)
    return Instrumented(copy, tuple(taps), tuple(names))


@dataclass(slots=True)
class _Builder:
    opset: int
    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
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
        kind = TensorProto.DOUBLE if tap.double else TensorProto.FLOAT
        data = tap.tensor
        if positions is not None and self.opset >= _STEPS_OPSET:
            data = self.thin(data, grid(tap, positions))
        last = tap.inner == 1 and tap.axis == len(tap.shape) - 1
        data = self.channels_last(data, tap) if last else self.channels_first(data, tap)
        data = self.node("Cast", data, to=kind)
        shift = f"{self.prefix}shift"
        column = [1, tap.channels] if last else [tap.channels, 1]
        self.inputs.append(helper.make_tensor_value_info(shift, kind, column))
        data = self.node("Sub", data, shift)
        zero = [] if self.opset >= 11 else [self.constant(np.zeros(1, np.float64 if tap.double else np.float32))]
        second = self.node("Gemm", data, data, *zero, **({"transA": 1} if last else {"transB": 1}))
        total = self.sum(data, 0 if last else 1)
        return TapNames(
            shift,
            self.output(self.node("Size", data), TensorProto.INT64, []),
            self.output(total, kind, [tap.channels]),
            self.output(second, kind, [tap.channels, tap.channels]),
        )

    def thin(self, data: str, taken: dict[int, int]) -> str:
        """At most `taken` entries of every axis, evenly spread, whatever its size at run time."""
        if not taken:
            return data
        axes = self.constant(list(taken))
        counts = np.array(list(taken.values()))
        sizes = self.node("Gather", self.node("Shape", data), axes, axis=0)
        steps = self.node("Div", self.node("Add", sizes, self.constant(counts - 1)), self.constant(counts))
        starts = self.node(
            "Div", self.node("Sub", steps, self.constant([1])), self.constant([2])
        )
        ends = self.constant([np.iinfo(np.int64).max] * len(taken))
        return self.node("Slice", data, starts, ends, axes, steps)

    def channels_last(self, data: str, tap: Tap) -> str:
        """[observations, C]."""
        if len(tap.shape) == 2 and tap.outer == 1:
            return data
        return self.node("Reshape", data, self.constant([-1, tap.channels]))

    def channels_first(self, data: str, tap: Tap) -> str:
        """[C, observations]."""
        lead = [0] * tap.axis
        data = self.node("Reshape", data, self.constant([*lead, tap.outer, tap.channels, tap.inner, -1]))
        place = tap.axis + 1
        order = [place, *(a for a in range(tap.axis + 4) if a != place)]
        data = self.node("Transpose", data, perm=order)
        return self.node("Reshape", data, self.constant([tap.channels, -1]))

    def sum(self, data: str, axis: int) -> str:
        if self.opset >= 13:
            return self.node("ReduceSum", data, self.constant([axis]), keepdims=0)
        return self.node("ReduceSum", data, axes=[axis], keepdims=0)
