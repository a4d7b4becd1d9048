"""Cases for operators that move elements without computing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from ops.draws import either_sign, opsets, shapes, some_axes, total
from ops.sample import Array, Sample, floats, ints

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]


@st.composite
def _transpose(draw: Draw) -> Sample:
    shape = draw(shapes(1, 5))
    axes = draw(some_axes(shape))
    order = draw(st.none() | st.permutations(range(len(shape))))
    attributes = {} if order is None else {"perm": list(order)}
    return Sample(
        "Transpose", (floats(shape),), {0: axes}, attributes, draw(opsets("Transpose")),
        units=total(shape, axes), moves=True,
    )  # fmt: skip


@st.composite
def _squeeze(draw: Draw) -> Sample:
    shape = draw(shapes(2, 4, (1, 4)).filter(lambda s: 1 in s and max(s) > 1))
    live, opset = draw(some_axes(shape)), draw(opsets("Squeeze"))
    single = [axis for axis, size in enumerate(shape) if size == 1]
    axes = draw(st.none() | st.lists(st.sampled_from(single), min_size=1, unique=True))
    inputs: tuple[Array | None, ...] = (floats(shape),)
    attributes: dict[str, Any] = {}
    if axes is not None:
        axes = [axis - draw(st.sampled_from([0, len(shape)])) for axis in axes] if opset >= 11 else axes
        if opset >= 13:
            inputs = (*inputs, ints(*axes))
        else:
            attributes = {"axes": sorted(axes)}  # shape inference takes them to be sorted
    return Sample("Squeeze", inputs, {0: live}, attributes, opset, units=total(shape, live), moves=True)


@st.composite
def _unsqueeze(draw: Draw) -> Sample:
    shape = draw(shapes(1, 3))
    live, opset = draw(some_axes(shape)), draw(opsets("Unsqueeze"))
    extra = draw(st.integers(1, 2))
    rank = len(shape) + extra
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=extra, max_size=extra, unique=True))
    if opset >= 11:
        axes = [axis - draw(st.sampled_from([0, rank])) for axis in axes]
    inputs = (floats(shape), ints(*axes)) if opset >= 13 else (floats(shape),)
    attributes = {} if opset >= 13 else {"axes": axes}
    return Sample("Unsqueeze", inputs, {0: live}, attributes, opset, units=total(shape, live), moves=True)


@st.composite
def _concat(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (2, 4)))
    rank, count = len(shape), draw(st.integers(1, 3))
    axis = draw(st.integers(0, rank - 1))
    sizes = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count).filter(lambda s: max(s) > 1))
    parts = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
    live = draw(some_axes([max(sizes) if a == axis else s for a, s in enumerate(shape)]))
    data = {p: tuple(a for a in live if part[a] > 1) for p, part in enumerate(parts)}
    units = total(shape, [a for a in live if a != axis])
    if axis in live:
        units += sum(size for size in sizes if size > 1)
    if count > 1 and draw(st.booleans()):  # a stored part is live on every axis
        del data[count - 1]
        if axis not in live:
            units += sizes[-1] if sizes[-1] > 1 else 0
    values = tuple(floats(part, p) for p, part in enumerate(parts))
    attributes = {"axis": draw(either_sign(axis, rank))}
    assume(any(data.values()))
    return Sample("Concat", values, data, attributes, draw(opsets("Concat", low=11)), units=units, moves=True)


@st.composite
def _split(draw: Draw) -> Sample:
    opset = draw(opsets("Split"))
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(0, rank - 1))
    count = draw(st.integers(1, 3))
    equal = draw(st.booleans())
    size = draw(st.integers(2, 3))
    sizes = [size] * count if equal else draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    sizes = [2] if sizes == [1] else sizes
    other = draw(shapes(rank - 1, rank - 1, (2, 3)))
    shape = (*other[:axis], sum(sizes), *other[axis:])
    live = draw(some_axes(shape))
    signed = draw(either_sign(axis, rank)) if opset >= 11 else axis
    attributes: dict[str, Any] = {"axis": signed}
    inputs: tuple[Array | None, ...] = (floats(shape),)
    if equal and draw(st.booleans()):
        if opset >= 18:
            attributes["num_outputs"] = count
    elif opset >= 13:
        inputs = (*inputs, ints(*sizes))
    else:
        attributes["split"] = sizes
    units = total(shape, [a for a in live if a != axis])
    if axis in live:
        units += sum(part for part in sizes if part > 1)
    return Sample("Split", inputs, {0: live}, attributes, opset, count, units=units, moves=True)


@st.composite
def _slice(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (3, 7)))
    live, opset = draw(some_axes(shape)), draw(opsets("Slice"))
    axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    starts, ends, steps, units = [], [], [], total(shape, live)
    for axis in axes:
        size = shape[axis]
        first = draw(st.integers(0, size - 1))
        last = draw(st.integers(first + 1, size))
        step = draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) if opset >= 10 else 1
        first = draw(st.integers(0, step - 1)) if step > 1 and draw(st.booleans()) else first
        first, last = (0, size) if step == -1 and draw(st.booleans()) else (first, max(last, first + 1))
        if step < 0:
            starts.append(last - 1)
            ends.append(first - 1 if first else -(2**31))
        else:
            starts.append(draw(st.sampled_from([first, first - size])))
            ends.append(draw(st.sampled_from([last] + ([2**31 - 1, 2**63 - 1] if last == size else [last - size]))))
        steps.append(step)
        if axis in live:
            units -= size if step > 1 and starts[-1] < 0 else _lost_in_slice(size, first, last, step)
    plain = axes == list(range(len(axes))) and set(steps) == {1} and draw(st.booleans())
    if opset < 10:
        attributes: dict[str, Any] = {"starts": starts, "ends": ends}
        if not plain:
            attributes["axes"] = axes
        return Sample("Slice", (floats(shape),), {0: live}, attributes, opset, units=units, moves=True)
    inputs = (floats(shape), ints(*starts), ints(*ends))
    if not plain:
        signed = [draw(either_sign(axis, len(shape))) for axis in axes]
        inputs = (*inputs, ints(*signed), ints(*steps))
    return Sample("Slice", inputs, {0: live}, {}, opset, units=units, moves=True)


def _lost_in_slice(size: int, first: int, last: int, step: int) -> int:
    """How many units an axis has less than indices: s neighbours are one, and what is left alone is none."""
    if step == 1:
        return int(last - first == 1)
    picks = len(range(first, last, abs(step)))
    if step < 0:
        return 0 if step == -1 and picks == size else size
    return size - math.ceil(size / step) if first < step and picks > 1 else size


def _tied(indices: Array) -> int:
    """How many units a matrix of picks loses: one of its axes stays, and each of its slices is removed together."""
    counts = []
    for lines in (indices, indices.T):
        classes = [{int(number)} for number in np.unique(indices)]
        for line in lines:
            joined = [c for c in classes if c & set(line.tolist())]
            classes = [c for c in classes if c not in joined] + [set().union(*joined)]
        counts.append(len(classes) if len(classes) > 1 else 0)
    return len(np.unique(indices)) - max(counts)


@st.composite
def _gather(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (2, 5)))
    live, rank = draw(some_axes(shape)), len(shape)
    axis = draw(st.integers(0, rank - 1))
    size = shape[axis]
    index = st.integers(-size, size - 1)
    kind = draw(st.sampled_from(["scalar", "vector", "matrix"]))
    units: int = total(shape, live)
    if kind == "scalar":
        indices = np.array(draw(index))
        gone = {int(indices) % size}
    else:
        indices = np.array(draw(st.lists(index, min_size=2, max_size=6)))
        gone = set() if len(set((indices % size).tolist())) > 1 else {int(indices[0]) % size}
        if kind == "matrix":
            form = draw(st.sampled_from([(1, -1), (-1, 1), (2, -1)] if indices.size % 2 == 0 else [(1, -1)]))
            indices = indices.reshape(form)
            if min(indices.shape) > 1:
                gone = set(range(_tied(indices % size)))
    units -= len(gone) if axis in live else 0
    attributes = {"axis": draw(either_sign(axis, rank))}
    inputs = (floats(shape), indices.astype(draw(st.sampled_from([np.int32, np.int64]))))
    return Sample("Gather", inputs, {0: live}, attributes, draw(opsets("Gather", low=11)), units=units, moves=True)


@st.composite
def _gather_nd(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (2, 4)))
    rank, opset = len(shape), draw(opsets("GatherND"))
    batch = draw(st.integers(0, rank - 1)) if opset >= 12 else 0
    reached = draw(st.integers(batch + 1, rank))
    count = draw(st.integers(1, 3))
    columns = [
        np.random.default_rng(axis).integers(0, shape[axis], (*shape[:batch], count)) for axis in range(batch, reached)
    ]
    indices = np.stack(columns, axis=-1).astype(np.int64)
    live = draw(some_axes(shape))
    attributes = {"batch_dims": batch} if batch else {}
    units = total(shape, [axis for axis in live if axis >= reached])
    return Sample("GatherND", (floats(shape), indices), {0: live}, attributes, opset, units=units, moves=True)


@st.composite
def _pad(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (2, 4)))
    rank, opset = len(shape), draw(opsets("Pad"))
    live = draw(some_axes(shape))
    mode = draw(st.sampled_from(["constant", "constant", "edge", "reflect"]))
    chosen = list(range(rank))
    if opset >= 18 and draw(st.booleans()):
        chosen = draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
    before = [draw(st.integers(0, min(2, shape[axis] - 1))) for axis in chosen]
    after = [draw(st.integers(0, min(2, shape[axis] - 1))) for axis in chosen]
    padded = {axis: (head, tail) for axis, head, tail in zip(chosen, before, after, strict=True) if head or tail}
    units: int = total(shape, live)
    for axis in set(live) & set(padded):
        units += sum(padded[axis]) if mode == "constant" else -shape[axis]
    if opset < 11:
        attributes: dict[str, Any] = {"pads": before + after, "mode": mode, "value": -1.0}
        return Sample("Pad", (floats(shape),), {0: live}, attributes, opset, units=units, moves=True)
    inputs: tuple[Array | None, ...] = (floats(shape), ints(*before, *after), np.array(np.float32(-1)))
    if chosen != list(range(rank)):
        inputs = (*inputs, ints(*(draw(either_sign(axis, rank)) for axis in chosen)))
    return Sample("Pad", inputs, {0: live}, {"mode": mode}, opset, units=units, moves=True)


@st.composite
def _expand(draw: Draw) -> Sample:
    result = draw(shapes(1, 4, (2, 4)))
    rank = draw(st.integers(1, len(result)))
    tail = result[len(result) - rank :]
    flat = draw(st.lists(st.booleans(), min_size=rank, max_size=rank).filter(lambda f: not all(f)))
    shape = tuple(1 if one else size for one, size in zip(flat, tail, strict=True))
    live = draw(some_axes(shape))
    offset = len(result) - rank
    target = [
        1 if axis >= offset and not flat[axis - offset] and draw(st.booleans()) else size
        for axis, size in enumerate(result)
    ]
    if len(target) > 1 and not offset and not flat[0] and draw(st.booleans()):
        target = target[1:]  # a target of lower rank
    return Sample(
        "Expand", (floats(shape), ints(*target)), {0: live}, {}, draw(opsets("Expand")),
        units=total(shape, live), moves=True,
    )  # fmt: skip


@st.composite
def _tile(draw: Draw) -> Sample:
    shape = draw(shapes(1, 4, (1, 4)).filter(lambda s: max(s) > 1))
    live = draw(some_axes(shape))
    repeats = [draw(st.integers(1, 3)) for _ in shape]
    return Sample(
        "Tile", (floats(shape), ints(*repeats)), {0: live}, {}, draw(opsets("Tile")),
        units=total(shape, live), moves=True,
    )  # fmt: skip


CASES: Cases = {
    ("", "Concat"): _concat(),
    ("", "Expand"): _expand(),
    ("", "Gather"): _gather(),
    ("", "GatherND"): _gather_nd(),
    ("", "Pad"): _pad(),
    ("", "Slice"): _slice(),
    ("", "Split"): _split(),
    ("", "Squeeze"): _squeeze(),
    ("", "Tile"): _tile(),
    ("", "Transpose"): _transpose(),
    ("", "Unsqueeze"): _unsqueeze(),
}
