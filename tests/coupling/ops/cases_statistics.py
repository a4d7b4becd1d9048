"""Cases for reductions, pooling, normalizations and operators that order an axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.draws import Shape, either_sign, opsets, shapes, some_axes, total
from ops.sample import REFUSED, Array, Sample, floats, ints

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]

_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare""".split()
_SUMS = {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"}
_POOL = ["AveragePool", "LpPool"]
_GLOBAL_POOL = ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"]


def _mixed(live: Shape, statistic: set[int], shape: Shape) -> bool | None:
    """The required value of `Sample.exact` if some axes cross a statistic."""
    hit = [axis in statistic for axis in live if shape[axis] > 1]
    return True if not any(hit) else False if all(hit) else None


@st.composite
def _reduce(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4, (2, 4)))
    rank, opset = len(shape), draw(opsets(op))
    live = draw(some_axes(shape))
    axes = draw(st.none() | st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
    as_input = opset >= (13 if op == "ReduceSum" else 18)
    attributes: dict[str, Any] = {}
    keep = draw(st.sampled_from([None, 0, 1]))
    if keep is not None:
        attributes["keepdims"] = keep
    reduced = set(range(rank)) if axes is None else set(axes)
    inputs: tuple[Array | None, ...] = (floats(shape),)
    if axes is not None:
        signed = [draw(either_sign(axis, rank)) for axis in axes] if opset >= 11 else axes
        if as_input:
            inputs = (*inputs, ints(*signed))
        else:
            attributes["axes"] = signed
    elif as_input and draw(st.booleans()):
        attributes["noop_with_empty_axes"] = 1
        reduced = set()
        inputs = (*inputs, np.zeros(0, np.int64)) if draw(st.booleans()) else inputs
    prunable = [axis for axis in live if axis not in reduced or op in _SUMS or op == "ReduceMean"]
    exact = _mixed(live, reduced, shape) if op == "ReduceMean" else True
    return Sample(
        op, inputs, {0: live}, attributes, opset, units=total(shape, prunable), exact=exact,
        prepare="Exp" if op == "ReduceLogSum" else "",
    )  # fmt: skip


def _image(draw: Draw, low: int = 3) -> Shape:
    dims = draw(st.integers(1, 2))
    return (draw(st.integers(1, 2)), draw(st.integers(2, 5)), *(draw(st.integers(low, 5)) for _ in range(dims)))


def _over_channels(draw: Draw, shape: Shape) -> Shape:
    """The live axes of an image: its channels, sometimes with the batch or a spatial axis."""
    extra = [axis for axis in (0, 2) if shape[axis] > 1]
    return tuple(sorted({1, *draw(st.lists(st.sampled_from(extra), max_size=1))}))


@st.composite
def _pool(draw: Draw, op: str) -> Sample:
    shape = _image(draw)
    live = _over_channels(draw, shape)
    kernel = [draw(st.integers(1, 3)) for _ in shape[2:]]
    attributes: dict[str, Any] = {"kernel_shape": kernel}
    if draw(st.booleans()):
        attributes["strides"] = [draw(st.integers(1, 2)) for _ in kernel]
    if draw(st.booleans()):
        attributes["pads"] = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    if op == "AveragePool" and draw(st.booleans()):
        attributes["count_include_pad"] = 1
    return Sample(op, (floats(shape),), {0: live}, attributes, draw(opsets(op)), units=total(shape, set(live) - {2}))


@st.composite
def _max_pool(draw: Draw) -> Sample:
    sample = draw(_pool("MaxPool"))
    if not draw(st.booleans()):
        return sample
    # The second output numbers elements of the whole tensor, so channels may not go.
    return Sample("MaxPool", sample.inputs, {0: (1,)}, sample.attributes, sample.opset, 2, units=0)


@st.composite
def _global_pool(draw: Draw, op: str) -> Sample:
    shape = _image(draw)
    live = _over_channels(draw, shape)
    return Sample(op, (floats(shape),), {0: live}, {}, draw(opsets(op)), units=total(shape, set(live) - {2}))


@st.composite
def _softmax(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4))
    rank, opset = len(shape), draw(opsets(op))
    live = draw(some_axes(shape))
    axis = draw(st.none() | st.integers(0, rank - 1))
    first = axis if axis is not None else rank - 1 if opset >= 13 else 1
    if first >= rank:
        axis = first = 0
    over = {first} if opset >= 13 else set(range(first, rank))
    attributes: dict[str, Any] = {}
    if axis is not None:
        attributes["axis"] = draw(either_sign(axis, rank)) if opset >= 11 else axis
    return Sample(op, (floats(shape),), {0: live}, attributes, opset, units=total(shape, set(live) - over))


@st.composite
def _layer_normalization(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4))
    rank = len(shape)
    live = draw(some_axes(shape))
    first = draw(st.integers(0, rank - 1)) if op == "LayerNormalization" else rank - 1
    scale = shape[first:]
    inputs: tuple[Array | None, ...] = (floats(shape), floats(scale, 1))
    if op == "LayerNormalization" and draw(st.booleans()):
        inputs = (*inputs, floats(scale, 2))
    attributes = {"axis": draw(either_sign(first, rank))}
    opset = 23 if op == "RMSNormalization" else 17
    return Sample(
        op, inputs, {0: live}, attributes, opset, units=total(shape, live),
        exact=_mixed(live, set(range(first, rank)), shape), notes=(REFUSED,) if op.startswith("Simplified") else (),
    )  # fmt: skip


@st.composite
def _group_normalization(draw: Draw) -> Sample:
    groups, per = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    if groups == per == 1:
        per = 2
    opset = draw(st.sampled_from([18, 20, 21]))
    channels = groups * per
    shape = (draw(st.integers(1, 2)), channels, 3)
    width = channels if opset >= 21 else groups
    live = _over_channels(draw, shape)
    inputs = (floats(shape), floats((width,), 1), floats((width,), 2))
    units = total(shape, set(live) - {1, 2}) + (groups if groups > 1 else channels)
    exact = True if groups > 1 else None if 0 in live else False
    return Sample(
        "GroupNormalization", inputs, {0: live}, {"num_groups": groups}, opset, units=units, exact=exact,
        notes=(REFUSED,) if opset < 21 else (),  # the checker calls it deprecated
    )  # fmt: skip


@st.composite
def _instance_normalization(draw: Draw) -> Sample:
    shape = _image(draw)
    live = _over_channels(draw, shape)
    inputs = (floats(shape), floats(shape[1:2], 1), floats(shape[1:2], 2))
    opset = draw(opsets("InstanceNormalization"))
    return Sample(
        "InstanceNormalization", inputs, {0: live}, {}, opset, units=total(shape, live), exact=_mixed(live, {2}, shape)
    )


@st.composite
def _lrn(draw: Draw) -> Sample:
    shape = (*_image(draw)[:2], 3, 2)
    attributes = {"size": draw(st.sampled_from([1, 3, 5])), "alpha": 0.1}
    return Sample("LRN", (floats(shape),), {0: (1,)}, attributes, draw(opsets("LRN")), units=shape[1], exact=False)


@st.composite
def _lp_normalization(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4))
    live, rank = draw(some_axes(shape)), len(shape)
    attributes: dict[str, Any] = {"p": draw(st.sampled_from([1, 2]))}
    axis = rank - 1
    if draw(st.booleans()):
        axis = draw(st.integers(0, rank - 1))
        attributes["axis"] = axis
    opset = draw(opsets("LpNormalization"))
    return Sample(
        "LpNormalization", (floats(shape),), {0: live}, attributes, opset, units=total(shape, live),
        exact=_mixed(live, {axis}, shape),
    )  # fmt: skip


@st.composite
def _mean_variance(draw: Draw) -> Sample:
    shape = draw(shapes(4, 4, (2, 4)))
    live = (draw(st.integers(0, 3)),)  # only one, so that a variance remains
    axes = draw(st.sampled_from([None, [0, 2, 3], [1, 2], [0, 1, 2, 3], [2, 3]]))
    attributes = {} if axes is None else {"axes": axes}
    opset = draw(opsets("MeanVarianceNormalization"))
    return Sample(
        "MeanVarianceNormalization", (floats(shape),), {0: live}, attributes,
        opset, units=total(shape, live), exact=_mixed(live, set(axes or [0, 2, 3]), shape),
        notes=(REFUSED,) if axes is None and opset >= 13 else (),  # the checker expands it wrongly
    )  # fmt: skip


@st.composite
def _ordered(draw: Draw, op: str) -> Sample:
    shape = draw(shapes(1, 4))
    live, rank, opset = draw(some_axes(shape)), len(shape), draw(opsets(op))
    axis = draw(st.integers(0, rank - 1))
    signed = draw(either_sign(axis, rank)) if opset >= 11 else axis
    inputs: tuple[Array | None, ...] = (floats(shape),)
    attributes: dict[str, Any] = {"axis": signed}
    outputs = 1
    if op == "CumSum":
        kind = draw(st.sampled_from([np.int32, np.int64]))
        inputs, attributes = (*inputs, np.array(signed, kind)), {"exclusive": draw(st.integers(0, 1))}
    elif op == "TopK":
        k = draw(st.integers(1, shape[axis]))
        outputs = 2
        if opset >= 10:
            inputs = (*inputs, ints(k))
        else:
            attributes["k"] = k
    else:
        attributes["keepdims"] = draw(st.integers(0, 1))
    return Sample(op, inputs, {0: live}, attributes, opset, outputs, units=total(shape, set(live) - {axis}))


CASES: Cases = (
    {("", op): _reduce(op) for op in _REDUCE}
    | {("", op): _pool(op) for op in _POOL}
    | {("", op): _global_pool(op) for op in _GLOBAL_POOL}
    | {("", op): _softmax(op) for op in ("Softmax", "LogSoftmax", "Hardmax")}
    | {("", op): _ordered(op) for op in ("ArgMax", "ArgMin", "CumSum", "TopK")}
    | {
        ("", op): _layer_normalization(op)
        for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    }
    | {
        ("", "GroupNormalization"): _group_normalization(),
        ("", "InstanceNormalization"): _instance_normalization(),
        ("", "LRN"): _lrn(),
        ("", "LpNormalization"): _lp_normalization(),
        ("", "MaxPool"): _max_pool(),
        ("", "MeanVarianceNormalization"): _mean_variance(),
    }
)
