"""Small transformers that tests build for themselves, written as exporters write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Net:
    """A graph under construction; tensors are called by name, weights are seeded.

    Args:
        seed: Seed of the weights.
        opset: Opset of ONNX's own operators.
    """

    def __init__(self, seed: int = 0, opset: int = 17) -> None:
        self.rng, self.opset = np.random.default_rng(seed), opset
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Make a tensor a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """A stored tensor."""
        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weights(self, *shape: int, scale: float | None = None) -> str:
        """Random weights that keep activations near 1."""
        scale = shape[0] ** -0.5 if scale is None else scale
        return self.constant(self.rng.standard_normal(shape) * scale)

    def add(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Append a node; returns its first output, the others end in _1, _2 …"""
        name = f"{op.lower()}_{len(self.nodes)}"
        names = [name, *(f"{name}_{number}" for number in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, f"node_{name}", domain=domain, **attributes))
        return name

    def linear(self, x: str, ins: int, outs: int) -> str:
        """A matrix product with a bias, as exporters write nn.Linear on three axes."""
        return self.add("Add", self.weights(outs, scale=0.3), self.add("MatMul", x, self.weights(ins, outs)))

    def norm(self, x: str, width: int) -> str:
        """A layer normalization."""
        scale = self.constant(1 + 0.2 * self.rng.standard_normal(width))
        return self.add("LayerNormalization", x, scale, self.weights(width, scale=0.2), axis=-1, epsilon=1e-5)

    def gelu(self, x: str) -> str:
        """GELU by the error function."""
        half = self.add("Div", x, self.constant(np.sqrt(2.0)))
        grown = self.add("Add", self.add("Erf", half), self.constant(1.0))
        return self.add("Mul", self.add("Mul", x, grown), self.constant(0.5))

    def ints(self, *values: int) -> str:
        """A vector of sizes."""
        return self.constant(values, np.int64)

    def heads(self, x: str, count: int, size: int, order: Sequence[int] = (0, 2, 1, 3)) -> str:
        """Split the last of three axes into heads and move them forward."""
        return self.add("Transpose", self.add("Reshape", x, self.ints(0, 0, count, size)), perm=list(order))

    def merged(self, x: str, width: int) -> str:
        """Undo `heads`."""
        return self.add("Reshape", self.add("Transpose", x, perm=[0, 2, 1, 3]), self.ints(0, 0, width))

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(self.nodes, "transformer", self.inputs, self.outputs, self.stored)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        used = {node.domain for node in self.nodes}
        return helper.make_model(graph, opset_imports=[o for o in opsets if o.domain in used], ir_version=10)


def bert(width: int = 32, heads: int = 4, hidden: int = 48, layers: int = 2, tokens: int = 6) -> onnx.ModelProto:
    """A BERT encoder as PyTorch's exporter writes it: ids and a mask in, the first token's classes out."""
    net, size = Net(), width // heads
    ids = net.input("input_ids", ["batch", tokens], TensorProto.INT64)
    mask = net.input("attention_mask", ["batch", tokens], TensorProto.INT64)
    kinds = net.input("token_type_ids", ["batch", tokens], TensorProto.INT64)
    x = net.add("Gather", net.weights(11, width, scale=1.0), ids, axis=0)
    x = net.add("Add", x, net.add("Gather", net.weights(2, width, scale=1.0), kinds, axis=0))
    places = net.constant([range(tokens)], np.int64)
    x = net.add("Add", x, net.add("Gather", net.weights(16, width, scale=1.0), places, axis=0))
    x = net.norm(x, width)
    wide = net.add("Unsqueeze", net.add("Unsqueeze", mask, net.ints(1)), net.ints(2))
    absent = net.add("Sub", net.constant(1.0), net.add("Cast", wide, to=TensorProto.FLOAT))
    bias = net.add("Mul", absent, net.constant(-10000.0))
    for _ in range(layers):
        q = net.heads(net.linear(x, width, width), heads, size)
        k = net.heads(net.linear(x, width, width), heads, size, (0, 2, 3, 1))
        v = net.heads(net.linear(x, width, width), heads, size)
        scores = net.add("Div", net.add("MatMul", q, k), net.constant(np.sqrt(size)))
        shares = net.add("Softmax", net.add("Add", scores, bias), axis=-1)
        mixed = net.merged(net.add("MatMul", shares, v), width)
        x = net.norm(net.add("Add", net.linear(mixed, width, width), x), width)
        inner = net.gelu(net.linear(x, width, hidden))
        x = net.norm(net.add("Add", net.linear(inner, hidden, width), x), width)
    first = net.add("Gather", x, net.constant(0, np.int64), axis=1)
    pooled = net.add("Tanh", net.add("Gemm", first, net.weights(width, width), net.weights(width, scale=0.3)))
    net.output(net.add("Gemm", pooled, net.weights(width, 3)), ["batch", 3])
    return net.model()


def _attended(net: Net, q: str, k: str, v: str, size: int, bias: str = "") -> str:
    """softmax(q kᵀ / √size + bias) v on [.., heads, tokens, dims]; k comes transposed."""
    scores = net.add("Mul", net.add("MatMul", q, k), net.constant(size**-0.5))
    if bias:
        scores = net.add("Add", scores, bias)
    return net.add("MatMul", net.add("Softmax", scores, axis=-1), v)


def _head(net: Net, x: str, width: int) -> onnx.ModelProto:
    """Three outputs for every token."""
    net.output(net.linear(net.norm(x, width), width, 3), ["batch", "tokens", 3])
    return net.model()


def vit(split: str = "gather", width: int = 24, heads: int = 3) -> onnx.ModelProto:
    """A vision transformer with a class token and one matrix for queries, keys and values.

    Args:
        split: How the three come apart: by "gather", "split" and Squeeze, or "slice" of the last axis.
        width: Width of the residual stream.
        heads: Number of heads.
    """
    net, size = Net(), width // heads
    x = net.input("x", ["batch", 3, 8, 8])
    x = net.add(
        "Conv", x, net.weights(width, 3, 4, 4, scale=0.2), net.weights(width), kernel_shape=[4] * 2, strides=[4] * 2
    )
    x = net.add("Transpose", net.add("Reshape", x, net.ints(0, 0, -1)), perm=[0, 2, 1])
    batch = net.add("Gather", net.add("Shape", x), net.ints(0), axis=0)
    shape = net.add("Concat", batch, net.ints(-1, -1), axis=0)
    token = net.add(
        "Expand",
        net.weights(1, 1, width),
        net.add("Where", net.add("Equal", shape, net.ints(-1, -1, -1)), net.ints(1, 1, 1), shape),
    )
    x = net.add("Add", net.add("Concat", token, x, axis=1), net.weights(1, 5, width, scale=0.5))
    for _ in range(2):
        y = net.linear(net.norm(x, width), width, 3 * width)
        q, k, v = _three(net, y, split, heads, size)
        x = net.add("Add", x, net.linear(net.merged(_attended(net, q, k, v, size), width), width, width))
        inner = net.gelu(net.linear(net.norm(x, width), width, 2 * width))
        x = net.add("Add", x, net.linear(inner, 2 * width, width))
    first = net.add("Gather", net.norm(x, width), net.constant(0, np.int64), axis=1)
    net.output(net.add("Gemm", first, net.weights(width, 3)), ["batch", 3])
    return net.model()


def _three(net: Net, y: str, split: str, heads: int, size: int) -> tuple[str, str, str]:
    """Queries, transposed keys and values from one tensor [batch, tokens, 3 · heads · size]."""
    if split == "slice":
        width, parts = heads * size, []
        for place in range(3):
            bounds = net.ints(place * width), net.ints((place + 1) * width), net.ints(2)
            parts.append(net.add("Slice", y, *bounds))
        q, k, v = parts
        return net.heads(q, heads, size), net.heads(k, heads, size, (0, 2, 3, 1)), net.heads(v, heads, size)
    y = net.add("Transpose", net.add("Reshape", y, net.ints(0, 0, 3, heads, size)), perm=[2, 0, 3, 1, 4])
    if split == "split":
        part = net.add("Split", y, net.ints(1, 1, 1), outputs=3, axis=0)
        q, k, v = (net.add("Squeeze", name, net.ints(0)) for name in (part, f"{part}_1", f"{part}_2"))
    else:
        q, k, v = (net.add("Gather", y, net.constant(place, np.int64), axis=0) for place in range(3))
    return q, net.add("Transpose", k, perm=[0, 1, 3, 2]), v


def grouped(repeat: str = "expand", groups: int = 2, per: int = 3, size: int = 8) -> onnx.ModelProto:
    """Grouped-query attention whose keys and values are repeated for the members of a group.

    Args:
        repeat: By "expand" of an axis of its own, by "tile" of one, or by "gather" of the heads.
        groups: Number of key and value heads.
        per: Query heads per group.
        size: Dimensions of a head.
    """
    net, heads, tokens = Net(), groups * per, 5
    width = heads * size
    x = net.linear(net.input("x", ["batch", tokens, 6]), 6, width)
    y = net.norm(x, width)
    sides = [net.heads(net.linear(y, width, groups * size), groups, size) for _ in range(2)]
    for place, side in enumerate(sides):
        if repeat == "gather":
            index = net.constant(np.repeat(np.arange(groups), per), np.int64)
            sides[place] = net.add("Gather", side, index, axis=1)
            continue
        wide = net.add("Unsqueeze", side, net.ints(2))
        op, counts = ("Expand", (1, groups, per, tokens, size)) if repeat == "expand" else ("Tile", (1, 1, per, 1, 1))
        sides[place] = net.add("Reshape", net.add(op, wide, net.ints(*counts)), net.ints(0, heads, tokens, size))
    keys = net.add("Transpose", sides[0], perm=[0, 1, 3, 2])
    mixed = _attended(net, net.heads(net.linear(y, width, width), heads, size), keys, sides[1], size)
    return _head(net, net.add("Add", x, net.linear(net.merged(mixed, width), width, width)), width)


def rotary(cosines: str = "made", pairs: str = "halves", heads: int = 4, size: int = 8) -> onnx.ModelProto:
    """Attention with a rotary embedding of queries and keys.

    Args:
        cosines: Whether they are "made" of fed positions and stored frequencies, or "fed".
        pairs: Which dimensions turn together: those of the two "halves" or "neighbours".
        heads: Number of heads.
        size: Dimensions of a head.
    """
    net, tokens, width, half = Net(), 5, heads * size, size // 2
    x = net.linear(net.input("x", ["batch", tokens, 6]), 6, width)
    if cosines == "fed":
        tables = [net.input(name, ["batch", 1, tokens, size]) for name in ("cosines", "sines")]
    else:
        places = net.add("Unsqueeze", net.input("places", ["batch", 1, tokens]), net.ints(-1))
        angles = net.add("Mul", places, net.constant(0.5 ** np.arange(half)))
        angles = _paired(net, angles, angles, pairs)
        tables = [net.add("Cos", angles), net.add("Sin", angles)]
    rotated = []
    for side in (net.heads(net.linear(x, width, width), heads, size) for _ in range(2)):
        if pairs == "halves":
            front = net.add("Slice", side, net.ints(0), net.ints(half), net.ints(3))
            back = net.add("Slice", side, net.ints(half), net.ints(2**63 - 1), net.ints(3))
        else:
            front, back = (
                net.add("Slice", side, net.ints(first), net.ints(2**63 - 1), net.ints(3), net.ints(2))
                for first in range(2)
            )
        across = net.add("Mul", _paired(net, net.add("Neg", back), front, pairs), tables[1])
        rotated.append(net.add("Add", net.add("Mul", side, tables[0]), across))
    v = net.heads(net.linear(x, width, width), heads, size)
    mixed = _attended(net, rotated[0], net.add("Transpose", rotated[1], perm=[0, 1, 3, 2]), v, size)
    return _head(net, net.add("Add", x, net.linear(net.merged(mixed, width), width, width)), width)


def _paired(net: Net, one: str, other: str, pairs: str) -> str:
    """Tensors of half the dimensions, one after the other or element by element."""
    if pairs == "halves":
        return net.add("Concat", one, other, axis=-1)
    stacked = net.add("Concat", *(net.add("Unsqueeze", half, net.ints(-1)) for half in (one, other)), axis=-1)
    return net.add("Reshape", stacked, net.ints(0, 0, 0, -1))


def swin(width: int = 12, heads: int = 3) -> onnx.ModelProto:
    """Attention in shifted windows with a table of relative positions, then the merging of patches."""
    net, size, side, window = Net(), width // heads, 4, 2
    x = net.input("x", ["batch", 3, side, side])
    x = net.add(
        "Transpose", net.add("Conv", x, net.weights(width, 3, 1, 1, scale=0.5), net.weights(width)), perm=[0, 2, 3, 1]
    )
    y = net.norm(x, width)
    for axis in (1, 2):  # a roll by one
        tail = net.add("Slice", y, net.ints(1), net.ints(side), net.ints(axis))
        y = net.add("Concat", tail, net.add("Slice", y, net.ints(0), net.ints(1), net.ints(axis)), axis=axis)
    blocks = side // window
    y = net.add("Reshape", y, net.ints(-1, blocks, window, blocks, window, width))
    y = net.add("Reshape", net.add("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), net.ints(-1, window * window, width))
    q, k, v = _three(net, net.linear(y, width, 3 * width), "gather", heads, size)
    places = net.constant(np.arange(16) % 9, np.int64)
    table = net.add("Gather", net.weights(9, heads, scale=1.0), places, axis=0)
    table = net.add("Transpose", net.add("Reshape", table, net.ints(4, 4, heads)), perm=[2, 0, 1])
    mixed = _attended(net, q, k, v, size, net.add("Unsqueeze", table, net.ints(0)))
    y = net.linear(net.merged(mixed, width), width, width)
    y = net.add("Reshape", y, net.ints(-1, blocks, blocks, window, window, width))
    y = net.add("Reshape", net.add("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), net.ints(-1, side, side, width))
    x = net.add("Add", x, y)
    y = net.add("Reshape", x, net.ints(-1, blocks, 2, blocks, 2, width))
    y = net.add("Reshape", net.add("Transpose", y, perm=[0, 1, 3, 4, 2, 5]), net.ints(-1, blocks * blocks, 4 * width))
    return _head(net, net.add("MatMul", net.norm(y, 4 * width), net.weights(4 * width, 2 * width)), 2 * width)


def segformer(width: int = 16, heads: int = 2) -> onnx.ModelProto:
    """Attention whose keys and values come from a strided convolution of the tokens, and a mixing MLP."""
    net, size, side = Net(), width // heads, 4
    x = net.input("x", ["batch", 3, side, side])
    x = net.add("Conv", x, net.weights(width, 3, 3, 3, scale=0.3), net.weights(width), pads=[1] * 4)
    x = net.add("Transpose", net.add("Reshape", x, net.ints(0, 0, -1)), perm=[0, 2, 1])
    y = net.norm(x, width)
    z = net.add("Reshape", net.add("Transpose", y, perm=[0, 2, 1]), net.ints(0, width, side, side))
    z = net.add("Conv", z, net.weights(width, width, 2, 2, scale=0.2), net.weights(width), strides=[2, 2])
    z = net.norm(net.add("Transpose", net.add("Reshape", z, net.ints(0, width, -1)), perm=[0, 2, 1]), width)
    q = net.heads(net.linear(y, width, width), heads, size)
    k = net.heads(net.linear(z, width, width), heads, size, (0, 2, 3, 1))
    v = net.heads(net.linear(z, width, width), heads, size)
    x = net.add("Add", x, net.linear(net.merged(_attended(net, q, k, v, size), width), width, width))
    y, inner = net.norm(x, width), 24
    y = net.add(
        "Reshape", net.add("Transpose", net.linear(y, width, inner), perm=[0, 2, 1]), net.ints(0, inner, side, side)
    )
    y = net.add("Conv", y, net.weights(inner, 1, 3, 3, scale=0.4), net.weights(inner), pads=[1] * 4, group=inner)
    y = net.gelu(net.add("Transpose", net.add("Reshape", y, net.ints(0, inner, -1)), perm=[0, 2, 1]))
    return _head(net, net.add("Add", x, net.linear(y, inner, width)), width)


def mobilevit(width: int = 12, heads: int = 3) -> onnx.ModelProto:
    """Patches of an image unfolded into sequences, one for each position in a patch, and folded back."""
    net, size, side, channels = Net(), width // heads, 4, 10
    picture = net.input("x", ["batch", 3, side, side])
    local = net.add("Conv", picture, net.weights(channels, 3, 3, 3, scale=0.3), net.weights(channels), pads=[1] * 4)
    x = net.add("Conv", net.add("Relu", local), net.weights(width, channels, 1, 1, scale=0.3))
    half = side // 2
    x = net.add("Transpose", net.add("Reshape", x, net.ints(-1, 2, half, 2)), perm=[0, 2, 1, 3])
    x = net.add("Transpose", net.add("Reshape", x, net.ints(-1, width, half * half, 4)), perm=[0, 3, 2, 1])
    x = net.add("Reshape", x, net.ints(-1, half * half, width))
    q, k, v = _three(net, net.linear(net.norm(x, width), width, 3 * width), "gather", heads, size)
    x = net.add("Add", x, net.linear(net.merged(_attended(net, q, k, v, size), width), width, width))
    x = net.add("Add", x, net.linear(net.gelu(net.linear(net.norm(x, width), width, 20)), 20, width))
    x = net.norm(x, width)
    x = net.add("Transpose", net.add("Reshape", x, net.ints(-1, 4, half * half, width)), perm=[0, 3, 2, 1])
    x = net.add("Transpose", net.add("Reshape", x, net.ints(-1, half, 2, 2)), perm=[0, 2, 1, 3])
    x = net.add("Reshape", x, net.ints(-1, width, side, side))
    x = net.add("Conv", x, net.weights(channels, width, 1, 1, scale=0.3))
    x = net.add("Concat", local, x, axis=1)
    x = net.add("Conv", x, net.weights(7, 2 * channels, 3, 3, scale=0.2), pads=[1] * 4)
    x = net.add("Flatten", net.add("GlobalAveragePool", net.add("Relu", x)))
    net.output(net.add("Gemm", x, net.weights(7, 3)), ["batch", 3])
    return net.model()


def edgenext(width: int = 16, heads: int = 4) -> onnx.ModelProto:
    """Convolutions on split channels in cascade, then attention between channels (not tokens)."""
    net, size, side = Net(), width // heads, 4
    x = net.input("x", ["batch", 3, side, side])
    x = net.add("Conv", x, net.weights(width, 3, 1, 1, scale=0.5), net.weights(width))
    part = net.add("Split", x, net.ints(width // 2, width // 2), outputs=2, axis=1)
    depth = {"pads": [1] * 4, "group": width // 2}
    one = net.add("Conv", part, net.weights(width // 2, 1, 3, 3, scale=0.4), **depth)
    y = net.add("Concat", one, net.add("Add", one, f"{part}_1"), axis=1)
    y = net.add("Transpose", net.add("Reshape", y, net.ints(0, 0, -1)), perm=[0, 2, 1])
    z = net.add("Reshape", net.linear(net.norm(y, width), width, 3 * width), net.ints(0, 0, 3, heads, size))
    z = net.add("Transpose", z, perm=[2, 0, 3, 4, 1])
    q, k, v = (net.add("Gather", z, net.constant(place, np.int64), axis=0) for place in range(3))
    q, k = (net.add("Div", t, net.add("ReduceL2", t, axes=[-1], keepdims=1)) for t in (q, k))
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.add("Mul", scores, net.constant(1 + np.arange(heads).reshape(heads, 1, 1)))
    mixed = net.add("MatMul", net.add("Softmax", scores, axis=-1), v)
    mixed = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 3, 1, 2]), net.ints(0, 0, width))
    y = net.add("Add", y, net.add("Mul", net.linear(mixed, width, width), net.weights(width, scale=1.0)))
    inner = net.gelu(net.linear(net.norm(y, width), width, 20))
    return _head(net, net.add("Add", y, net.linear(inner, 20, width)), width)
