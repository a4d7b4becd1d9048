"""Cases for fused attention and rotary embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ops.cases_contraction import _bytes
from ops.draws import Shape
from ops.sample import Array, Sample, floats, positive

Draw = Any
Cases = dict[tuple[str, str], st.SearchStrategy[Sample]]
MICROSOFT = "com.microsoft"


def _wide(size: int) -> int:
    return size if size > 1 else 0


def _folded_units(heads: int, shared: int, inner: int, value: int) -> int:
    """Units if heads and dimensions share one axis: whole heads if there are several."""
    if shared > 1:
        return shared
    return heads if heads > 1 else _wide(inner) + _wide(value)


@st.composite
def _packed_attention(draw: Draw) -> Sample:
    heads, inner, value = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(st.integers(1, 3))
    batch, tokens, width = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(2, 4))
    sizes = [heads * inner, heads * inner, heads * value]
    attributes: dict[str, Any] = {"num_heads": heads}
    if value != inner or draw(st.booleans()):
        attributes["qkv_hidden_sizes"] = sizes
    if draw(st.booleans()):
        attributes["scale"] = 0.7
    if draw(st.booleans()):
        attributes["unidirectional"] = 1
    inputs: tuple[Array | None, ...] = (
        floats((batch, tokens, width)), floats((width, sum(sizes)), 1), floats((sum(sizes),), 2)
    )  # fmt: skip
    if draw(st.booleans()):
        bias = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), tokens, tokens)
        inputs = (*inputs, None, None, floats(bias, 3))
    units = width + _folded_units(heads, heads, inner, value)
    return Sample("Attention", inputs, {0: (2,)}, attributes, units=units, domain=MICROSOFT)


@st.composite
def _quantized_attention(draw: Draw) -> Sample:
    heads, size = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    batch, tokens, width = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(2, 4))
    columns = 3 * heads * size
    per: Shape = (columns,) if draw(st.booleans()) else ()
    weight_zero = (5 + np.arange(columns if per else 1)).astype(np.uint8).reshape(per)
    inputs = (
        _bytes((batch, tokens, width), 0), _bytes((width, columns), 1), floats((columns,), 2),
        np.array(0.05, np.float32), np.asarray(positive(per, 3) * 0.02, np.float32), None, np.array(100, np.uint8),
        weight_zero,
    )  # fmt: skip
    units = width + _wide(heads)
    return Sample("QAttention", inputs, {0: (2,)}, {"num_heads": heads}, units=units, domain=MICROSOFT)


@st.composite
def _multi_head_attention(draw: Draw) -> Sample:
    heads, inner, value = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(st.integers(2, 3))
    batch, tokens, others = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(2, 4))
    attributes: dict[str, Any] = {"num_heads": heads}
    if draw(st.booleans()):
        attributes["scale"] = 0.7
    split = draw(st.booleans())  # keys and values come with an axis of heads, as in cross attention
    if split:
        value = inner
    key: Shape = (batch, heads, others, inner) if split else (batch, others, heads * inner)
    values: Shape = (batch, heads, others, value) if split else (batch, others, heads * value)
    inputs: tuple[Array | None, ...] = (floats((batch, tokens, heads * inner)), floats(key, 1), floats(values, 2))
    live: dict[int, Shape] = {0: (2,), 1: (1,) if split else (2,), 2: (1,) if split else (2,)}
    if split and heads == 1:
        live = {0: (2,)}
    if draw(st.booleans()) and not split:
        inputs = (*inputs, floats((heads * (2 * inner + value),), 3))
    if draw(st.booleans()):
        inputs = (*inputs, *[None] * (5 - len(inputs)), floats((1, heads, tokens, others), 4))
    units = _folded_units(heads, heads, inner, value)
    if split and heads == 1:
        units = 0
    return Sample("MultiHeadAttention", inputs, live, attributes, units=units, domain=MICROSOFT)


@st.composite
def _group_query_attention(draw: Draw) -> Sample:
    shared, per, size = draw(st.integers(1, 3)), draw(st.integers(1, 2)), 16
    heads, tokens, past = shared * per, draw(st.integers(2, 3)), draw(st.integers(0, 2))
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": shared}
    if draw(st.booleans()):
        attributes["scale"] = 0.7
    sides: tuple[Array | None, ...] = (
        floats((1, tokens, heads * size)), floats((1, tokens, shared * size), 1), floats((1, tokens, shared * size), 2)
    )  # fmt: skip
    live: dict[int, Shape] = {0: (2,), 1: (2,), 2: (2,)}
    if draw(st.booleans()):
        sides, live = (floats((1, tokens, (heads + 2 * shared) * size)), None, None), {0: (2,)}
    cache = (1, shared, past, size)
    lengths = (np.array([tokens + past - 1], np.int32), np.array(tokens + past, np.int32))
    inputs = (*sides, floats(cache, 3), floats(cache, 4), *lengths)
    if draw(st.booleans()):
        angles = floats((past + tokens, size // 2), 5)
        inputs = (*inputs, np.cos(angles), np.sin(angles))
        attributes |= {"do_rotary": 1, "rotary_interleaved": draw(st.integers(0, 1))}
    units = shared if shared > 1 else _wide(per)
    return Sample("GroupQueryAttention", inputs, live, attributes, outputs=3, units=units, domain=MICROSOFT)


@st.composite
def _attention(draw: Draw) -> Sample:
    shared, per = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    inner, value, heads = draw(st.integers(2, 3)), draw(st.integers(2, 3)), shared * per
    batch, tokens, others = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(2, 4))
    folded = draw(st.booleans())
    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": shared} if folded else {}
    if draw(st.booleans()):
        attributes["scale"] = 0.7
    if draw(st.booleans()):
        attributes["is_causal"] = 1
    if draw(st.booleans()):
        attributes["softcap"] = 2.0
    if folded:
        found: list[Shape] = [
            (batch, tokens, heads * inner), (batch, others, shared * inner), (batch, others, shared * value),
        ]  # fmt: skip
        live: dict[int, Shape] = dict.fromkeys(range(3), (2,))
        units = _folded_units(heads, shared, inner, value)
    else:
        found = [(batch, heads, tokens, inner), (batch, shared, others, inner), (batch, shared, others, value)]
        live = {0: (1, 3), 1: (1, 3) if shared > 1 else (3,), 2: (1, 3) if shared > 1 else (3,)}
        if heads == 1:
            live[0] = (3,)
        units = inner + value + (shared if shared > 1 else _wide(per))
    inputs: tuple[Array | None, ...] = tuple(floats(shape, seed) for seed, shape in enumerate(found))
    mask = draw(st.sampled_from([None, (tokens, others), (1, heads, tokens, others), (heads, tokens, others)]))
    if mask is not None:
        inputs = (*inputs, floats(mask, 3))
    return Sample("Attention", inputs, live, attributes, draw(st.sampled_from([23, 24])), units=units)


@st.composite
def _rotary(draw: Draw, domain: str) -> Sample:
    batch, tokens, heads = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([4, 6, 8]))
    part = draw(st.sampled_from([size, size - 2])) if size > 4 else size
    folded = draw(st.booleans())
    attributes: dict[str, Any] = {"interleaved": draw(st.integers(0, 1))}
    if part != size:
        attributes["rotary_embedding_dim"] = part
    if folded or part != size:
        attributes["num_heads"] = heads
    shape: Shape = (batch, tokens, heads * size) if folded else (batch, heads, tokens, size)
    angles = floats((tokens + 1, part // 2), 1)
    ids = np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))
    tables = (np.cos(angles), np.sin(angles))
    value = floats(shape)
    inputs: tuple[Array | None, ...] = (value, ids, *tables) if domain else (value, *tables, ids)
    if not domain and draw(st.booleans()):  # tables for every token of every sequence
        inputs = (value, *(table[ids] for table in tables))
    if folded:
        live: dict[int, Shape] = {0: (2,)}
        units = heads if heads > 1 else size // 2 if part == size else 0
    else:
        live = {0: (1, 3) if heads > 1 else (3,)}
        units = _wide(heads) + (size // 2 if part == size else 0)
    opset = 17 if domain else 23
    return Sample("RotaryEmbedding", inputs, live, attributes, opset, units=units, domain=domain)


CASES: Cases = {
    ("", "Attention"): _attention(),
    ("", "RotaryEmbedding"): _rotary(""),
    (MICROSOFT, "Attention"): _packed_attention(),
    (MICROSOFT, "GroupQueryAttention"): _group_query_attention(),
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention(),
    (MICROSOFT, "QAttention"): _quantized_attention(),
    (MICROSOFT, "RotaryEmbedding"): _rotary(MICROSOFT),
}
