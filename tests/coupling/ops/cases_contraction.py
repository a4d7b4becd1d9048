"""Cases for operators that sum over channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.draws import Shape, opsets, shapes
from ops.sample import Array, Sample, floats, positive

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]


def _bytes(shape: Shape, seed: int, kind: Any = np.uint8) -> Array:
    low = 0 if kind is np.uint8 else -40
    return np.asarray(np.random.default_rng(seed).integers(low, low + 90, shape)).astype(kind)


def _wide(size: int) -> int:
    return size if size > 1 else 0


def _grouped_units(groups: int, per_in: int, per_out: int) -> int | None:
    """Units of a convolution with more than one group: whole groups if there are many, else stripes."""
    if groups >= max(per_in, per_out):
        return groups
    if per_in == 1:
        return None
    return _wide(per_in) + _wide(per_out)


@st.composite
def _geometry(draw: Draw, op: str) -> tuple[Shape, Shape, dict[str, Any], int | None]:
    """Shapes of the input and of the weights, attributes, and the units to expect."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    per_in, per_out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if groups == per_in == 1:
        per_in = 2
    kernel = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    space = [size + draw(st.integers(0, 2)) for size in kernel]
    attributes: dict[str, Any] = {"group": groups, "kernel_shape": kernel}
    if draw(st.booleans()):
        attributes["strides"] = [draw(st.integers(1, 2)) for _ in kernel]
    if draw(st.booleans()) and op != "ConvTranspose":
        attributes["pads"] = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    swapped = op == "ConvTranspose"
    weights = ((groups * per_in, per_out) if swapped else (groups * per_out, per_in)) + tuple(kernel)
    units = _wide(per_in) + _wide(per_out) if groups == 1 else _grouped_units(groups, per_in, per_out)
    return (draw(st.integers(1, 2)), groups * per_in, *space), weights, attributes, units


@st.composite
def _convolution(draw: Draw, op: str) -> Sample:
    shape, weights, attributes, units = draw(_geometry(op))
    outs = weights[0] if op == "Conv" else weights[1] * attributes["group"]
    inputs: tuple[Array | None, ...] = (floats(shape), floats(weights, 1))
    if draw(st.booleans()):
        inputs = (*inputs, floats((outs,), 2))
    live = (1,) if draw(st.booleans()) or shape[2] == 1 else (1, 2)
    return Sample(op, inputs, {0: live}, attributes, draw(opsets(op)), units=units)


@st.composite
def _conv_integer(draw: Draw) -> Sample:
    shape, weights, attributes, units = draw(_geometry("ConvInteger"))
    inputs: tuple[Array | None, ...] = (_bytes(shape, 0), _bytes(weights, 1))
    zeros = draw(st.integers(0, 2))
    inputs += (np.array(7, np.uint8), np.array(30, np.uint8))[:zeros]
    return Sample("ConvInteger", inputs, {0: (1,)}, attributes, draw(opsets("ConvInteger")), units=units)


@st.composite
def _qlinear_conv(draw: Draw) -> Sample:
    shape, weights, attributes, units = draw(_geometry("QLinearConv"))
    outs = weights[0]
    per: Shape = (outs,) if draw(st.booleans()) else ()
    scale = np.asarray(positive(per, 3) * 0.02, np.float32)
    kind = draw(st.sampled_from([np.uint8, np.int8]))
    zero = np.full(per, 0 if kind is np.int8 else 5, kind)
    inputs: tuple[Array | None, ...] = (
        _bytes(shape, 0), np.array(np.float32(0.05)), np.array(9, np.uint8),
        _bytes(weights, 1, kind), scale, zero, np.array(np.float32(0.1)), np.array(100, np.uint8),
    )  # fmt: skip
    if draw(st.booleans()):
        inputs = (*inputs, (floats((outs,), 4) * 300).astype(np.int32))
    return Sample("QLinearConv", inputs, {0: (1,)}, attributes, draw(opsets("QLinearConv")), units=units)


def _letter_units(terms: list[str], found: list[Shape], live: dict[int, Shape]) -> int:
    """A letter is prunable if every operand that has it in full is live on it."""
    count = 0
    for letter in sorted(set("".join(terms))):
        holders = [(p, term.index(letter)) for p, term in enumerate(terms) if letter in term]
        size = max(found[p][axis] for p, axis in holders)
        full = [(p, axis) for p, axis in holders if found[p][axis] == size]
        if size > 1 and all(p not in live or axis in live[p] for p, axis in full):
            count += size
    return count


@st.composite
def _liveness(draw: Draw, found: list[Shape], most: int = 2) -> dict[int, Shape]:
    """Which of the operands are data, with which live axes."""
    wide = [p for p, shape in enumerate(found) if max(shape, default=1) > 1]
    chosen = draw(st.lists(st.sampled_from(wide), min_size=1, max_size=most, unique=True))
    live: dict[int, Shape] = {}
    for p in sorted(chosen):
        axes = [axis for axis, size in enumerate(found[p]) if size > 1]
        live[p] = tuple(sorted(draw(st.lists(st.sampled_from(axes), min_size=1, unique=True))))
    return live


@st.composite
def _gemm(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    opset = draw(opsets("Gemm"))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    terms = ["km" if trans_a else "mk", "nk" if trans_b else "kn"]
    sizes = {"m": m, "k": k, "n": n}
    found: list[Shape] = [tuple(sizes[letter] for letter in term) for term in terms]
    bias = draw(st.sampled_from([None, (), (1,), (n,), (1, n), (m, 1), (m, n)]))
    if bias is None and opset < 11:
        bias = (n,)
    live = draw(_liveness(found))
    inputs: tuple[Array | None, ...] = tuple(floats(shape, p) for p, shape in enumerate(found))
    if bias is not None:
        inputs = (*inputs, floats(bias, 2))
    attributes: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b)}
    if draw(st.booleans()):
        attributes |= {"alpha": 0.5, "beta": 2.0}
    return Sample("Gemm", inputs, live, attributes, opset, units=_letter_units(terms, found, live))


@st.composite
def _product(draw: Draw) -> tuple[list[Shape], list[str]]:
    """Shapes of a matrix product, batch axes broadcast, and the letters of their axes."""
    m, k, n = draw(shapes(3, 3, (2, 4)))
    kinds = draw(st.sampled_from(["vm", "mv", "vv", "mm", "bm", "mb", "bb", "bb", "bv", "vb"]))
    batch = draw(shapes(1, 2, (2, 3)))
    found: list[Shape] = []
    terms: list[str] = []
    for kind, core, letters, vector in zip(kinds, [(m, k), (k, n)], ["mk", "kn"], ["k", "k"], strict=True):
        if kind == "v":
            found.append((k,))
            terms.append(vector)
        elif kind == "m":
            found.append(core)
            terms.append(letters)
        else:
            rank = draw(st.integers(1, len(batch)))
            lead = [size if draw(st.booleans()) else 1 for size in batch[len(batch) - rank :]]
            found.append((*lead, *core))
            terms.append("xy"[2 - rank :] + letters)
    return found, terms


@st.composite
def _matmul(draw: Draw) -> Sample:
    found, terms = draw(_product())
    live = draw(_liveness(found))
    values = tuple(floats(shape, p) for p, shape in enumerate(found))
    return Sample("MatMul", values, live, {}, draw(opsets("MatMul")), units=_letter_units(terms, found, live))


@st.composite
def _matmul_integer(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    batch = draw(st.sampled_from([(), (2,)]))
    found, terms = [(*batch, m, k), (k, n)], ["xmk" if batch else "mk", "kn"]
    live = {0: draw(_liveness(found[:1]))[0]}
    inputs: tuple[Array | None, ...] = (_bytes(found[0], 0), _bytes(found[1], 1))
    per = draw(st.sampled_from([(), (n,)]))
    zero = (20 + np.arange(n if per else 1)).astype(np.uint8).reshape(per)
    inputs += (np.array(7, np.uint8), zero)[: draw(st.integers(0, 2))]
    units = _letter_units(terms, found, live)
    return Sample("MatMulInteger", inputs, live, {}, draw(opsets("MatMulInteger")), units=units)


@st.composite
def _qlinear_matmul(draw: Draw) -> Sample:
    m, k, n = draw(shapes(3, 3))
    batch = draw(st.sampled_from([(), (2,)]))
    found, terms = [(*batch, m, k), (k, n)], ["xmk" if batch else "mk", "kn"]
    live = {0: draw(_liveness(found[:1]))[0]}
    per = draw(st.sampled_from([(), (n,)]))
    scale = np.asarray(positive(per, 3) * 0.02, np.float32)
    zero = (20 + np.arange(n if per else 1)).astype(np.uint8).reshape(per)
    inputs: tuple[Array | None, ...] = (
        _bytes(found[0], 0), np.array(np.float32(0.05)), np.array(9, np.uint8),
        _bytes(found[1], 1), scale, zero, np.array(np.float32(0.1)), np.array(100, np.uint8),
    )  # fmt: skip
    units = _letter_units(terms, found, live)
    return Sample("QLinearMatMul", inputs, live, {}, draw(opsets("QLinearMatMul")), units=units)


@st.composite
def _einsum(draw: Draw) -> Sample:
    sizes = {letter: draw(st.integers(2, 4)) for letter in "abcd"}
    term = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True).map("".join)
    terms = draw(st.lists(term, min_size=1, max_size=2))
    letters = sorted(set("".join(terms)))
    result = "".join(draw(st.lists(st.sampled_from(letters), max_size=3, unique=True)))
    equation = ",".join(terms) + "->" + result
    if draw(st.booleans()):
        equation = equation.replace(",", " , ")
    found = [tuple(sizes[letter] for letter in one) for one in terms]
    live = draw(_liveness(found))
    values = tuple(floats(shape, p) for p, shape in enumerate(found))
    return Sample(
        "Einsum", values, live, {"equation": equation}, draw(opsets("Einsum")),
        units=_letter_units(terms, found, live),
    )  # fmt: skip


CASES: Cases = {
    ("", "Conv"): _convolution("Conv"),
    ("", "ConvInteger"): _conv_integer(),
    ("", "ConvTranspose"): _convolution("ConvTranspose"),
    ("", "Einsum"): _einsum(),
    ("", "Gemm"): _gemm(),
    ("", "MatMul"): _matmul(),
    ("", "MatMulInteger"): _matmul_integer(),
    ("", "QLinearConv"): _qlinear_conv(),
    ("", "QLinearMatMul"): _qlinear_matmul(),
}
