"""Cases for operators on quantized tensors that onnxruntime adds, and for those that quantize by a range."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.cases_contraction import _bytes, _letter_units, _liveness
from ops.cases_elementwise import _operands, _quantize
from ops.draws import Shape, either_sign, shapes, some_axes, total
from ops.sample import Array, Sample, floats, positive

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]
MICROSOFT = "com.microsoft"


def _scale(value: float) -> Array:
    return np.array(value, np.float32)


def _zero(value: int) -> Array:
    return np.array(value, np.uint8)


@st.composite
def _unary(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4))
    axes = draw(some_axes(shape))
    attributes = {"alpha": 0.2} if op == "QLinearLeakyRelu" else {}
    inputs = (_bytes(shape, 0), _scale(0.05), _zero(100), _scale(0.01), _zero(3))
    return Sample(op, inputs, {0: axes}, attributes, units=total(shape, axes), domain=MICROSOFT)


@st.composite
def _binary(draw: Draw, op: str) -> Sample:
    found, live, units = draw(_operands(2))  # no sum falls between two steps: kernels round that differently
    live = {3 if position else 0: axes for position, axes in live.items()}
    inputs = (
        _bytes(found[0], 0), _scale(0.0513), _zero(100), _bytes(found[1], 1), _scale(0.0437), _zero(40),
        _scale(0.0611), _zero(90),
    )  # fmt: skip
    return Sample(op, inputs, live, units=units, domain=MICROSOFT)


@st.composite
def _where(draw: Draw) -> Sample:
    found, live, units = draw(_operands(3))
    live = {(0, 1, 4)[position]: axes for position, axes in live.items()}
    condition = np.asarray(floats(found[0]) > 0)
    inputs = (
        condition, _bytes(found[1], 0), _scale(0.0513), _zero(100), _bytes(found[2], 1), _scale(0.0437), _zero(40),
        _scale(0.0611), _zero(90),
    )  # fmt: skip
    return Sample("QLinearWhere", inputs, live, units=units, domain=MICROSOFT)


@st.composite
def _softmax(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4))
    live, axis = draw(some_axes(shape)), draw(st.integers(0, len(shape) - 1))
    opset = draw(st.sampled_from([12, 13]))
    over = {axis} if opset >= 13 else set(range(axis, len(shape)))
    attributes = {"axis": draw(either_sign(axis, len(shape))), "opset": opset}
    inputs = (_bytes(shape, 0), _scale(0.05), _zero(40), _scale(1 / 256), _zero(0))
    units = total(shape, set(live) - over)
    return Sample("QLinearSoftmax", inputs, {0: live}, attributes, units=units, domain=MICROSOFT)


@st.composite
def _concat(draw: Draw) -> Sample:
    shape = draw(shapes(2, 4, (2, 4)))
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = [draw(st.integers(2, 4)) for _ in range(draw(st.integers(1, 3)))]
    inputs: tuple[Array | None, ...] = (_scale(0.1), _zero(90))
    live: dict[int, Shape] = {}
    for number, size in enumerate(sizes):
        live[len(inputs)] = (axis,)
        part = (*shape[:axis], size, *shape[axis + 1 :])
        inputs = (*inputs, _bytes(part, number), _scale(0.05 + 0.01 * number), _zero(90 + number))
    return Sample("QLinearConcat", inputs, live, {"axis": axis}, units=sum(sizes), domain=MICROSOFT)


@st.composite
def _pool(draw: Draw, op: str) -> Sample:
    last = draw(st.booleans())
    batch, channels, space = draw(st.integers(1, 2)), draw(st.integers(2, 4)), (3, 2)
    shape = (batch, *space, channels) if last else (batch, channels, *space)
    live = (3 if last else 1, 2) if draw(st.booleans()) else (3 if last else 1,)
    attributes: dict[str, Any] = {"channels_last": int(last)}
    if op == "QLinearAveragePool":
        attributes |= {"kernel_shape": [2, 1]}
    inputs = (_bytes(shape, 0), _scale(0.05), _zero(9), _scale(0.04), _zero(8))
    return Sample(op, inputs, {0: tuple(sorted(live))}, attributes, units=channels, domain=MICROSOFT)


@st.composite
def _nhwc_pool(draw: Draw) -> Sample:
    shape = (draw(st.integers(1, 2)), 3, 2, draw(st.integers(2, 4)))
    attributes = {"kernel_shape": [2, 2], "strides": [1, 1]}
    return Sample("NhwcMaxPool", (_bytes(shape, 0),), {0: (3,)}, attributes, units=shape[3], domain=MICROSOFT)


def _per_column(draw: Draw, n: int, kind: Any) -> tuple[Array, Array]:
    """Scale and zero point of the columns, or of all of them."""
    per: Shape = (n,) if draw(st.booleans()) else ()
    zero = np.asarray(20 + np.arange(n if per else 1)).astype(kind).reshape(per)
    return np.asarray(positive(per, 3) * 0.02, np.float32), zero


@st.composite
def _qgemm(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    terms = ["km" if trans_a else "mk", "nk" if trans_b else "kn"]
    sizes = {"m": m, "k": k, "n": n}
    found: list[Shape] = [tuple(sizes[letter] for letter in term) for term in terms]
    live = {0: draw(_liveness(found[:1]))[0]}
    kind = draw(st.sampled_from([np.uint8, np.int8]))
    scale, zero = _per_column(draw, n, kind)
    bias = (floats((n,), 4) * 300).astype(np.int32) if draw(st.booleans()) else None
    inputs = (
        _bytes(found[0], 0), _scale(0.05), _zero(9), _bytes(found[1], 1, kind), scale, zero, bias,
        _scale(0.1), _zero(100),
    )  # fmt: skip
    attributes: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b), "alpha": 1.0}
    units = _letter_units(terms, found, live)
    return Sample("QGemm", inputs, live, attributes, units=units, domain=MICROSOFT)


@st.composite
def _to_float(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    batch = draw(st.sampled_from([(), (2,)]))
    found, terms = [(*batch, m, k), (k, n)], ["xmk" if batch else "mk", "kn"]
    live = {0: draw(_liveness(found[:1]))[0]}
    scale, zero = _per_column(draw, n, np.uint8)
    inputs: tuple[Array | None, ...] = (_bytes(found[0], 0), _bytes(found[1], 1), _scale(0.05), scale)
    if draw(st.booleans()):
        inputs = (*inputs, _zero(9), zero)
        if draw(st.booleans()):
            inputs = (*inputs, floats((n,), 5))
    units = _letter_units(terms, found, live)
    return Sample("MatMulIntegerToFloat", inputs, live, units=units, domain=MICROSOFT)


@st.composite
def _dynamic_matmul(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    live = draw(_liveness([(m, k)]))
    scale, zero = _per_column(draw, n, np.uint8)
    inputs: tuple[Array | None, ...] = (floats((m, k)), _bytes((k, n), 1), scale, zero)
    if draw(st.booleans()):
        inputs = (*inputs, floats((n,), 5))
    units = n + sum((m, k)[axis] for axis in live[0])
    return Sample("DynamicQuantizeMatMul", inputs, live, units=units, exact=None, domain=MICROSOFT)


@st.composite
def _dynamic_quantize(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4))
    axes = draw(some_axes(shape))
    return Sample(
        "DynamicQuantizeLinear", (floats(shape),), {0: axes}, {}, 11, 3, units=total(shape, axes), exact=False,
        skip_outputs=(),
    )  # fmt: skip


@st.composite
def _of_domain(draw: Draw, op: str) -> Sample:
    from dataclasses import replace

    sample = draw(_quantize(op))
    return replace(sample, domain=MICROSOFT)


CASES: Cases = {
    ("", "DynamicQuantizeLinear"): _dynamic_quantize(),
    (MICROSOFT, "DequantizeLinear"): _of_domain("DequantizeLinear"),
    (MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_matmul(),
    (MICROSOFT, "MatMulIntegerToFloat"): _to_float(),
    (MICROSOFT, "NhwcMaxPool"): _nhwc_pool(),
    (MICROSOFT, "QGemm"): _qgemm(),
    (MICROSOFT, "QLinearAdd"): _binary("QLinearAdd"),
    (MICROSOFT, "QLinearAveragePool"): _pool("QLinearAveragePool"),
    (MICROSOFT, "QLinearConcat"): _concat(),
    (MICROSOFT, "QLinearGlobalAveragePool"): _pool("QLinearGlobalAveragePool"),
    (MICROSOFT, "QLinearLeakyRelu"): _unary("QLinearLeakyRelu"),
    (MICROSOFT, "QLinearMul"): _binary("QLinearMul"),
    (MICROSOFT, "QLinearSigmoid"): _unary("QLinearSigmoid"),
    (MICROSOFT, "QLinearSoftmax"): _softmax(),
    (MICROSOFT, "QLinearWhere"): _where(),
    (MICROSOFT, "QuantizeLinear"): _of_domain("QuantizeLinear"),
}
