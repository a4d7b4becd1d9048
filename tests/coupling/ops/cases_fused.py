"""Cases for operators that onnxruntime's optimizer makes of several."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.cases_contraction import _geometry, _letter_units, _liveness
from ops.draws import Shape, shapes, some_axes, total
from ops.sample import Array, Sample, floats

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]
MICROSOFT = "com.microsoft"


@st.composite
def _fused_conv(draw: Draw) -> Sample:
    shape, weights, attributes, units = draw(_geometry("Conv"))
    if len(shape) == 5:  # onnxruntime has no kernel for it
        shape, weights = shape[:4], weights[:4]
        attributes = {name: value for name, value in attributes.items() if name in ("group", "kernel_shape")}
        attributes["kernel_shape"] = attributes["kernel_shape"][:2]
    attributes["activation"] = draw(st.sampled_from(["Relu", "Tanh", "LeakyRelu"]))
    if attributes["activation"] == "LeakyRelu":
        attributes["activation_params"] = [0.2]
    inputs: tuple[Array | None, ...] = (floats(shape), floats(weights, 1))
    bias = floats(weights[:1], 2) if draw(st.booleans()) else None
    plain = not {"strides", "pads"} & attributes.keys() and len(shape) == 4
    if plain and draw(st.booleans()):
        space = [size - kernel + 1 for size, kernel in zip(shape[2:], weights[2:], strict=True)]
        inputs = (*inputs, bias, floats((shape[0], weights[0], *space), 3))
    elif bias is not None:
        inputs = (*inputs, bias)
    return Sample("FusedConv", inputs, {0: (1,)}, attributes, units=units, domain=MICROSOFT)


@st.composite
def _fused_matmul(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3, (2, 4)))
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    lead = "xy"[2 - len(batch) :]
    terms = [lead + ("km" if trans_a else "mk"), "nk" if trans_b else "kn"]
    if draw(st.booleans()):
        terms[1] = lead + terms[1]
    sizes = {"m": m, "k": k, "n": n} | dict(zip(lead, batch, strict=True))
    found: list[Shape] = [tuple(sizes[letter] for letter in term) for term in terms]
    live = draw(_liveness(found))
    values = tuple(floats(shape, p) for p, shape in enumerate(found))
    attributes: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b), "alpha": 0.5}
    units = _letter_units(terms, found, live)
    return Sample("FusedMatMul", values, live, attributes, units=units, domain=MICROSOFT)


@st.composite
def _fused_gemm(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    terms = ["km" if trans_a else "mk", "nk" if trans_b else "kn"]
    sizes = {"m": m, "k": k, "n": n}
    found: list[Shape] = [tuple(sizes[letter] for letter in term) for term in terms]
    live = draw(_liveness(found))
    inputs = (*(floats(shape, p) for p, shape in enumerate(found)), floats((n,), 2))
    attributes: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b), "activation": "Tanh", "alpha": 0.5}
    units = _letter_units(terms, found, live)
    return Sample("FusedGemm", inputs, live, attributes, units=units, domain=MICROSOFT)


@st.composite
def _unary(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4))
    axes = draw(some_axes(shape))
    attributes = {"alpha": 1.2} if op == "QuickGelu" else {}
    return Sample(op, (floats(shape),), {0: axes}, attributes, units=total(shape, axes), domain=MICROSOFT)


@st.composite
def _with_bias(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(2, 4))
    axes = draw(some_axes(shape))
    inputs: tuple[Array | None, ...] = (floats(shape),)
    if op == "BiasGelu" or draw(st.booleans()):
        inputs = (*inputs, floats(shape[-1:], 1))
    return Sample(op, inputs, {0: axes}, units=total(shape, axes), domain=MICROSOFT)


@st.composite
def _skip_normalization(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(3, 3, (2, 4)))
    width = shape[-1:]
    skip = draw(st.sampled_from([shape, (1, *shape[1:]), shape[1:]]))
    live = {0: (2,), 1: tuple(a for a in (len(skip) - 1,))}
    inputs: tuple[Array | None, ...] = (floats(shape), floats(skip, 1), floats(width, 2))
    if draw(st.booleans()):
        inputs = (*inputs, floats(width, 3))  # beta, or the bias of the simplified one
        if "Simplified" not in op and draw(st.booleans()):
            inputs = (*inputs, floats(width, 4))
    if draw(st.booleans()):
        live = {0: (2,)}
        inputs = (inputs[0], floats(skip, 5), *inputs[2:])
    outputs, skipped = draw(st.sampled_from([(1, ()), (4, (1, 2))]))
    return Sample(
        op, inputs, live, {"epsilon": 1e-5}, outputs=outputs, skip_outputs=skipped, units=shape[-1], exact=False,
        domain=MICROSOFT,
    )  # fmt: skip


@st.composite
def _embed_normalization(draw: Draw) -> Sample:
    batch, tokens, width = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(2, 5))
    ids = np.arange(batch * tokens, dtype=np.int32).reshape(batch, tokens)
    segments = (ids % 2).astype(np.int32) if draw(st.booleans()) else None
    tables = [floats((rows, width), seed) for seed, rows in enumerate((7, 4))]
    third = None if segments is None else floats((2, width), 2)
    inputs = (ids, segments, *tables, third, floats((width,), 3), floats((width,), 4))
    live: dict[int, Shape] = {2: (1,), 3: (1,)}
    return Sample(
        "EmbedLayerNormalization", inputs, live, {"epsilon": 1e-5}, outputs=3, skip_outputs=(1,),
        units=width, exact=False, domain=MICROSOFT,
    )  # fmt: skip


CASES: Cases = {
    (MICROSOFT, "BiasGelu"): _with_bias("BiasGelu"),
    (MICROSOFT, "EmbedLayerNormalization"): _embed_normalization(),
    (MICROSOFT, "FastGelu"): _with_bias("FastGelu"),
    (MICROSOFT, "FusedConv"): _fused_conv(),
    (MICROSOFT, "FusedGemm"): _fused_gemm(),
    (MICROSOFT, "FusedMatMul"): _fused_matmul(),
    (MICROSOFT, "Gelu"): _unary("Gelu"),
    (MICROSOFT, "QuickGelu"): _unary("QuickGelu"),
    (MICROSOFT, "SkipLayerNormalization"): _skip_normalization("SkipLayerNormalization"),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_normalization("SkipSimplifiedLayerNormalization"),
}
