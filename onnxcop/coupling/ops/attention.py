"""Operators that compute attention: heads are removed whole, or every head loses the same of its dimensions."""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.attention_heads import (
    TOKENS,
    HeadLayout,
    Parts,
    bias_of_heads,
    cache,
    choose_parts,
    count_products,
    explicit_scale,
    fold,
    freeze_all,
    head_atoms,
    joined,
    length,
    meet,
    side,
    surroundings,
)  # fmt: skip
from onnxcop.coupling.ops.op import Decline, Label, Op
from onnxcop.graph.linear import Kernel


def packed_attention(op: Op) -> None:
    """Attention of onnxruntime: x [n, s, c], w [c, q + k + v], b [q + k + v], mask, past, bias, length.

    Exact: input channels; whole heads, or some dimensions of all heads, for which the scale is
        stored.
    Frozen: batch and sequence; dimensions with a past or a rotary embedding.
    """
    heads = int(op.attr("num_heads"))
    width = op.shape(1)[1]
    sizes = [int(size) for size in op.attr("qkv_hidden_sizes", [])] or [width // 3] * 3
    form = HeadLayout(heads, heads, sizes[0] // heads, sizes[2] // heads)
    if sum(sizes) != width or sizes[0] != sizes[1]:
        raise Decline("attention with weights of an unusual form")
    op.freeze_axes(0, (0, 1), TOKENS)
    weights = op.label(1)[1]
    kernel = Kernel(input=1, in_axis=0, out_axis=1, bias=2) if op.constant(1) else None
    op.contract((0, 2), (1, 0), kernel=kernel, produced=weights)
    cached = op.has(4) or len(op.node.output) > 1
    parts = choose_parts(op, form, weights, not cached and not op.attr("do_rotary", 0))
    folded = joined(parts.query, parts.key, parts.values)
    op.tie(weights, folded, "belongs to heads that are never pruned")
    op.never_empty(parts.query, parts.values)
    if op.has(2):
        op.tie(op.label(2)[0], folded, "belongs to heads that are never pruned")
    if parts.inner is not None:
        explicit_scale(op, parts)
        op.contract((1, 1))
        if op.has(2):
            op.contract((2, 0))
    op.size("num_heads", 0, parts.heads)
    if folded is not None and ("qkv_hidden_sizes" in op.attributes or parts.heads is None):
        op.pin("qkv_hidden_sizes", sizes, folded)
        for element, live in enumerate((parts.query, parts.key, parts.values)):
            op.size("qkv_hidden_sizes", element, live)
    freeze_all(op, (3, 6), "is a mask or a length")
    bias_of_heads(op, 5, parts.heads)
    _packed_results(op, form, parts, 4)


def quantized_attention(op: Op) -> None:
    """QAttention: x [n, s, c], w [c, 3 · heads · dims], b, their scales, mask, their zero points, past.

    Exact: input channels; whole heads; scales, zero points and bias of columns are cut too.
    Frozen: batch and sequence; dimensions of heads; all axes if weights are not constant.
    """
    if not op.constant(1) or any(op.has(p) and op.shape(p) not in ((), (1,)) for p in (3, 6)):
        raise Decline("quantized attention of an unusual form")
    heads, width = int(op.attr("num_heads")), op.shape(1)[1]
    form = HeadLayout(heads, heads, width // 3 // heads, width // 3 // heads)
    op.freeze_axes(0, (0, 1), TOKENS)
    columns = op.label(1)[1]
    op.contract(
        (0, 2),
        (1, 0),
        kernel=Kernel(input=1, in_axis=0, out_axis=1, kind="other", zero=7),
        produced=columns,
    )
    parts = choose_parts(op, form, columns, False)
    folded = joined(parts.query, parts.key, parts.values)
    for position in (1, 2, 4, 7):
        if op.has(position) and op.shape(position) not in ((), (1,)):
            op.tie(op.label(position)[-1], folded, "belongs to heads that are never pruned")
    op.size("num_heads", 0, parts.heads)
    freeze_all(op, (5,), "is a mask or a length")
    _packed_results(op, form, parts, 8)


def _packed_results(op: Op, form: HeadLayout, parts: Parts, past: int) -> None:
    """The cached past, the work, and the outputs of x [n, s, c] times w [c, q + k + v]."""
    cache(op, past, parts, None, before=1)
    batch, tokens, inner = op.shape(0)
    summed, columns = op.label(1)
    op.macs(batch * tokens, inner if summed is None else summed, op.shape(1)[1] if columns is None else columns)
    earlier = op.shape(past)[3] if op.has(past) else 0
    count_products(op, form, parts, float(batch * tokens * (tokens + earlier)))
    op.emit((None, None, parts.result))
    op.emit((None, None, parts.heads, None, None), 1)


def multi_head_attention(op: Op) -> None:
    """MultiHeadAttention of onnxruntime: query, key, value apart or packed, bias, masks, past.

    Exact: whole heads, or some dimensions of all heads, for which the scale is stored.
    Frozen: batch and sequence; dimensions of packed inputs or with a past.
    """
    heads = int(op.attr("num_heads"))
    if len(op.shape(0)) == 5 or (op.has(1) and len(op.shape(1)) == 5):
        _packed_heads(op, heads)
        return
    if not op.has(1) or not op.has(2):
        raise Decline("attention without keys or values")
    values = op.shape(2)
    form = HeadLayout(heads, heads, op.shape(0)[2] // heads, values[3] if len(values) == 4 else values[2] // heads)
    plain = len(op.shape(1)) == 3 and len(values) == 3 and not op.has(6) and len(op.node.output) == 1
    parts = choose_parts(op, form, op.label(0)[2], plain)
    side(op, 0, parts.heads, parts.inner, parts.query)
    side(op, 1, parts.shared, parts.inner, parts.key)
    side(op, 2, parts.shared, parts.value, parts.values)
    if op.has(3):
        folded = joined(parts.query, parts.key, parts.values)
        op.tie(op.label(3)[0], folded, "belongs to heads that are never pruned")
    if parts.inner is not None:
        explicit_scale(op, parts)
        op.contract((0, 2))
        if op.has(3):
            op.contract((3, 0))
    op.size("num_heads", 0, parts.heads)
    surroundings(op, parts, (4, 8, 9), (5,), (6, 7))
    count_products(op, form, parts, float(op.shape(0)[0] * length(op, 0) * length(op, 1)))
    op.emit((None, None, parts.result))


def _packed_heads(op: Op, heads: int) -> None:
    """MultiHeadAttention with queries, keys and values in one tensor [n, s, heads, 3, dims], or keys and values."""
    last = 0 if len(op.shape(0)) == 5 else 1
    size = op.shape(last)[4]
    form = HeadLayout(heads, heads, size, size)
    parts = Parts(form, *head_atoms(op, form, False))
    op.freeze_axes(last, (0, 1, 3, 4), TOKENS)
    meet(op, last, 2, parts.heads)
    if last == 1:
        side(op, 0, parts.heads, None, parts.query)
    if op.has(3):
        meet(op, 3, 0, joined(parts.query, parts.key, parts.values))
    op.size("num_heads", 0, parts.heads)
    surroundings(op, parts, (4, 8, 9), (5,), (6, 7))
    count_products(op, form, parts, float(op.shape(0)[0] * op.shape(0)[1] * op.shape(last)[1]))
    op.emit((None, None, parts.result))


def group_query_attention(op: Op) -> None:
    """GroupQueryAttention of onnxruntime: query, key, value apart or packed, past, lengths, rotation.

    Exact: whole groups of query heads with their key and value head, or equally many members of
        every group.
    Frozen: batch, sequence and the dimensions of heads.
    """
    heads, shared = int(op.attr("num_heads")), int(op.attr("kv_num_heads"))
    if any(op.has(position) for position in range(12, op.count)):
        raise Decline("attention with a quantized cache or normalized queries")
    packed = not op.has(1)
    size = op.shape(0)[2] // (heads + 2 * shared if packed else heads)
    form = HeadLayout(heads, shared, size, size)
    parts = choose_parts(op, form, op.label(0)[2], False)
    if packed:
        _packed_groups(op, form, parts)
    else:
        side(op, 0, parts.heads, None, parts.query)
        side(op, 1, parts.shared, None, parts.key)
        side(op, 2, parts.shared, None, parts.values)
    op.size("num_heads", 0, parts.heads)
    op.size("kv_num_heads", 0, parts.shared)
    surroundings(op, parts, (5, 6, 7, 8, 9), (10,), (3, 4))
    if op.has(11):
        op.tie(op.label(11)[0], parts.heads, "belongs to a head that is never pruned")
    past = op.shape(3)[2] if op.has(3) else 0
    count_products(op, form, parts, float(op.shape(0)[0] * op.shape(0)[1] * (op.shape(0)[1] + past)))
    op.emit((None, None, parts.result))


def _packed_groups(op: Op, form: HeadLayout, parts: Parts) -> None:
    """Queries, keys and values one after the other on one axis."""
    op.freeze_axes(0, (0, 1), TOKENS)
    live = op.label(0)[2]
    if live is None or parts.heads is None:
        meet(op, 0, 2, None)
        return
    queries, keys, values = np.split(live, np.cumsum([form.heads, form.shared]) * form.inner)
    op.drop(live)
    op.never_empty(queries)
    op.tie(queries, parts.query)
    op.tie(keys, parts.key, "belongs to a head that is never pruned")
    op.tie(values, parts.values, "belongs to a head that is never pruned")


def attention(op: Op) -> None:
    """Attention: queries, keys, values [n, s, heads · dims] or [n, heads, s, dims], mask, past, length.

    Exact: whole heads (groups of query heads with their key and value head, or equally many members of
        every group); dimensions of all heads, for which the scale is stored.
    Frozen: batch and sequence; of heads and dimensions on one axis, one of the two.
    """
    q, k, v = op.shape(0), op.shape(1), op.shape(2)
    if not len(q) == len(k) == len(v):
        raise Decline("attention on tensors of different ranks")
    if len(q) == 4:
        form = HeadLayout(q[1], k[1], q[3], v[3])
        parts = _apart(op, form)
    else:
        heads, shared = int(op.attr("q_num_heads")), int(op.attr("kv_num_heads"))
        form = HeadLayout(heads, shared, q[2] // heads, v[2] // shared)
        parts = choose_parts(op, form, op.label(0)[2], True)
    if len(q) == 3:
        op.size("q_num_heads", 0, parts.heads)
        op.size("kv_num_heads", 0, parts.shared)
    side(op, 0, parts.heads, parts.inner, parts.query)
    side(op, 1, parts.shared, parts.inner, parts.key)
    side(op, 2, parts.shared, parts.value, parts.values)
    if parts.inner is not None:
        explicit_scale(op, parts)
        op.contract((0, len(q) - 1))
    surroundings(op, parts, (6,), (3,), (4, 5))
    past = op.shape(4)[2] if op.has(4) else 0
    count_products(op, form, parts, float(q[0] * length(op, 0) * (length(op, 1) + past)))
    result: Label = (None, None, parts.result)
    op.emit((None, parts.heads, None, parts.value) if len(q) == 4 else result)


def _apart(op: Op, form: HeadLayout) -> Parts:
    """Heads and dimensions on separate axes: both are live."""
    inner = op.pool.allocate(form.inner) if form.inner > 1 else None
    value = op.pool.allocate(form.value) if form.value > 1 else None
    atoms = op.label(0)[1]
    whole = choose_parts(op, form, atoms, False)
    return Parts(form=form, heads=whole.heads, shared=whole.shared, inner=inner, value=value)


def rotary_embedding(op: Op) -> None:
    """RotaryEmbedding: x [n, s, heads · dims] or [n, heads, s, dims], with tables of cosines and sines.

    Exact: whole heads; pairs of dimensions that rotate together, if all dimensions of a head do.
    Frozen: batch and sequence; dimensions if only some of a head rotate.
    """
    own = op.node.domain not in ("", "ai.onnx")
    tables, ids = ((2, 3), 1) if own else ((1, 2), 3)
    freeze_all(op, (ids,), "holds positions")
    shape, label = op.shape(0), op.label(0)
    table = 2 * op.shape(tables[0])[-1]
    partial = int(op.attr("rotary_embedding_dim", 0))
    count = shape[1] if len(shape) == 4 else int(op.attr("num_heads", 0)) or shape[2] // table
    size = shape[3] if len(shape) == 4 else shape[2] // count
    turns = partial in (0, size) and table == size and size > 2
    heads, pairs = _turned(op, len(shape), label, count, turns, size)
    dims = None
    if pairs is not None:
        dims = np.repeat(pairs, 2) if op.attr("interleaved", 0) else np.tile(pairs, 2)
    side(op, 0, heads, dims, fold(heads, count, dims, size))
    for position in tables:
        op.freeze_axes(position, range(len(op.label(position)) - 1), "holds positions")
        op.tie(op.label(position)[-1], pairs, "rotates dimensions that are never pruned")
    if len(shape) == 3 and op.attr("num_heads", 0):
        op.size("num_heads", 0, heads)
    if len(shape) == 4:
        op.emit((None, heads, None, dims))
    else:
        op.emit((None, None, fold(heads, count, dims, size)))


def _turned(
    op: Op, rank: int, label: Label, count: int, turns: bool, size: int
) -> tuple[IntArray | None, IntArray | None]:
    """Atoms of the heads and of the pairs of dimensions, whichever are live."""
    if rank == 4:
        heads = op.pool.allocate(count) if count > 1 else None
        return heads, op.pool.allocate(size // 2) if turns else None
    kinds = (["heads"] if count > 1 else []) + (["pairs"] if turns else [])
    if not kinds or label[2] is None:
        return None, None
    if kinds[op.choose(len(kinds), label[2])] == "heads":
        return op.pool.allocate(count), None
    return None, op.pool.allocate(size // 2)
