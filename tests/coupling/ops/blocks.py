"""Blocks of convolutional networks: each takes and returns an image tensor (batch, channels, 4, 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ops.builder import Builder
from ops.sample import ints

FORMS = ("zero", "minus", "last", "chain")
Block = Callable[[Builder, str, str], str]


def plain(b: Builder, x: str, form: str) -> str:
    """Convolution, normalization, activation."""
    return b.leaky(b.norm(b.conv(x, b.shape(x)[1] + 2, 3, bias=False)))


def residual(b: Builder, x: str, form: str) -> str:
    """Two convolutions beside an identity."""
    inner = b.leaky(b.norm(b.conv(x, 6, 3)))
    return b.add("Add", [x, b.conv(inner, b.shape(x)[1], 3)])


def projected(b: Builder, x: str, form: str) -> str:
    """Two branches of convolutions that are added."""
    width = b.shape(x)[1]
    return b.leaky(b.add("Add", [b.conv(x, width), b.norm(b.conv(x, width, 3))]))


def dense(b: Builder, x: str, form: str) -> str:
    """A result is joined with its input."""
    first = b.add("Concat", [x, b.conv(x, 3, 3)], axis=1)
    return b.conv(b.add("Concat", [first, b.conv(b.leaky(first), 5)], axis=-3), 8)


def depthwise(b: Builder, x: str, form: str) -> str:
    """Depthwise (with a multiplier of 2), then pointwise."""
    width = b.shape(x)[1]
    deep = b.conv(b.conv(x, width, 3, groups=width), 2 * width, 3, groups=width)
    return b.conv(b.add("Clip", [deep, b.constant(np.float32(-2)), b.constant(np.float32(2))]), width)


def grouped(b: Builder, x: str, form: str) -> str:
    """Convolutions in two groups."""
    return b.conv(b.leaky(b.conv(_even(b, x), 8, 3, groups=2)), 12, groups=2)


def _even(b: Builder, x: str) -> str:
    return x if b.shape(x)[1] % 2 == 0 else b.conv(x, 8)


def split(b: Builder, x: str, form: str) -> str:
    """Channels part ways and meet again."""
    width = b.shape(x)[1]
    equal = form in ("zero", "last")
    sizes = [width // 2, width - width // 2] if equal and width % 2 == 0 else [2, width - 2]
    left, right = b.split(x, sizes, 1, equal=equal and width % 2 == 0)
    return b.add("Concat", [left, b.conv(b.leaky(right), 4), right], axis=1)


def shuffle(b: Builder, x: str, form: str) -> str:
    """A channel shuffle after a grouped convolution."""
    x = b.conv(_even(b, x), 8, groups=2)
    apart = b.reshape(x, [2, 4, 4, 4], form)
    return b.reshape(b.add("Transpose", [apart], perm=[0, 2, 1, 3, 4]), [8, 4, 4], form)


def squeeze_excite(b: Builder, x: str, form: str) -> str:
    """Channels are weighted by what a bottleneck makes of their means."""
    gate = b.leaky(b.conv(b.add("GlobalAveragePool", [x]), 3))
    gate = b.add("Sigmoid", [b.conv(gate, b.shape(x)[1])])
    if form == "chain":
        gate = b.add("Expand", [gate, b.add("Shape", [x])])
    return b.add("Mul", [x, gate])


def pixel_shuffle(b: Builder, x: str, form: str) -> str:
    """Channels become space, by DepthToSpace or by Reshape and Transpose, and space is pooled back."""
    wide = b.conv(x, 20)
    if form == "zero":
        large = b.add("DepthToSpace", [wide], blocksize=2, mode="CRD")
    elif form == "minus":
        large = b.add("DepthToSpace", [wide], blocksize=2)
    else:
        apart = b.reshape(wide, [5, 2, 2, 4, 4], form)
        large = b.reshape(b.add("Transpose", [apart], perm=[0, 1, 4, 2, 5, 3]), [5, 8, 8], form)
    return b.add("MaxPool", [b.conv(large, 6, 3)], kernel_shape=[2, 2], strides=[2, 2])


def focus(b: Builder, x: str, form: str) -> str:
    """Space becomes channels, by SpaceToDepth or by slices in steps of two."""
    if form in ("zero", "last"):
        deep = b.add("SpaceToDepth", [x], blocksize=2)
    else:
        starts = [(0, 0), (1, 0), (0, 1), (1, 1)]
        parts = [
            b.add("Slice", [x, *(b.constant(ints(*v)) for v in (start, (9, 9), (2, 3), (2, 2)))]) for start in starts
        ]
        deep = b.add("Concat", parts, axis=1)
    return b.conv(enlarge(b, deep, form), 7)


def enlarge(b: Builder, x: str, form: str) -> str:
    """Twice the size by nearest neighbours, with scales or with sizes."""
    roi = "" if b.opset >= 13 else b.constant(np.zeros(0, np.float32))
    if form in ("zero", "minus"):
        return b.add("Resize", [x, roi, b.constant(np.array([1, 1, 2, 2], np.float32))], mode="nearest")
    empty = "" if b.opset >= 13 else b.constant(np.zeros(0, np.float32))
    sizes = b.constant(ints(1, b.shape(x)[1], 4, 4))
    if form == "chain" or b.dynamic:
        sizes = b.channel_sizes(x, [b.size_of(x, 0), b.size_of(x, 1), b.constant(ints(4, 4))])
        b.values[sizes] = _numbers(sizes, [1, b.shape(x)[1], 4, 4])
    return b.add("Resize", [x, roi, empty, sizes], mode="nearest")


def _numbers(name: str, values: list[int]) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(ints(*values), name)


def swapped(b: Builder, x: str, form: str) -> str:
    """Two slices of the channels change places."""
    width = b.shape(x)[1]
    ends = (2**31 - 1,) if form in ("zero", "chain") else (width,)
    start = (3 - width,) if form in ("chain", "minus") else (3,)
    head = b.add("Slice", [x, *(b.constant(ints(*v)) for v in ((0,), start, (1,)))])
    tail = b.add("Slice", [x, *(b.constant(ints(*v)) for v in (start, ends, (1,)))])
    return b.add("Concat", [tail, head], axis=1)


def padded(b: Builder, x: str, form: str) -> str:
    """A shortcut without weights: zero channels make up for the difference."""
    width = b.shape(x)[1]
    pads = [0, 1, 0, 0, 0, 2, 0, 0]
    wide = b.add("Pad", [x, b.constant(ints(*pads))])
    return b.add("Add", [wide, b.conv(b.leaky(x), width + 3, 3)])


def channels_last(b: Builder, x: str, form: str) -> str:
    """A pointwise network on transposed images."""
    last = b.add("Transpose", [x], perm=[0, 2, 3, 1])
    hidden = b.add("Tanh", [b.linear(last, 9)])
    return b.add("Transpose", [b.linear(hidden, b.shape(x)[1])], perm=[0, 3, 1, 2])


def attention(b: Builder, x: str, form: str) -> str:
    """Two heads over the pixels, queries, keys and values of one product or of three."""
    tokens = b.add("Transpose", [b.reshape(b.conv(x, 8), [8, 16], form)], perm=[0, 2, 1])
    if form in ("zero", "chain"):
        fused = b.reshape(b.linear(tokens, 24), [16, 3, 2, 4], form)
        apart = b.split(b.add("Transpose", [fused], perm=[2, 0, 3, 1, 4]), [1, 1, 1], 0)
        if b.opset < 13:
            heads = [b.add("Squeeze", [part], axes=[0]) for part in apart]
        else:
            heads = [b.add("Squeeze", [part, b.constant(ints(0))]) for part in apart]
    else:
        heads = [
            b.add("Transpose", [b.reshape(b.linear(tokens, 8), [16, 2, 4], form)], perm=[0, 2, 1, 3]) for _ in range(3)
        ]
    query, key, value = heads
    scores = b.add("MatMul", [query, b.add("Transpose", [key], perm=[0, 1, 3, 2])])
    scores = b.add("Softmax", [b.add("Mul", [scores, b.constant(np.float32(0.5))])], axis=3)
    mixed = b.add("Transpose", [b.add("MatMul", [scores, value])], perm=[0, 2, 1, 3])
    joined = b.add("Add", [tokens, b.linear(b.reshape(mixed, [16, 8], form), 8)])
    return b.reshape(b.add("Transpose", [joined], perm=[0, 2, 1]), [8, 4, 4], form)


def shared(b: Builder, x: str, form: str) -> str:
    """One convolution's weights used twice."""
    width = b.shape(x)[1]
    kernel = b.weights((width, width, 1, 1), width)
    once = b.leaky(b.add("Conv", [x, kernel]))
    return b.add("Add", [b.add("Conv", [once, kernel]), b.conv(once, width)])


def group_normalized(b: Builder, x: str, form: str) -> str:
    """A group normalization as exporters write it, with an InstanceNormalization of the groups."""
    x = b.conv(x, 8)
    flat = b.reshape(x, [2, 64], form)
    ones, zeros = b.constant(np.ones(2, np.float32)), b.constant(np.zeros(2, np.float32))
    normal = b.reshape(b.add("InstanceNormalization", [flat, ones, zeros]), [8, 4, 4], form)
    return b.add("Add", [b.add("Mul", [normal, b.weights((8, 1, 1))]), b.weights((8, 1, 1))])


def picked(b: Builder, x: str, form: str) -> str:
    """Channels in another order, one of them twice."""
    width = b.shape(x)[1]
    order = [*range(width)[::-1], 1 - width]
    return b.add("Gather", [x, b.constant(ints(*order))], axis=1)


def gated(b: Builder, x: str, form: str) -> str:
    """One half of the channels weights the other; slopes and a condition along the channels."""
    wide = b.add("PRelu", [b.conv(x, 10), b.weights((10, 1, 1))])
    value, gate = b.split(wide, [5, 5], 1, equal=True)
    mixed = b.add("Mul", [value, b.add("Sigmoid", [gate])])
    high = b.add("Greater", [mixed, b.weights((1, 5, 1, 1))])
    return b.add("Where", [high, mixed, b.add("Mul", [mixed, b.weights((1, 5, 1, 1))])])


def contracted(b: Builder, x: str, form: str) -> str:
    """An Einsum, then a transposed convolution."""
    width = b.shape(x)[1]
    if b.opset >= 12:
        x = b.add("Einsum", [x, b.weights((6, width), width)], equation="nchw,oc->nohw")
    ins = b.shape(x)[1]
    weights = b.weights((ins, 7, 3, 3), ins * 9)
    return b.add("ConvTranspose", [x, weights, b.weights((7,))], kernel_shape=[3, 3], pads=[1] * 4)


def double_product(b: Builder, x: str, form: str) -> str:
    """Channels against channels: a product of two activations, as in bilinear pooling."""
    left, right = (b.reshape(b.add("Tanh", [b.conv(x, 5)]), [5, 16], form) for _ in range(2))
    right = b.add("Transpose", [right], perm=[0, 2, 1])
    mixed = b.add("MatMul", [b.add("MatMul", [left, right]), left])
    return b.reshape(mixed, [5, 4, 4], form)


BLOCKS: dict[str, Block] = {
    block.__name__: block
    for block in (
        attention, channels_last, contracted, dense, depthwise, double_product, focus, gated,
        group_normalized, grouped, padded, picked, pixel_shuffle, plain, projected, residual, shared,
        shuffle, split, squeeze_excite, swapped,
    )
}  # fmt: skip
