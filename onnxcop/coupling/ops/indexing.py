"""Operators that pick elements by position, or add some: labels follow what is picked."""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import Array, IntArray
from onnxcop.coupling.ops.op import Decline, Op
from onnxcop.coupling.ops.reshape import settle


def split(op: Op) -> None:
    """Split cuts the atoms along its axis into sections.

    Exact: every axis; no section may become empty, and its sizes are rewritten.
    Frozen: a section of one index.
    """
    label, shape = op.label(0), op.shape(0)
    axis = int(op.attr("axis", 0)) % len(shape)
    sizes = op.ints(1, "split") or [op.out_shape(p)[axis] for p in range(len(op.node.output))]
    live = label[axis]
    sections = np.split(live, np.cumsum(sizes)[:-1]) if live is not None else [None] * len(sizes)
    for position, section in enumerate(sections):
        result = list(label)
        result[axis] = section if section is not None and len(section) > 1 else None
        if section is not None and len(section) == 1:
            op.freeze(section, "is the only channel of a section")
        op.emit(result, position)
    if live is not None:
        op.drop(live)
        op.split_into([section for section in sections if section is not None])


def slice_(op: Op) -> None:
    """Slice: its bounds along a live axis become counts of kept indices.

    Exact: axes cut in steps of 1, whole axes reversed, and axes cut in steps of s from one of
        the first s indices, with s neighbours removed together; the bounds are rewritten.
    Frozen: axes cut in other ways; axes of weights cut to a size known only at run time.
    """
    label, shape = list(op.label(0)), op.shape(0)
    starts, ends = op.ints(1, "starts"), op.ints(2, "ends")
    axes = op.ints(3, "axes")
    steps = op.ints(4, "steps")
    if starts is None or ends is None:
        raise Decline("Slice without bounds")
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    for element, (start, end, axis, step) in enumerate(zip(starts, ends, axes, steps, strict=True)):
        live = label[axis % len(shape)]
        if live is None:
            continue
        if _cut_by_size(op, element):
            op.freeze(live, "is cut to a size known only at run time")
            label[axis % len(shape)] = None
            continue
        if step != 1:
            label[axis % len(shape)] = _strided(op, live, slice(start, end, step), element)
            continue
        first, last, _ = slice(start, end, step).indices(len(live))
        last = max(first, last)
        op.drop(live)
        if start != 0:
            op.size("starts" if "starts" in op.attributes else 1, element, live[:first], live)
        if last < len(live) or 0 <= end <= len(live):
            op.size("ends" if "ends" in op.attributes else 2, element, live[:last], live)
        taken = live[first:last]
        if len(taken) == 1:
            op.freeze(taken, "is the only channel of a slice")
        label[axis % len(shape)] = taken if len(taken) > 1 else None
    op.emit(label)


def _strided(op: Op, live: IntArray, cut: slice, element: int) -> IntArray | None:
    """An axis sliced in steps: whole runs of neighbours are removed, each as long as a step, so the steps stay."""
    first, last, step = cut.indices(len(live))
    positions = np.arange(first, last, step)
    rotated = step == -1 and len(positions) == len(live)
    if len(positions) < 2 or not (rotated or 0 <= cut.start < step):
        op.freeze(live, f"Slice with step {step}")
        return None
    op.drop(live)
    if not rotated:
        runs = np.arange(len(live)) // step * step
        op.tie(live, live[runs])
        if last < len(live) or 0 <= cut.stop <= len(live):
            until = min(len(positions) * step, len(live))
            op.size(2, element, live[:until], live)  # opsets that give bounds as attributes have no steps
    return live[positions]


def _cut_by_size(op: Op, element: int) -> bool:
    """Whether weights (e.g. a table of positions) are sliced to the size of a fed input."""
    bounds = [position for position in (1, 2) if op.has(position)]
    return op.constant(0) and not all(op.written(position, element) for position in bounds)


def gather(op: Op) -> None:
    """Gather along a rigid axis, or along a live one with constant indices (then remapped).

    Exact: the other axes; the indexed one if a constant list picks from it, which is
        rewritten (of several axes that it makes, one).
    Frozen: the indexed axis if data, a single number or a size known only at run time picks
        from it.
    """
    label, shape = op.label(0), op.shape(0)
    axis = int(op.attr("axis", 0)) % len(shape)
    live = label[axis]
    index_shape = op.shape(1)
    picked: list[IntArray | None] = [None] * len(index_shape)
    info = op.infos[1]
    by_size = info is not None and info.sized
    indices = op.value(1) if live is not None and not by_size else None
    if live is not None and indices is None:
        op.freeze(
            live, "is indexed by values computed from a size" if by_size else "is indexed by values computed from data"
        )
    elif live is not None and indices is not None:
        picked = _picked(op, axis, live, indices)
    elif op.has(1) and any(entry is not None for entry in op.label(1)):
        op.freeze_axes(1, range(len(index_shape)), "holds indices")
    op.emit((*label[:axis], *picked, *label[axis + 1 :]))


def _picked(op: Op, axis: int, live: IntArray, indices: Array) -> list[IntArray | None]:
    """The axes that a constant list of indices makes from a live one: at most one of them stays live."""
    result: list[IntArray | None] = [None] * indices.ndim
    taken = live[indices]
    wide = [place for place, size in enumerate(indices.shape) if size > 1]
    op.drop(live)
    if not wide:
        op.freeze(taken, "is selected by its index")
        op.index_into(1, live)
        return result
    lines = {place: np.moveaxis(taken, place, 0).reshape(indices.shape[place], -1) for place in wide}
    place = wide[0]
    result[place] = lines[place][:, 0].copy()
    if len(wide) > 1:
        _, place, atoms = settle(op, [(axis, place, lines[place]) for place in wide], live)
        result = [atoms if other == place else None for other in range(indices.ndim)]
    op.index_into(1, live, place)
    return result


def gather_nd(op: Op) -> None:
    """GatherND: axes that its indices do not reach pass through.

    Exact: axes that the indices do not reach.
    Frozen: axes that they reach.
    """
    label, index_shape = op.label(0), op.shape(1)
    reached = int(op.attr("batch_dims", 0)) + index_shape[-1]
    op.freeze_axes(0, range(reached), "is indexed by values computed from data")
    op.freeze_axes(1, range(len(index_shape)), "holds indices")
    op.emit((*(None for _ in index_shape[:-1]), *label[reached:]))


def gather_elements(op: Op) -> None:
    """GatherElements: of the axis only its indices' positions remain; the others meet the indices'.

    Exact: axes other than `axis` that the indices cover.
    Frozen: `axis`, and axes that the indices cover in part.
    """
    shape, index_shape = op.shape(0), op.shape(1)
    axis = int(op.attr("axis", 0)) % len(shape)
    data, indices = op.label(0), op.label(1)
    out: list[IntArray | None] = [None] * len(shape)
    for place, size in enumerate(shape):
        if place == axis or index_shape[place] != size:
            op.freeze(data[place], "is indexed by values computed from data")
            op.freeze(indices[place], "holds indices")
        else:
            out[place] = op.tie(data[place], indices[place])
    op.emit(out)


def scatter_elements(op: Op) -> None:
    """ScatterElements and Scatter: updates replace elements of data where the indices say.

    Exact: axes other than `axis` that the indices cover.
    Frozen: `axis`, and axes that the indices cover in part.
    """
    shape, index_shape = op.shape(0), op.shape(1)
    axis = int(op.attr("axis", 0)) % len(shape)
    labels = [op.label(position) for position in range(3)]
    out: list[IntArray | None] = [None] * len(shape)
    for place, size in enumerate(shape):
        if place == axis or index_shape[place] != size or op.shape(2)[place] != size:
            for label in labels:
                op.freeze(label[place], "is indexed by values computed from data")
        else:
            out[place] = op.tie(op.tie(labels[0][place], labels[1][place]), labels[2][place])
            if out[place] is None:
                op.freeze_axes(0, (place,), "is combined with an axis that is never pruned")
                op.freeze_axes(1, (place,), "is combined with an axis that is never pruned")
    op.emit(out)


def scatter_nd(op: Op) -> None:
    """ScatterND: axes that its indices do not reach are tied with the updates'.

    Exact: axes that the indices do not reach.
    Frozen: axes that they reach.
    """
    data, index_shape = op.label(0), op.shape(1)
    reached, lead = index_shape[-1], len(index_shape) - 1
    op.freeze_axes(0, range(reached), "is indexed by values computed from data")
    op.freeze_axes(1, range(len(index_shape)), "holds indices")
    op.freeze_axes(2, range(lead), "is indexed by values computed from data")
    tail = [op.tie(live, new) for live, new in zip(data[reached:], op.label(2)[lead:], strict=True)]
    op.emit((*(None for _ in range(reached)), *tail))


def pad(op: Op) -> None:
    """Pad with constants on a live axis adds atoms of its own, free to be removed.

    Exact: every axis, padded ones included; the padding may be removed as well.
    Frozen: axes that are cropped, or padded with their own values.
    """
    label, rank = list(op.label(0)), len(op.shape(0))
    pads = op.ints(1, "pads" if "paddings" not in op.attributes else "paddings")
    if pads is None:
        raise Decline("Pad without pads")
    mode = op.attr("mode", b"constant")
    axes = op.ints(3, "axes") if op.has(3) else list(range(rank))
    axes = [axis % rank for axis in axes or range(rank)]
    where: int | str = "pads" if "pads" in op.attributes else 1
    for element, axis in enumerate(axes):
        before, after = pads[element], pads[element + len(axes)]
        live = label[axis]
        if live is None or (before == 0 and after == 0):
            continue
        if mode not in (b"constant", "constant") or before < 0 or after < 0:
            op.freeze(live, "is padded with its own values, or cropped")
            label[axis] = None
            continue
        head, tail = op.pool.allocate(before), op.pool.allocate(after)
        op.size(where, element, head)
        op.size(where, element + len(axes), tail)
        op.drop(live)
        label[axis] = np.concatenate([head, live, tail])
    op.emit(label)


def sample(op: Op) -> None:
    """GridSample, RoiAlign, MaxRoiPool: channels pass, space is sampled at positions computed from data.

    Exact: channels.
    Frozen: all others.
    """
    label = op.label(0)
    op.freeze_axes(0, (0, *range(2, len(label))), "is sampled at positions computed from data")
    for position in range(1, op.count):
        if op.has(position):
            op.freeze_axes(position, range(len(op.label(position))), "holds coordinates")
    op.emit((None, label[1], *(None for _ in range(2, len(op.out_shape())))))
