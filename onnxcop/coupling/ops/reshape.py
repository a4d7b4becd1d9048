"""Reshape and Flatten, which merge and split axes.

Both shapes are cut into minimal blocks of equal product. Inside a block, one live input axis is spread over the block
and reshaped with numpy, and one output axis is chosen to stay live. Its indices are the slices of the block that hold
the same atoms, and atoms in one slice are tied. Flatten, attention heads, channel shuffle, pixel shuffle and a
GroupNormalization written as InstanceNormalization all follow from this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.op import Decline, Op
from onnxcop.graph.shapes import Shape

_LARGEST_BLOCK = 1 << 25  # elements; a larger block is frozen instead of being spread in memory

Blocks = list[tuple[tuple[int, ...], tuple[int, ...]]]
Way = tuple[int, int, IntArray]  # an axis of the input, one of the output, [size, ...] the atoms in its slices


def reshape(op: Op) -> None:
    """Reshape, with the target as an input or, before opset 5, as an attribute.

    Exact: one axis of every block of axes that merge or split; sizes are rewritten.
    Frozen: other axes of such a block.
    """
    result = _relabel(op, op.shape(0), op.out_shape())
    where: int | str = "shape" if "shape" in op.attributes else 1
    if where == 1:
        _copied(op, result)
    for axis, live in enumerate(result):
        op.size(where, axis, live)
    op.emit(result)


def _copied(op: Op, result: list[IntArray | None]) -> None:
    """A target of 0 copies the input's size: freeze if that axis and the result's differ."""
    target = op.value(1)
    if target is None or op.attr("allowzero", 0):
        return
    for axis in np.flatnonzero(target == 0).tolist():
        before, after = op.label(0)[axis], result[axis]
        if before is None and after is None:
            continue
        if before is None or after is None or not np.array_equal(before, after):
            op.freeze(before, "has its size copied to another axis")
            op.freeze(after, "takes its size from another axis")


def flatten(op: Op) -> None:
    """Flatten to two axes.

    Exact: one axis of every block of axes that merge.
    Frozen: other axes of such a block.
    """
    op.emit(_relabel(op, op.shape(0), op.out_shape()))


def blocks_of(left: Shape, right: Shape) -> Blocks:
    """Cut two shapes of equal product into minimal blocks of equal product, as tuples of axes.

    Axes of size 1 join the block before them, or form a block alone.
    """
    blocks: Blocks = []
    i = j = 0
    while i < len(left) or j < len(right):
        ins: list[int] = []
        outs: list[int] = []
        a = b = 1
        while True:
            if a == b and (ins or outs):
                break
            if (a <= b and i < len(left)) or j >= len(right):
                if i >= len(left):
                    break
                a *= left[i]
                ins.append(i)
                i += 1
            else:
                b *= right[j]
                outs.append(j)
                j += 1
        blocks.append((tuple(ins), tuple(outs)))
    return blocks


def _relabel(op: Op, shape: Shape, result: Shape) -> list[IntArray | None]:
    label = op.label(0)
    out: list[IntArray | None] = [None] * len(result)
    if all(live is None for live in label):
        return out
    if 0 in shape or int(np.prod(shape)) != int(np.prod(result)):
        raise Decline("Reshape of an empty tensor")
    for ins, outs in blocks_of(shape, result):
        live = [axis for axis in ins if label[axis] is not None]
        if not live:
            continue
        wide = [axis for axis in outs if result[axis] > 1]
        if [axis for axis in ins if shape[axis] > 1] == live and len(live) == len(wide) == 1:
            out[wide[0]] = label[live[0]]
            continue
        axis, target, kept = _spread(op, shape, result, ins, outs, live)
        for other in live:
            if other != axis:
                op.freeze(label[other], "is merged with another prunable axis")
        out[target] = kept
    return out


def _spread(
    op: Op, shape: Shape, result: Shape, ins: tuple[int, ...], outs: tuple[int, ...], live: list[int]
) -> tuple[int, int, IntArray]:
    """Choose the axis that stays live inside a block; return it, the output axis, and its label."""
    label = op.label(0)
    dims_in, dims_out = [shape[a] for a in ins], [result[a] for a in outs]
    if int(np.prod(dims_in)) > _LARGEST_BLOCK:
        raise Decline("Reshape of a very large block")
    ways: list[Way] = []
    for axis in live:
        atoms = label[axis]
        if atoms is None:
            continue
        view = [1] * len(ins)
        view[ins.index(axis)] = len(atoms)
        spread = np.broadcast_to(atoms.reshape(view), dims_in).reshape(dims_out)
        for target in outs:
            if result[target] > 1:
                lines = np.moveaxis(spread, outs.index(target), 0).reshape(result[target], -1)
                ways.append((axis, target, lines))
    if not ways:
        raise Decline("Reshape that leaves no axis to prune")
    axis, target, lines = settle(op, ways, np.concatenate([a for a in (label[axis] for axis in live) if a is not None]))
    op.drop(label[axis])
    return axis, target, lines


def settle(op: Op, ways: Sequence[Way], atoms: IntArray) -> tuple[int, int, IntArray]:
    """Choose the axis that stays live if several could, and tie the atoms of each of its slices.

    Args:
        op: The node.
        ways: The options.
        atoms: All atoms that take part.

    Returns:
        The chosen axis of the input, that of the output, and the output axis's atoms.
    """
    # The finest coupling first; among equals the longer axis, then the first one.
    ranked = [(_pieces(lines), -op.shape(0)[axis], axis, target, lines) for axis, target, lines in ways]
    ranked.sort(key=lambda way: (-way[0], *way[1:4]))
    if op.policy == "coarsest":
        ranked.sort(key=lambda way: (way[0] <= 1, *way[:4]))
    _, _, axis, target, lines = ranked[op.choose(len(ranked), atoms)]
    for column in range(1, lines.shape[1]):
        op.tie(lines[:, 0].copy(), lines[:, column].copy())
    return axis, target, lines[:, 0].copy()


def _pieces(lines: IntArray) -> int:
    """How many classes remain once every line's atoms are tied together."""
    _, codes = np.unique(lines, return_inverse=True)
    codes = codes.reshape(lines.shape)
    parent = np.arange(int(codes.max()) + 1 + len(lines))
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.repeat(np.arange(len(lines)) + int(codes.max()) + 1, lines.shape[1])
    graph = coo_array((np.ones(codes.size, np.int8), (rows, codes.reshape(-1))), shape=(len(parent),) * 2)
    return int(connected_components(graph, directed=False)[0])
