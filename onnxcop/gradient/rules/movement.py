"""Gradients of operators that move elements, and of those that pick or scatter them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcop.gradient.builder import INT64, NoGradient, Tensor, concat, padded, zeros
from onnxcop.gradient.node import Node, Vjp
from onnxcop.gradient.rules.broadcast import unbroadcast


def like(g: Tensor, y: Tensor, x: Tensor, *_: Tensor | None, allowzero: int = 0, axis: int = 1) -> Tensor:
    """The same elements in the input's shape: Reshape, Flatten, Squeeze, Unsqueeze."""
    return g.reshape(x.dims())


def transpose(g: Tensor, y: Tensor, x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """The inverse order."""
    order = list(perm) if perm is not None else list(reversed(range(x.rank)))
    return g.transpose([int(i) for i in np.argsort(order)])


def concatenated(g: Tensor, y: Tensor, *inputs: Tensor, axis: int) -> list[Tensor]:
    """Each input gets its part."""
    place = axis % y.rank
    known = [x.sizes[place] for x in inputs]
    if all(isinstance(size, int) for size in known):
        lengths = g.builder.constant(np.array(known, np.int64), INT64)
    else:
        lengths = concat([x.dim(place) for x in inputs], 0)
    return list(g.builder.emit("Split", g, lengths, count=len(inputs), axis=place))


def split(g: Tensor, y: Tensor, x: Tensor, *_: Tensor, node: Node, axis: int = 0, num_outputs: int = 0) -> Tensor:
    """The parts side by side; nothing comes back from those that are not used."""
    parts = []
    for grad, out in zip(node.grads, node.outputs, strict=True):
        if grad is None and out is None:
            raise NoGradient("one of its parts has no name")
        parts.append(grad if grad is not None else out.zeros() if out is not None else g)
    return concat(parts, axis % x.rank)


def sliced(
    g: Tensor, y: Tensor, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None,
    steps: Tensor | None = None, *, node: Node,
) -> Tensor:  # fmt: skip
    """Put elements back to their source positions, axis by axis, with zeros around and between them.

    The places along an axis are found by slicing the numbers from 0 to its size.
    """
    build = g.builder
    named = node.value(axes)
    count = starts.sizes[0]
    if (axes is not None and named is None) or not isinstance(count, int):
        raise NoGradient("its axes are not fixed")
    sliced_axes = [int(axis) % x.rank for axis in (range(count) if named is None else named)]
    step_values = [1] * count if steps is None else node.value(steps)
    for place, axis in enumerate(sliced_axes):
        one = build.ints(place), build.ints(place + 1), build.ints(0)
        numbers = counted(x.dim(axis))
        bounds = [t.op("Slice", *one).cast(numbers) for t in (starts, ends)]
        stride = None if steps is None else steps.op("Slice", *one).cast(numbers)
        taken = numbers.op("Slice", *bounds, build.ints(0), stride)
        if step_values is not None and int(step_values[place]) == 1:
            first = concat([taken, build.ints(0)], 0)  # also if nothing is taken
            before = first.op("Slice", build.ints(0), build.ints(1), build.ints(0))
            after = x.dim(axis) - before - taken.dims()
            g = padded(g, before, after, axis, x.rank - axis - 1)
        else:
            g = scattered(g, taken, axis, x.rank, x.dim(axis))
    return g


def counted(size: Tensor) -> Tensor:
    """The numbers from 0 to a size, int64 [size]."""
    build = size.builder
    scalar = size.op("Squeeze", build.ints(0))
    return build.op("Range", build.constant(0, INT64), scalar, build.constant(1, INT64))


def scattered(g: Tensor, places: Tensor, axis: int, rank: int, size: Tensor) -> Tensor:
    """Elements of `g` added up at places along an axis of a given size.

    Args:
        g: The elements.
        places: Where each of those along the axis goes, int64 [elements].
        axis: The axis.
        rank: Number of axes of `g`.
        size: The size that the axis gets, int64 [1].
    """
    order = [axis, *(a for a in range(rank) if a != axis)]
    front = g.transpose(order)
    rest = front.op("Shape", elem_type=INT64, start=1)
    empty = zeros(concat([size, rest], 0) if rank > 1 else size, g)
    full = empty.op("ScatterND", places.unsqueeze([1]), front, reduction="add")
    return full.transpose([int(i) for i in np.argsort(order)])


def gather(g: Tensor, y: Tensor, x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Every element is added to the one that it was taken from."""
    place = axis % x.rank
    size = x.dim(place)
    raw = indices.reshape([-1])
    picked = (raw + size).op("Mod", size)
    shape = x.op("Shape", elem_type=INT64, end=place) if place else None
    rest = x.op("Shape", elem_type=INT64, start=place + 1) if place + 1 < x.rank else None
    parts = [part for part in (shape, picked.dims(), rest) if part is not None]
    return scattered(g.reshape(concat(parts, 0)), picked, place, x.rank, size)


def gather_elements(g: Tensor, y: Tensor, x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Added up at the indices."""
    return x.zeros().op("ScatterElements", indices, g, axis=axis, reduction="add")


def gather_nd(g: Tensor, y: Tensor, x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Added up at the indices."""
    if batch_dims:
        raise NoGradient("it has batch_dims")
    return x.zeros().op("ScatterND", indices, g, reduction="add")


def scatter_data(
    g: Tensor, y: Tensor, x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """0 where an element was replaced."""
    if reduction == "add":
        return g
    if reduction != "none":
        raise NoGradient(f"its reduction is {reduction}")
    return g.op("ScatterElements", indices, updates.zeros(), axis=axis)


def scatter_updates(
    g: Tensor, y: Tensor, x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """The gradient of what was written: `g` at the places that were written to."""
    if reduction not in ("none", "add"):
        raise NoGradient(f"its reduction is {reduction}")
    return g.op("GatherElements", indices, axis=axis)


def scatter_nd_data(
    g: Tensor, y: Tensor, x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none"
) -> Tensor:
    """0 where an element was replaced."""
    if reduction == "add":
        return g
    if reduction != "none":
        raise NoGradient(f"its reduction is {reduction}")
    return g.op("ScatterND", indices, updates.zeros())


def scatter_nd_updates(
    g: Tensor, y: Tensor, x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none"
) -> Tensor:
    """The gradient of what was written: `g` at the places that were written to."""
    if reduction not in ("none", "add"):
        raise NoGradient(f"its reduction is {reduction}")
    return g.op("GatherND", indices)


def pad(
    g: Tensor, y: Tensor, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *,
    node: Node, mode: str = "constant",
) -> Tensor:  # fmt: skip
    """Constants are cut off; what was copied from inside is added up there.

    Which element a padded one is a copy of is found by padding the numbers from 0 to the axis's size.
    """
    build, named = g.builder, node.value(axes)
    if axes is not None and named is None:
        raise NoGradient("its axes are not fixed")
    places = [int(a) % x.rank for a in (range(x.rank) if named is None else named)]
    if mode == "constant":
        for number, axis in enumerate(places if axes is not None else ()):
            before, after = ((-pads).op("Gather", build.ints(number + k), axis=0) for k in (0, len(places)))
            g = padded(g, before, after, axis, x.rank - axis - 1)
        return g if axes is not None else g.op("Pad", -pads)
    amounts = node.value(pads)
    for number, axis in enumerate(places):
        if amounts is not None and not amounts[number] and not amounts[number + len(places)]:
            continue
        ends = build.ints(number, number + len(places))
        origin = counted(x.dim(axis)).op("Pad", pads.op("Gather", ends, axis=0), mode=mode)
        g = scattered(g, origin, axis, x.rank, x.dim(axis))
    return g


def tile(g: Tensor, y: Tensor, x: Tensor, repeats: Tensor) -> Tensor:
    """The sum over the copies."""
    pairs = concat([repeats.unsqueeze([1]), x.dims().unsqueeze([1])], 1).reshape([-1])
    return g.reshape(pairs).sum(range(0, 2 * x.rank, 2))


def depth_to_space(g: Tensor, y: Tensor, x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """The inverse; of mode CRD, whose inverse is no operator, by moving axes."""
    if mode == "DCR":
        return g.op("SpaceToDepth", blocksize=blocksize)
    b = g.builder.ints(blocksize)
    batch, channels, high, wide = (x.dim(axis) for axis in range(4))
    blocks = concat([batch, channels / g.builder.ints(blocksize**2), high, b, wide, b], 0)
    return g.reshape(blocks).transpose([0, 1, 3, 5, 2, 4]).reshape(x.dims())


def cumulative(g: Tensor, y: Tensor, x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """The same from the other end."""
    return g.op("CumSum", axis, exclusive=exclusive, reverse=1 - reverse)


def top_values(
    g: Tensor, y: Tensor, x: Tensor, k: Tensor, *, node: Node, axis: int = -1, largest: int = 1, sorted: int = 1
) -> Tensor:
    """Put gradients back to the positions of the largest elements."""
    return x.zeros().op("ScatterElements", node.extra(1, INT64), g, axis=axis)


def triangle(g: Tensor, y: Tensor, x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The same triangle."""
    return g.op("Trilu", k, upper=upper)


MOVEMENTS: dict[str, tuple[Vjp | None, ...]] = {
    "Reshape": (like, None),
    "Flatten": (like,),
    "Squeeze": (like, None),
    "Unsqueeze": (like, None),
    "Transpose": (transpose,),
    "Split": (split, None),
    "Slice": (sliced, None, None, None, None),
    "Gather": (gather, None),
    "GatherElements": (gather_elements, None),
    "GatherND": (gather_nd, None),
    "ScatterElements": (scatter_data, None, scatter_updates),
    "ScatterND": (scatter_nd_data, None, scatter_nd_updates),
    "Pad": (pad, None, None, None),
    "Expand": (lambda g, y, x, shape: unbroadcast(g, y.sizes, x), None),
    "Tile": (tile, None),
    "DepthToSpace": (depth_to_space,),
    "SpaceToDepth": (lambda g, y, x, *, blocksize: g.op("DepthToSpace", blocksize=blocksize),),
    "CumSum": (cumulative, None),
    "TopK": (top_values, None),
    "Trilu": (triangle, None),
}
