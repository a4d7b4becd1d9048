"""Cases for Reshape and Flatten, sizes, generated tensors, sampling and recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.draws import Shape, opsets, shapes, some_axes, total
from ops.sample import ANY, DEAF, Array, Sample, floats, ints

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]


@st.composite
def _partition(draw: Draw, factors: list[int]) -> Shape:
    """Neighbouring factors multiplied together, with axes of size 1 strewn in."""
    result: list[int] = []
    for factor in factors:
        if result and draw(st.booleans()):
            result[-1] *= factor
        else:
            if len(result) < 4 and draw(st.integers(0, 5)) == 0:
                result.append(1)
            result.append(factor)
    return tuple(result)


def _finest(shape: Shape, axis: int, result: Shape) -> int:
    """The most classes that one live axis can keep in a Reshape, counted by brute force."""
    view = [1] * len(shape)
    view[axis] = -1
    numbers = np.broadcast_to(np.arange(shape[axis]).reshape(view), shape).reshape(result)
    best = 0
    for target in range(len(result)):
        leader = list(range(shape[axis]))
        for line in np.moveaxis(numbers, target, 0).reshape(result[target], -1).tolist():
            met = {leader[number] for number in line}
            leader = [min(met) if one in met else one for one in leader]
        count = len(set(leader))
        best = max(best, count if count > 1 else 0)
    return best


@st.composite
def _reshape(draw: Draw) -> Sample:
    factors = draw(st.lists(st.integers(2, 3), min_size=1, max_size=5))
    shape, result = draw(_partition(factors)), draw(_partition(factors))
    live, opset = draw(some_axes(shape)), draw(opsets("Reshape"))
    target = list(result)
    attributes: dict[str, Any] = {}
    if opset >= 14 and draw(st.integers(0, 3)) == 0:
        attributes["allowzero"] = 1
    else:
        for axis, size in enumerate(result):
            if axis < len(shape) and size == shape[axis] and draw(st.booleans()):
                target[axis] = 0
    if draw(st.booleans()):
        target[draw(st.integers(0, len(target) - 1))] = -1
    copied = max((axis + 1 for axis, size in enumerate(target) if size == 0), default=0)
    plain = len(live) == 1 and shape[:copied] == result[:copied]
    units = _finest(shape, live[0], result) if plain else ANY
    return Sample("Reshape", (floats(shape), ints(*target)), {0: live}, attributes, opset, units=units, moves=True)


@st.composite
def _flatten(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (1, 4)).filter(lambda s: max(s) > 1))
    rank, opset = len(shape), draw(opsets("Flatten"))
    axis = draw(st.integers(0, rank))
    result = (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
    live = (draw(st.sampled_from([a for a, size in enumerate(shape) if size > 1])),)
    signed = axis - rank if opset >= 11 and axis < rank and draw(st.booleans()) else axis
    return Sample(
        "Flatten", (floats(shape),), {0: live}, {"axis": signed}, opset,
        units=_finest(shape, live[0], result), moves=True,
    )  # fmt: skip


@st.composite
def _shape_of(draw: Draw, op: str) -> Sample:
    """The numbers of the sizes are used as data here, so they must stay what they were."""
    shape = draw(shapes(1, 4))
    live, opset = draw(some_axes(shape)), draw(opsets(op))
    attributes: dict[str, int] = {}
    if op == "Shape" and opset >= 15 and draw(st.booleans()):
        attributes = {"start": draw(st.integers(-len(shape), 0)), "end": len(shape)}
    return Sample(op, (floats(shape),), {0: live}, attributes, opset, units=total(shape, live), notes=(DEAF,))


@st.composite
def _like(draw: Draw, op: str) -> Sample:
    """The result takes its shape from a tensor, whose axes must then stay."""
    shape = draw(shapes(2, 2) if op == "EyeLike" else shapes(1, 3))
    attributes = {} if op == "EyeLike" else {"seed": 3.0}
    return Sample(op, (floats(shape),), {0: draw(some_axes(shape))}, attributes, draw(opsets(op)), units=0)


@st.composite
def _from_nothing(draw: Draw, op: str) -> Sample:
    attributes = {"shape": list(draw(shapes(1, 3))), "seed": 3.0}
    return Sample(op, (), {}, attributes, draw(opsets(op)), units=0)


@st.composite
def _constant_of_shape(draw: Draw) -> Sample:
    """Axes of plain sizes are free to go, save those of a tensor so small that it may hold sizes."""
    shape = draw(shapes(1, 3, (2, 7)))
    units = total(shape, range(len(shape))) if np.prod(shape) > 64 else ANY
    return Sample(
        "ConstantOfShape", (ints(*shape),), {}, {}, draw(opsets("ConstantOfShape")), units=units, notes=(DEAF,)
    )


@st.composite
def _range(draw: Draw) -> Sample:
    inputs = (
        np.array(0.0, np.float32),
        np.array(float(draw(st.integers(2, 9))), np.float32),
        np.array(1.0, np.float32),
    )
    return Sample("Range", inputs, {}, {}, draw(opsets("Range")), units=0)


@st.composite
def _grid_sample(draw: Draw) -> Sample:
    channels = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 2)), channels, draw(st.integers(2, 4)), 3)
    grid = np.tanh(floats((shape[0], 2, 3, 2), 1)).astype(np.float32)
    live = draw(st.sampled_from([(1,), (1, 2)]))
    attributes = {"padding_mode": draw(st.sampled_from(["zeros", "border"]))}
    return Sample(
        "GridSample", (floats(shape), grid), {0: live}, attributes, draw(opsets("GridSample")), units=channels
    )


@st.composite
def _roi_align(draw: Draw) -> Sample:
    channels = draw(st.integers(2, 5))
    shape = (2, channels, 6, 6)
    rois = np.array([[0, 0, 4, 4], [1, 1, 5, 5], [0, 2, 3, 5]], np.float32)
    attributes = {"output_height": 2, "output_width": draw(st.integers(1, 3)), "sampling_ratio": 2}
    inputs = (floats(shape), rois, ints(0, 1, 1))
    return Sample("RoiAlign", inputs, {0: (1,)}, attributes, draw(opsets("RoiAlign")), units=channels)


@st.composite
def _max_roi_pool(draw: Draw) -> Sample:
    channels = draw(st.integers(2, 5))
    rois = np.array([[0, 0, 0, 4, 4], [1, 1, 1, 5, 5]], np.float32)
    inputs = (floats((2, channels, 6, 6)), rois)
    return Sample("MaxRoiPool", inputs, {0: (1,)}, {"pooled_shape": [2, 2]}, draw(opsets("MaxRoiPool")), units=channels)


@st.composite
def _recurrent(draw: Draw, op: str) -> Sample:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    steps, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    width, hidden = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    both = 2 if direction == "bidirectional" else 1
    opset = draw(opsets(op))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
    inputs: list[Array | None] = [
        floats((steps, batch, width)),
        floats((both, gates * hidden, width), 1),
        floats((both, gates * hidden, hidden), 2),
    ]
    if draw(st.booleans()):
        inputs.append(floats((both, 2 * gates * hidden), 3))
        if draw(st.booleans()):
            lengths = np.array([draw(st.integers(1, steps)) for _ in range(batch)], np.int32)
            inputs += [draw(st.sampled_from([None, lengths])), floats((both, batch, hidden), 4)]
            if op == "LSTM":
                inputs += [floats((both, batch, hidden), 5)]
                inputs += [floats((both, 3 * hidden), 6)] if draw(st.booleans()) else []
    if draw(st.integers(0, 4)) == 0:
        attributes["clip"] = 1.5
    if draw(st.integers(0, 4)) == 0:
        attributes["activations"] = {"LSTM": ["Sigmoid", "Relu", "Tanh"], "GRU": ["Sigmoid", "Relu"], "RNN": ["Relu"]}[
            op
        ] * both
    live = draw(st.sampled_from([(2,), (0, 2)]) if steps > 1 else st.just((2,)))
    return Sample(op, tuple(inputs), {0: live}, attributes, opset, 3 if op == "LSTM" else 2, units=width + hidden)


CASES: Cases = (
    {("", op): _like(op) for op in ("EyeLike", "RandomNormalLike", "RandomUniformLike")}
    | {("", op): _from_nothing(op) for op in ("RandomNormal", "RandomUniform")}
    | {("", op): _shape_of(op) for op in ("Shape", "Size")}
    | {("", op): _recurrent(op) for op in ("GRU", "LSTM", "RNN")}
    | {
        ("", "ConstantOfShape"): _constant_of_shape(),
        ("", "Flatten"): _flatten(),
        ("", "GridSample"): _grid_sample(),
        ("", "MaxRoiPool"): _max_roi_pool(),
        ("", "Range"): _range(),
        ("", "Reshape"): _reshape(),
        ("", "RoiAlign"): _roi_align(),
    }
)
