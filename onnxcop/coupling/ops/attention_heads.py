"""Attention heads and their dimensions: which of them are live, and which tensors hold them.

If heads and dimensions share one axis, either can be removed, but not both: a choice point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.op import Decline, Op

TOKENS = "is a batch or a sequence"


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Sizes of an attention: query heads, key/value heads, dimensions of a query and of a value head."""

    heads: int
    shared: int
    inner: int
    value: int


@dataclass(frozen=True, slots=True)
class Parts:
    """The live parts of an attention, by the axes of `form`; None for parts that stay."""

    form: HeadLayout
    heads: IntArray | None = None
    shared: IntArray | None = None
    inner: IntArray | None = None
    value: IntArray | None = None

    @property
    def query(self) -> IntArray | None:
        """Atoms of an axis that holds all dimensions of all query heads."""
        return fold(self.heads, self.form.heads, self.inner, self.form.inner)

    @property
    def key(self) -> IntArray | None:
        """Atoms of the keys' folded axis."""
        return fold(self.shared, self.form.shared, self.inner, self.form.inner)

    @property
    def values(self) -> IntArray | None:
        """Atoms of the values' folded axis."""
        return fold(self.shared, self.form.shared, self.value, self.form.value)

    @property
    def result(self) -> IntArray | None:
        """Atoms of the result's folded axis."""
        return fold(self.heads, self.form.heads, self.value, self.form.value)


def fold(outer: IntArray | None, count: int, inner: IntArray | None, size: int) -> IntArray | None:
    """Atoms of an axis of `count` × `size` indices with one live factor."""
    if outer is not None:
        return np.repeat(outer, size)
    return None if inner is None else np.tile(inner, count)


def joined(*labels: IntArray | None) -> IntArray | None:
    """Labels of parts of one axis that are live or rigid together."""
    live = [label for label in labels if label is not None]
    return np.concatenate(live) if len(live) == len(labels) else None


def head_atoms(op: Op, form: HeadLayout, members: bool) -> tuple[IntArray | None, IntArray | None]:
    """Atoms of the query heads and of the key/value heads: whole groups, or some members of each."""
    per = form.heads // form.shared
    if members:
        return np.tile(op.pool.allocate(per), form.shared), None
    if form.shared == 1:
        return None, None
    groups = op.pool.allocate(form.shared)
    return np.repeat(groups, per), groups


def choose_parts(op: Op, form: HeadLayout, folded: IntArray | None, dims: bool) -> Parts:
    """Choose the live part if heads and their dimensions share one axis."""
    if form.shared < 1 or form.heads % form.shared:
        raise Decline(f"{form.heads} query heads over {form.shared} key and value heads")
    kinds = ["groups"] if form.shared > 1 else []
    kinds += ["members"] if form.heads > form.shared else []
    kinds += ["dims"] if dims else []
    if not kinds or folded is None:
        return Parts(form)
    kind = kinds[op.choose(len(kinds), folded)]
    if kind == "dims":
        inner = op.pool.allocate(form.inner) if form.inner > 1 else None
        return Parts(form, inner=inner, value=op.pool.allocate(form.value) if form.value > 1 else None)
    heads, shared = head_atoms(op, form, kind == "members")
    return Parts(form, heads, shared)


def explicit_scale(op: Op, parts: Parts) -> None:
    """Write the original's default scale into the node, because the default follows from the number of dimensions."""
    if not op.attr("scale", 0.0):
        op.pin("scale", 1.0 / float(np.sqrt(parts.form.inner)), parts.inner)


def meet(op: Op, position: int, axis: int, live: IntArray | None) -> None:
    """Tie one axis of an input to its part, unless the input is absent or broadcast; freeze the others."""
    if not op.has(position):
        return
    label, axis = op.label(position), axis % len(op.shape(position))
    if op.shape(position)[axis] > 1 or live is not None:
        op.tie(label[axis], live, "belongs to a head that is never pruned")


def bias_of_heads(op: Op, position: int, heads: IntArray | None) -> None:
    """A bias or mask on the products [batch, heads, from, to], any leading axes left out or of size 1."""
    if not op.has(position):
        return
    shape, label = op.shape(position), op.label(position)
    if len(shape) >= 3 and shape[-3] > 1:
        op.tie(label[-3], heads, "belongs to a head that is never pruned")
    op.freeze_axes(position, [a for a in range(len(shape)) if a != len(shape) - 3], TOKENS)


def cache(op: Op, position: int, parts: Parts, inner: IntArray | None, before: int = 0) -> None:
    """Keys or values of the past, [.., batch, heads, tokens, dimensions] after `before` axes."""
    if op.has(position):
        op.freeze_axes(position, (*range(before + 1), before + 2), TOKENS)
        meet(op, position, before + 1, parts.shared)
        meet(op, position, before + 3, inner)


def freeze_all(op: Op, positions: Sequence[int], why: str) -> None:
    """Freeze all axes of some inputs."""
    for position in positions:
        if op.has(position):
            op.freeze_axes(position, range(len(op.label(position))), why)


def count_products(op: Op, form: HeadLayout, parts: Parts, pairs: float) -> None:
    """Multiply-accumulates of the two products, for `pairs` of a query and a key."""
    heads: IntArray | int = form.heads if parts.heads is None else parts.heads
    op.macs(pairs, heads, form.inner if parts.inner is None else parts.inner)
    op.macs(pairs, heads, form.value if parts.value is None else parts.value)


def side(op: Op, position: int, heads: IntArray | None, inner: IntArray | None, folded: IntArray | None) -> None:
    """Tie queries, keys or values, [n, s, heads · dims] or [n, heads, s, dims], to their parts."""
    if len(op.shape(position)) == 3:
        op.freeze_axes(position, (0, 1), TOKENS)
        meet(op, position, 2, folded)
    else:
        op.freeze_axes(position, (0, 2), TOKENS)
        meet(op, position, 1, heads)
        meet(op, position, 3, inner)


def length(op: Op, position: int) -> int:
    """Number of tokens of queries, keys or values."""
    shape = op.shape(position)
    return shape[2] if len(shape) == 4 else shape[1]


def surroundings(op: Op, parts: Parts, masks: Sequence[int], biases: Sequence[int], pasts: tuple[int, int]) -> None:
    """Masks, biases on the products, past and present keys and values, and the products themselves."""
    freeze_all(op, masks, "is a mask or a length")
    for position in biases:
        bias_of_heads(op, position, parts.heads)
    for offset, (position, inner) in enumerate(zip(pasts, (parts.inner, parts.value), strict=True)):
        cache(op, position, parts, inner)
        op.emit((None, parts.shared, None, inner), 1 + offset)
    op.emit((None, parts.heads, None, None), 3)
