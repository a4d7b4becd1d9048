"""Blocks whose sizes are computed in the graph: each takes and returns images of dynamic batch and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import numpy_helper

from onnxcop.graph.shapes import evaluate
from ops.builder import Builder
from ops.sample import ints


class SizedBuilder(Builder):
    """A builder that knows the values of all size computations, so that they can be composed freely."""

    def add_many(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Append a node; if all of its inputs are known, its results are known too."""
        names = super().add_many(op, inputs, outputs, **attributes)
        if op != "Shape" and inputs and all(name in self.values for name in inputs):
            known = [numpy_helper.to_array(self.values[name]) for name in inputs]
            for name, value in zip(names, evaluate(self.nodes[-1], known, self.opset) or (), strict=False):
                self.values[name] = numpy_helper.from_array(value, name)
        return names

    def sizes(self, *parts: str | int) -> str:
        """A list of sizes, computed ones by name and plain ones as numbers."""
        named = [self.constant(ints(part)) if isinstance(part, int) else part for part in parts]
        return self.add("Concat", named, axis=0)

    def slice(self, x: str, start: str | int, end: str | int, axis: int) -> str:
        """A slice of one axis whose bounds may be computed."""
        bounds = [self.constant(ints(v)) if isinstance(v, int) else v for v in (start, end)]
        return self.add("Slice", [x, *bounds, self.constant(ints(axis))])


Block = Callable[[SizedBuilder, str], str]


def pixels_as_tokens(b: SizedBuilder, x: str) -> str:
    """Height times width computed, the width of the channels baked."""
    width = b.shape(x)[1]
    height, breadth = b.size_of(x, 2), b.size_of(x, 3)
    flat = b.add("Reshape", [x, b.sizes(b.size_of(x, 0), width, b.add("Mul", [height, breadth]))])
    mixed = b.linear(b.add("Transpose", [flat], perm=[0, 2, 1]), 10)
    back = b.add("Transpose", [b.leaky(mixed)], perm=[0, 2, 1])
    return b.add("Reshape", [back, b.sizes(b.size_of(x, 0), -1, height, breadth)])


def tokens_by_zero(b: SizedBuilder, x: str) -> str:
    """Targets of 0 and -1, and the original's shape to come back to."""
    flat = b.add("Reshape", [x, b.constant(ints(0, 0, -1))])
    return b.add("Reshape", [b.add("Tanh", [flat]), b.add("Shape", [x])])


def gate_expanded(b: SizedBuilder, x: str) -> str:
    """A gate stretched to a computed shape with a baked number of channels."""
    gate = b.add("Sigmoid", [b.conv(b.add("GlobalAveragePool", [x]), b.shape(x)[1])])
    shape = b.sizes(b.size_of(x, 0), b.shape(x)[1], b.size_of(x, 2), b.size_of(x, 3))
    return b.add("Mul", [x, b.add("Expand", [gate, shape])])


def context_tiled(b: SizedBuilder, x: str) -> str:
    """Pooled features repeated over the image, and joined with it."""
    pooled = b.add("GlobalAveragePool", [x])
    tiled = b.add("Tile", [pooled, b.sizes(1, 1, b.size_of(x, 2), b.size_of(x, 3))])
    return b.leaky(b.conv(b.add("Concat", [x, tiled], axis=1), 8))


def halves_by_division(b: SizedBuilder, x: str) -> str:
    """Slices whose bounds are the number of channels over two."""
    half = b.add("Div", [b.size_of(x, 1), b.constant(ints(2))])
    left = b.slice(x, 0, half, 1)
    right = b.slice(x, half, 2**31 - 1, 1)
    return b.add("Concat", [b.leaky(b.conv(right, 6, 3)), left], axis=1)


def scaled_by_root_of_width(b: SizedBuilder, x: str) -> str:
    """Activations over the root of the number of channels, computed from the shape."""
    width = b.add("Cast", [b.size_of(x, 1)], to=1)
    return b.add("Div", [x, b.add("Sqrt", [width])])


def mean_by_division(b: SizedBuilder, x: str) -> str:
    """A mean over channels written as a sum over their number."""
    total = b.add("ReduceSum", [x, b.constant(ints(1))], keepdims=1)
    mean = b.add("Div", [total, b.add("Cast", [b.size_of(x, 1)], to=1)])
    return b.add("Add", [x, mean])


def mean_of_everything(b: SizedBuilder, x: str) -> str:
    """A sum over channels and pixels, over the product of all their numbers."""
    total = b.add("ReduceSum", [x, b.constant(ints(1, 2, 3))], keepdims=1)
    count = b.add("Mul", [b.size_of(x, 1), b.add("Mul", [b.size_of(x, 2), b.size_of(x, 3)])])
    return b.add("Sub", [x, b.add("Div", [total, b.add("Cast", [count], to=1)])])


def flattened_to_a_product(b: SizedBuilder, x: str) -> str:
    """One axis for channels and pixels, its size the product of a baked number and computed ones."""
    height, breadth = b.size_of(x, 2), b.size_of(x, 3)
    area = b.add("Mul", [height, breadth])
    product = b.add("Mul", [b.constant(ints(b.shape(x)[1])), area])
    flat = b.leaky(b.add("Reshape", [x, b.sizes(b.size_of(x, 0), product)]))
    return b.add("Reshape", [flat, b.sizes(b.size_of(x, 0), b.shape(x)[1], height, breadth)])


def numbered_channels(b: SizedBuilder, x: str) -> str:
    """A Range over the channels weighs them."""
    scalar = b.add("Squeeze", [b.size_of(x, 1), b.constant(ints(0))])
    numbers = b.add("Range", [b.constant(np.array(0)), scalar, b.constant(np.array(1))])
    weights = b.add("Unsqueeze", [b.add("Cast", [numbers], to=1), b.constant(ints(1, 2))])
    return b.conv(b.add("Mul", [x, weights]), 7)


def enlarged_to_sizes(b: SizedBuilder, x: str) -> str:
    """Down, and up again to the sizes of the input, the number of channels baked."""
    small = b.conv(x, 9, 3, stride=2)
    sizes = b.sizes(b.size_of(x, 0), 9, b.size_of(x, 2), b.size_of(x, 3))
    return b.add("Resize", [small, "", "", sizes], mode="nearest")


def enlarged_to_another(b: SizedBuilder, x: str) -> str:
    """Up to the size of another tensor, the number of channels computed."""
    small = b.leaky(b.conv(x, 5, 3, stride=2))
    own = b.slice(b.add("Shape", [small]), 0, 2, 0)
    target = b.add("Concat", [own, b.slice(b.add("Shape", [x]), 2, 4, 0)], axis=0)
    large = b.add("Resize", [small, "", "", target], mode="linear")
    return b.add("Concat", [x, large], axis=1)


def zeros_joined(b: SizedBuilder, x: str) -> str:
    """Zero channels of a fixed number, made for the size of the image."""
    shape = b.sizes(b.size_of(x, 0), 3, b.size_of(x, 2), b.size_of(x, 3))
    return b.add("Concat", [x, b.add("ConstantOfShape", [shape])], axis=1)


def padded_to_a_multiple(b: SizedBuilder, x: str) -> str:
    """Padding computed from the size, and cut off again."""
    height, four = b.size_of(x, 2), b.constant(ints(4))
    lacking = b.add("Mod", [b.add("Sub", [four, b.add("Mod", [height, four])]), four])
    wide = b.add("Pad", [x, b.sizes(0, 0, 0, 0, 0, 0, lacking, 0)])
    return b.slice(b.conv(b.leaky(wide), 8, 3), 0, height, 2)


def split_by_division(b: SizedBuilder, x: str) -> str:
    """A Split whose sizes are computed from the number of channels."""
    half = b.add("Div", [b.size_of(x, 1), b.constant(ints(2))])
    rest = b.add("Sub", [b.size_of(x, 1), half])
    left, right = b.add_many("Split", [x, b.sizes(half, rest)], 2, axis=1)
    return b.add("Concat", [right, b.conv(left, 4)], axis=1)


def grouped_statistics(b: SizedBuilder, x: str) -> str:
    """A group normalization as exporters write it, back to the shape of what went in."""
    x = b.conv(x, 8, 3)
    flat = b.add("Reshape", [x, b.constant(ints(0, 2, -1))])
    ones, zeros = b.constant(np.ones(2, np.float32)), b.constant(np.zeros(2, np.float32))
    normal = b.add("Reshape", [b.add("InstanceNormalization", [flat, ones, zeros]), b.add("Shape", [x])])
    return b.add("Mul", [normal, b.weights((8, 1, 1))])


def shuffled(b: SizedBuilder, x: str) -> str:
    """A channel shuffle whose targets are computed, but for the channels."""
    x = b.conv(x, 12, 3)
    rest = [b.size_of(x, 2), b.size_of(x, 3)]
    apart = b.add("Reshape", [x, b.sizes(b.size_of(x, 0), 3, 4, *rest)])
    mixed = b.add("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    return b.add("Reshape", [mixed, b.sizes(b.size_of(x, 0), 12, *rest)])


def heads_over_pixels(b: SizedBuilder, x: str) -> str:
    """Two heads over all pixels, the width of a head computed from that of all."""
    area = b.add("Mul", [b.size_of(x, 2), b.size_of(x, 3)])
    query, key, value = (b.conv(x, 8) for _ in range(3))
    per_head = b.add("Div", [b.size_of(query, 1), b.constant(ints(2))])
    target = b.sizes(b.size_of(x, 0), 2, per_head, area)
    q, k, v = (b.add("Reshape", [part, target]) for part in (query, key, value))
    scores = b.add("MatMul", [b.add("Transpose", [q], perm=[0, 1, 3, 2]), k])
    scale = b.add("Sqrt", [b.add("Cast", [per_head], to=1)])
    weights = b.add("Softmax", [b.add("Div", [scores, scale])], axis=-1)
    mixed = b.add("MatMul", [v, b.add("Transpose", [weights], perm=[0, 1, 3, 2])])
    back = b.sizes(b.size_of(x, 0), -1, b.size_of(x, 2), b.size_of(x, 3))
    return b.add("Add", [x, b.conv(b.add("Reshape", [mixed, back]), b.shape(x)[1])])


BLOCKS: dict[str, Block] = {
    block.__name__: block
    for block in (
        pixels_as_tokens, tokens_by_zero, gate_expanded, context_tiled, halves_by_division,
        scaled_by_root_of_width, mean_by_division, mean_of_everything,
        flattened_to_a_product, numbered_channels, enlarged_to_sizes, enlarged_to_another,
        zeros_joined, padded_to_a_multiple, split_by_division, grouped_statistics, shuffled, heads_over_pixels,
    )
}  # fmt: skip
