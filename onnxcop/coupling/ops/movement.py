"""Operators that move elements without computing: what happens to the elements happens to the atoms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.elementwise import tie_axis
from onnxcop.coupling.ops.op import Decline, Op

_SHIFTING = (b"tf_crop_and_resize", "tf_crop_and_resize", b"tf_half_pixel_for_nn", "tf_half_pixel_for_nn")


def transpose(op: Op) -> None:
    """Transpose permutes the label.

    Exact: every axis.
    """
    label = op.label(0)
    order = op.attr("perm", list(range(len(label)))[::-1])
    op.emit([label[axis] for axis in order])


def squeeze(op: Op) -> None:
    """Squeeze drops axes of size 1, which are rigid.

    Exact: every axis.
    """
    shape, label = op.shape(0), op.label(0)
    axes = op.ints(1, "axes")
    dropped = {a % len(shape) for a in axes} if axes else {a for a, size in enumerate(shape) if size == 1}
    rest = [live for axis, live in enumerate(label) if axis not in dropped]
    if not axes:
        op.drops(sorted(dropped), [live for live in rest if live is not None])
    op.emit(rest)


def unsqueeze(op: Op) -> None:
    """Unsqueeze inserts rigid axes of size 1.

    Exact: every axis.
    """
    label = op.label(0)
    axes = op.ints(1, "axes")
    if axes is None:
        raise Decline("Unsqueeze without axes")
    rank = len(label) + len(axes)
    inserted = {axis % rank for axis in axes}
    rest = iter(label)
    op.emit([None if axis in inserted else next(rest) for axis in range(rank)])


def concat(op: Op) -> None:
    """Concat joins the atoms along its axis; the other axes are tied.

    Exact: every axis, the joined one included.
    """
    join(op, range(op.count))


def join(op: Op, positions: Iterable[int]) -> None:
    """Join the inputs at `positions` along the node's axis."""
    given = [p for p in positions if op.has(p)]
    shapes, labels = {p: op.shape(p) for p in given}, {p: op.label(p) for p in given}
    rank = len(shapes[given[0]])
    joined = int(op.attr("axis", 1)) % rank
    result: list[IntArray | None] = []
    for axis in range(rank):
        if axis != joined:
            size = shapes[given[0]][axis]
            result.append(tie_axis(op, axis - rank, size, shapes, labels))
        elif all(labels[p][axis] is None for p in given):
            result.append(None)
        else:
            result.append(np.concatenate([_or_rigid(op, labels[p][axis], shapes[p][axis]) for p in given]))
    op.emit(result)


def _or_rigid(op: Op, live: IntArray | None, size: int) -> IntArray:
    """The live atoms, or as many frozen ones for a rigid stretch of a live axis."""
    if live is not None:
        return live
    atoms = op.pool.allocate(size)
    op.freeze(atoms, "is concatenated with channels that are never pruned")
    return atoms


def expand(op: Op) -> None:
    """Expand: an axis that is not stretched keeps its atoms; one stretched from a constant is new.

    Exact: axes that keep their size; stretched axes of a constant, if their size is a stored number.
    Frozen: stretched axes.
    """
    shape, label, result = op.shape(0), op.label(0), op.out_shape()
    offset = len(result) - len(shape)
    target = op.shape(1)[0]
    out: list[IntArray | None] = [None] * len(result)
    for axis, live in enumerate(label):
        if live is not None and shape[axis] == result[axis + offset]:
            out[axis + offset] = live
            element = axis + offset - (len(result) - target)
            sizes = op.value(1)
            if element >= 0 and sizes is not None and sizes[element] != 1:
                op.size(1, element, live)
        else:
            op.freeze(live, "is broadcast to a larger size")
    if op.constant(0):
        first = len(result) - target
        stretched = [axis for axis in range(first, len(result)) if axis < offset or shape[axis - offset] == 1]
        _fresh(op, 1, {axis: axis - first for axis in stretched}, out)
    op.emit(out)


def _fresh(op: Op, position: int, elements: Mapping[int, int], label: list[IntArray | None]) -> None:
    """Give axes that hold copies of one value atoms of their own, if their sizes are plain numbers."""
    if op.out_infos[0].value is not None:
        return  # its readers may use the values as sizes
    for axis, element in elements.items():
        size = op.out_shape()[axis]
        if size > 1 and op.written(position, element):
            label[axis] = op.pool.allocate(size)
            op.size(position, element, label[axis])


def constant_of_shape(op: Op) -> None:
    """ConstantOfShape: axes whose sizes are plain numbers are free to be removed.

    Exact: axes with a stored number as size, which is rewritten.
    Frozen: axes of a computed size.
    """
    label: list[IntArray | None] = [None] * len(op.out_shape())
    _fresh(op, 0, {axis: axis for axis in range(len(label))}, label)
    op.emit(label)


def tile(op: Op) -> None:
    """Tile repeats the atoms; the repeats themselves stay.

    Exact: every axis; all copies of an index are removed together.
    """
    repeats = op.value(1)
    if repeats is None:
        raise Decline("Tile with repeats computed from data")
    label = op.label(0)
    op.emit([None if live is None else np.tile(live, int(times)) for live, times in zip(label, repeats, strict=True)])


def depth_to_space(op: Op) -> None:
    """DepthToSpace: the b·b channels of one output channel are removed together.

    Exact: channels, as sets of block² that make one output channel.
    Frozen: space.
    """
    label, block = op.label(0), int(op.attr("blocksize"))
    op.freeze_axes(0, (2, 3), "is interleaved with channels")
    live = label[1]
    if live is not None:
        crd = op.attr("mode", b"DCR") in (b"CRD", "CRD")
        blocks = live.reshape(-1, block * block) if crd else live.reshape(block * block, -1).T
        leaders = blocks[:, 0].copy()
        op.tie(blocks.reshape(-1), np.repeat(leaders, block * block))
        live = leaders if len(leaders) > 1 else None
        if live is None:
            op.freeze(leaders, "is the only channel left")
    op.emit((label[0], live, None, None))


def space_to_depth(op: Op) -> None:
    """SpaceToDepth: every channel becomes b·b channels, the offset outermost.

    Exact: channels, with the block² channels made from each.
    Frozen: space.
    """
    label, block = op.label(0), int(op.attr("blocksize"))
    op.freeze_axes(0, (2, 3), "is folded into channels")
    live = label[1]
    op.emit((label[0], None if live is None else np.tile(live, block * block), None, None))


def resize(op: Op) -> None:
    """Resize and Upsample: axes whose size stays keep their atoms.

    Exact: axes that keep their size; it is rewritten.
    Frozen: resized axes.
    """
    shape, result, label = op.shape(0), op.out_shape(), op.label(0)
    for position in range(1, op.count):
        op.value(position)
    axes = [axis % len(shape) for axis in op.attr("axes", range(len(shape)))]
    still = _not_resampled(op, axes)
    out: list[IntArray | None] = []
    for axis, live in enumerate(label):
        if live is not None and shape[axis] == result[axis] and axis in still:
            out.append(live)
            if op.opset >= 11 and op.has(3) and axis in axes:
                op.size(3, axes.index(axis), live)
        else:
            op.freeze(live, "is resized")
            out.append(None)
    op.emit(out)


def _not_resampled(op: Op, axes: list[int]) -> set[int]:
    """Axes that a Resize leaves alone: a factor near 1 may keep the size and still move elements."""
    mode = op.attr("coordinate_transformation_mode", b"half_pixel")
    if mode in _SHIFTING:
        return set()
    still = set(range(len(op.shape(0)))) - set(axes)
    if op.opset >= 11 and op.has(3):
        if op.attr("keep_aspect_ratio_policy", b"stretch") in (b"stretch", "stretch"):
            still |= {axis for axis in axes if op.shape(0)[axis] == op.out_shape()[axis]}
        return still
    scales = op.attr("scales", op.value(2 if op.opset >= 11 else 1))
    if scales is not None:
        still |= {axis for axis, factor in zip(axes, np.ravel(scales), strict=True) if factor == 1}
    return still


def shape_of(op: Op) -> None:
    """Shape and Size read no element; numbers computed from them are corrected when rewriting.

    Exact: every axis; numbers computed from a size are corrected.
    """
    for live in op.label(0):
        op.drop(live)


def generated(op: Op) -> None:
    """Range, EyeLike, random tensors: nothing to couple.

    Frozen: axes that are combined with their result.
    """
    for position in range(op.count):
        op.value(position)
