"""Cases for operators that pick or replace single elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.draws import Shape, either_sign, opsets, shapes, some_axes, total
from ops.sample import Array, Sample, floats

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]


@st.composite
def _gather_elements(draw: Draw) -> Sample:
    shape = draw(shapes(1, 3, (2, 4)))
    axis, live = draw(st.integers(0, len(shape) - 1)), draw(some_axes(shape))
    lengths = tuple(size if draw(st.booleans()) else size - 1 for size in shape)
    lengths = (*lengths[:axis], draw(st.integers(1, 5)), *lengths[axis + 1 :])
    indices = np.random.default_rng(3).integers(0, shape[axis], lengths)
    units = total(shape, [a for a in live if a != axis and lengths[a] == shape[a]])
    opset = draw(opsets("GatherElements"))
    attributes = {"axis": draw(either_sign(axis, len(shape)))}
    return Sample("GatherElements", (floats(shape), indices), {0: live}, attributes, opset, units=units, moves=True)


def _places(lengths: Shape, shape: Shape, axis: int) -> Array:
    """Indices along `axis` that repeat nowhere."""
    rng = np.random.default_rng(4)
    rest = (*lengths[:axis], *lengths[axis + 1 :])
    drawn = np.stack([rng.permutation(shape[axis])[: lengths[axis]] for _ in range(int(np.prod(rest)))])
    return np.moveaxis(drawn.reshape(*rest, lengths[axis]), -1, axis).copy()


@st.composite
def _scatter_elements(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 3, (2, 4)))
    axis, live = draw(st.integers(0, len(shape) - 1)), draw(some_axes(shape))
    lengths = tuple(size if draw(st.booleans()) else size - 1 for size in shape)
    indices = _places(lengths, shape, axis)
    inputs = (floats(shape), indices, floats(lengths, 1))
    covered = [a for a in live if a != axis and lengths[a] == shape[a]]
    data: dict[int, Shape] = {0: live}
    units = total(shape, covered)
    if draw(st.booleans()):
        data = {0: live, 2: tuple(a for a in live if lengths[a] > 1)}
        data = {position: axes for position, axes in data.items() if axes}
    opset = 10 if op == "Scatter" else draw(opsets(op, low=11))
    attributes = {"axis": axis}
    return Sample(op, inputs, data, attributes, opset, units=units, moves=True)


@st.composite
def _scatter_nd(draw: Draw) -> Sample:
    shape = draw(shapes(1, 3, (2, 4)))
    reached = draw(st.integers(1, len(shape)))
    count = draw(st.integers(1, 2))
    live = draw(some_axes(shape))
    rows = np.random.default_rng(2).permutation(int(np.prod(shape[:reached])))[:count]
    indices = np.stack(np.unravel_index(rows, shape[:reached]), axis=-1).astype(np.int64)
    inputs = (floats(shape), indices, floats((count, *shape[reached:]), 1))
    units = total(shape, [axis for axis in live if axis >= reached])
    return Sample("ScatterND", inputs, {0: live}, {}, draw(opsets("ScatterND")), units=units, moves=True)


CASES: Cases = {
    ("", "GatherElements"): _gather_elements(),
    ("", "Scatter"): _scatter_elements("Scatter"),
    ("", "ScatterElements"): _scatter_elements("ScatterElements"),
    ("", "ScatterND"): _scatter_nd(),
}
