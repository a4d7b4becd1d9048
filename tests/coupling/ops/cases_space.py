"""Cases for operators that move elements between channels and space, or copy them in space."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.draws import Shape, opsets
from ops.sample import Array, Sample, floats

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]


@st.composite
def _depth_to_space(draw: Draw) -> Sample:
    block = draw(st.integers(1, 3))
    channels = draw(st.integers(2 if block == 1 else 1, 4))
    shape = (draw(st.integers(1, 2)), channels * block * block, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    opset = draw(opsets("DepthToSpace"))
    attributes: dict[str, Any] = {"blocksize": block}
    if opset >= 11 and draw(st.booleans()):
        attributes["mode"] = draw(st.sampled_from(["DCR", "CRD"]))
    units = channels if channels > 1 else 0
    return Sample("DepthToSpace", (floats(shape),), {0: (1,)}, attributes, opset, units=units, moves=True)


@st.composite
def _space_to_depth(draw: Draw) -> Sample:
    block, channels = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    shape = (draw(st.integers(1, 2)), channels, block * draw(st.integers(1, 2)), block * draw(st.integers(1, 2)))
    opset = draw(opsets("SpaceToDepth"))
    return Sample("SpaceToDepth", (floats(shape),), {0: (1,)}, {"blocksize": block}, opset, units=channels, moves=True)


def _scales(shape: Shape, still: set[int]) -> Array:
    return np.array([1.0 if axis in still else 2.0 for axis in range(len(shape))], np.float32)


@st.composite
def _resize(draw: Draw) -> Sample:
    shape = (draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(2, 3)), draw(st.integers(2, 3)))
    opset = draw(opsets("Resize"))
    still = {0, 1} | draw(st.sampled_from([set(), {2}, {2, 3}]))
    live = tuple(sorted({1} | draw(st.sampled_from([set(), {2}, {3}, {0}]))))
    units = sum(shape[axis] for axis in live if axis in still and shape[axis] > 1)
    data, scales = floats(shape), _scales(shape, still)
    attributes: dict[str, Any] = {"mode": "nearest"}
    if opset < 11:
        return Sample("Resize", (data, scales), {0: live}, attributes, opset, units=units, moves=True)
    attributes["coordinate_transformation_mode"] = draw(st.sampled_from(["half_pixel", "asymmetric"]))
    roi = None if opset >= 13 else np.zeros(0, np.float32)
    by_size = draw(st.booleans())
    sizes = (np.array(shape) * scales).astype(np.int64)
    if opset >= 18 and draw(st.booleans()):
        axes = [2, 3]
        attributes["axes"] = axes
        scales, sizes = scales[axes], sizes[axes]
    if by_size:
        empty = None if opset >= 13 else np.zeros(0, np.float32)
        return Sample("Resize", (data, roi, empty, sizes), {0: live}, attributes, opset, units=units, moves=True)
    return Sample("Resize", (data, roi, scales), {0: live}, attributes, opset, units=units, moves=True)


@st.composite
def _upsample(draw: Draw) -> Sample:
    shape = (draw(st.integers(1, 2)), draw(st.integers(2, 4)), 2, 3)
    still = {0, 1} | draw(st.sampled_from([set(), {2}]))
    return Sample("Upsample", (floats(shape), _scales(shape, still)), {0: (1,)}, {}, 9, units=shape[1], moves=True)


CASES: Cases = {
    ("", "DepthToSpace"): _depth_to_space(),
    ("", "Resize"): _resize(),
    ("", "SpaceToDepth"): _space_to_depth(),
    ("", "Upsample"): _upsample(),
}
