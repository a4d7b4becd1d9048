"""Cases for operators that act on every element alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.draws import Shape, opsets, shapes, some_axes, total
from ops.sample import Array, Sample, floats, positive

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]

_UNARY = {
    name: ""
    for name in """Abs Asinh Atan BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Mish Neg Not Relu Round Selu Shrink Sigmoid Sign Sin Sinh
    Softplus Softsign Swish Tan Tanh ThresholdedRelu""".split()
} | {"Acos": "Tanh", "Asin": "Tanh", "Atanh": "Sin", "Acosh": "Cosh", "Log": "Exp", "Reciprocal": "Exp", "Sqrt": "Exp"}
_DTYPES = {"Not": np.bool_, "BitwiseNot": np.int32}
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Cast": {"to": 11},
    "Celu": {"alpha": 0.7},
    "LeakyRelu": {"alpha": 0.3},
    "Shrink": {"lambd": 0.2, "bias": 0.1},
    "ThresholdedRelu": {"alpha": 0.2},
}
_LOGICAL = ["And", "Or", "Xor"]
_BITS = ["BitwiseAnd", "BitwiseOr", "BitwiseXor"]
_COMPARE = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
_ARITHMETIC = ["Add", "Div", "Mod", "Mul", "Pow", "Sub"]
_VARIADIC = ["Max", "Mean", "Min", "Sum"]


@st.composite
def _unary(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4))
    axes = draw(some_axes(shape))
    dtype = _DTYPES.get(op, np.float32)
    value = _values(shape, dtype, 1)
    return Sample(
        op, (value,), {0: axes}, _ATTRIBUTES.get(op, {}), draw(opsets(op)),
        units=total(shape, axes), prepare=_UNARY.get(op, ""),
    )  # fmt: skip


def _values(shape: Shape, dtype: Any, seed: int) -> Array:
    if dtype == np.float32:
        return positive(shape, seed)
    if dtype == np.bool_:
        return floats(shape, seed) > 0
    return np.abs(floats(shape, seed) * 4).astype(dtype)


@st.composite
def _operands(draw: Draw, count: int, one_way: bool = False) -> tuple[list[Shape], dict[int, Shape], int]:
    """Shapes that broadcast, which of them are data with which live axes, and the units to expect."""
    result = draw(shapes(1, 4, (1, 4)).filter(lambda shape: max(shape) > 1))
    found: list[Shape] = []
    for position in range(count):
        if one_way and position == 0:
            found.append(result)
            continue
        rank = draw(st.integers(0 if position else 1, len(result)))
        stretched = draw(st.lists(st.booleans(), min_size=rank, max_size=rank))
        tail = result[len(result) - rank :]
        found.append(tuple(1 if one else size for one, size in zip(stretched, tail, strict=True)))
    wide = [position for position, shape in enumerate(found) if max(shape, default=1) > 1]
    if not wide:
        found[0], wide = result, [0]
    data = {draw(st.sampled_from(wide)): ()}
    if draw(st.booleans()):
        data[draw(st.sampled_from(wide))] = ()
    live = {position: draw(some_axes(found[position])) for position in sorted(data)}
    return found, live, _units(found, live)


def _units(found: list[Shape], live: dict[int, Shape], *, fed: bool = False) -> int:
    """An axis of the result can be pruned if every operand that has it in full is live on it.

    Where it must be `fed`, an operand that is not stored must have it too.
    """
    rank = max(len(shape) for shape in found)
    count = 0
    for axis in range(-rank, 0):
        size = max(shape[axis] for shape in found if len(shape) >= -axis)
        full = [p for p, shape in enumerate(found) if len(shape) >= -axis and shape[axis] == size]
        stored = all(p not in live for p in full)
        if size > 1 and not (fed and stored) and all(p not in live or len(found[p]) + axis in live[p] for p in full):
            count += size
    return count


@st.composite
def _broadcast(draw: Draw, op: str) -> Sample:
    count = draw(st.integers(2, 3)) if op in _VARIADIC else 2
    found, live, units = draw(_operands(count))
    units = _units(found, live, fed=True) if op in _COMPARE else units
    dtype: Any = np.float32
    attributes: dict[str, Any] = {}
    if op in _LOGICAL:
        dtype = np.bool_
    elif op in _BITS or op == "Equal":
        dtype = np.int32
    elif op == "BitShift":
        dtype, attributes = np.uint32, {"direction": "LEFT"}
    elif op == "Mod":
        attributes = {"fmod": 1}
    values = tuple(_values(shape, dtype, seed) for seed, shape in enumerate(found))
    prepare = "Exp" if op in ("Div", "Mod", "Pow") else ""
    return Sample(op, values, live, attributes, draw(opsets(op)), units=units, prepare=prepare)


@st.composite
def _prelu(draw: Draw) -> Sample:
    found, live, units = draw(_operands(2, one_way=True))
    values = tuple(floats(shape, seed) for seed, shape in enumerate(found))
    return Sample("PRelu", values, live, {}, draw(opsets("PRelu")), units=units)


@st.composite
def _where(draw: Draw) -> Sample:
    found, live, units = draw(_operands(3))
    values = tuple(floats(shape, seed) for seed, shape in enumerate(found))
    return Sample("Where", (values[0] > 0, *values[1:]), live, {}, draw(opsets("Where")), units=units)


@st.composite
def _clip(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4))
    axes, opset = draw(some_axes(shape)), draw(opsets("Clip"))
    inputs: tuple[Array | None, ...] = (floats(shape),)
    attributes: dict[str, Any] = {"min": -0.5, "max": 0.5}
    if opset >= 11:
        low = draw(st.sampled_from([None, np.float32(-0.5)]))
        attributes, inputs = {}, (*inputs, None if low is None else np.array(low), np.array(np.float32(0.6)))
    return Sample("Clip", inputs, {0: axes}, attributes, opset, units=total(shape, axes))


@st.composite
def _cast_like(draw: Draw) -> Sample:
    shape = draw(shapes(1, 3))
    axes = draw(some_axes(shape))
    target = np.zeros(draw(st.sampled_from([(), (1,), (7,)])), np.float64)
    return Sample(
        "CastLike", (floats(shape), target), {0: axes}, {}, draw(opsets("CastLike")), units=total(shape, axes)
    )


@st.composite
def _dropout(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4))
    axes, opset = draw(some_axes(shape)), draw(opsets("Dropout"))
    inputs: tuple[Array | None, ...] = (floats(shape),)
    if opset >= 12 and draw(st.booleans()):
        inputs = (*inputs, np.array(np.float32(0.4)), np.array(False))
    outputs = draw(st.integers(1, 2)) if opset >= 10 else 1
    return Sample("Dropout", inputs, {0: axes}, {}, opset, outputs, units=total(shape, axes))


@st.composite
def _batch_normalization(draw: Draw) -> Sample:
    shape = draw(shapes(2, 5, (2, 4)))
    axes = draw(some_axes(shape))
    channels = shape[1]
    inputs = (
        floats(shape),
        floats((channels,), 1),
        floats((channels,), 2),
        floats((channels,), 3),
        positive((channels,), 4),
    )
    attributes = {"epsilon": draw(st.sampled_from([1e-5, 1e-2]))}
    return Sample(
        "BatchNormalization", inputs, {0: axes}, attributes, draw(opsets("BatchNormalization")),
        units=total(shape, axes),
    )  # fmt: skip


@st.composite
def _quantize(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4, (2, 4)))
    axes, opset = draw(some_axes(shape)), draw(opsets(op, low=10))
    attributes: dict[str, int] = {}
    per: Shape = ()
    if opset >= 13 and draw(st.booleans()):
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        attributes, per = {"axis": axis}, (shape[axis],)
    kind = draw(st.sampled_from([np.uint8, np.int8]))
    zero = (3 + np.arange(per[0] if per else 1)).astype(kind).reshape(per)
    scale = np.asarray(positive(per) * 0.1, np.float32)
    value = floats(shape) if op == "QuantizeLinear" else np.abs(floats(shape) * 20).astype(kind)
    inputs: tuple[Array | None, ...] = (value, scale, zero)
    if kind is np.uint8 and draw(st.booleans()):
        inputs = inputs[:2]
    return Sample(op, inputs, {0: axes}, attributes, opset, units=total(shape, axes))


CASES: Cases = (
    {("", op): _unary(op) for op in _UNARY}
    | {("", op): _broadcast(op) for op in [*_LOGICAL, *_BITS, *_COMPARE, *_ARITHMETIC, *_VARIADIC, "BitShift"]}
    | {
        ("", "BatchNormalization"): _batch_normalization(),
        ("", "CastLike"): _cast_like(),
        ("", "Clip"): _clip(),
        ("", "DequantizeLinear"): _quantize("DequantizeLinear"),
        ("", "Dropout"): _dropout(),
        ("", "PRelu"): _prelu(),
        ("", "QuantizeLinear"): _quantize("QuantizeLinear"),
        ("", "Where"): _where(),
    }
)
