"""Opsets 7 to 12: attributes that later became inputs, weights listed as graph inputs, old IR versions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from ops.builder import Builder
from ops.oracle import CPU, analyse, draw_units, prune_and_verify
from ops.sample import ints

from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import Session
from onnxcop.verification.difference import TOLERANCE, relative_difference
from onnxcop.verification.masked_model import masked

OPSETS = (7, 8, 9, 10, 11, 12)


def _upsampled(b: Builder, x: str) -> str:
    """Twice the size: scales as an attribute, an input, or after a region of interest; and pooled again."""
    factors = np.array([1, 1, 2, 2], np.float32)
    if b.opset < 9:
        large = b.add("Upsample", [x], mode="nearest", scales=factors.tolist())
    elif b.opset < 11:
        large = b.add("Upsample" if b.opset == 9 else "Resize", [x, b.constant(factors)], mode="nearest")
    else:
        large = b.add("Resize", [x, b.constant(np.zeros(0, np.float32)), b.constant(factors)], mode="nearest")
    return b.add("AveragePool", [b.conv(large, 7, 3)], kernel_shape=[2, 2], strides=[2, 2])


def _sliced(b: Builder, x: str) -> str:
    """The first three channels, and all but them, change places."""
    parts = []
    for start, end in ((3, 2**31 - 1), (0, 3)):
        if b.opset < 10:
            parts.append(b.add("Slice", [x], starts=[start], ends=[end], axes=[1]))
        else:
            parts.append(b.add("Slice", [x, *(b.constant(ints(v)) for v in (start, end, 1))]))
    return b.add("Concat", parts, axis=1)


def _padded(b: Builder, x: str) -> str:
    """Zero channels make up for the difference of a shortcut."""
    width, pads = b.shape(x)[1], [0, 1, 0, 0, 0, 2, 0, 0]
    wide = b.add("Pad", [x], pads=pads) if b.opset < 11 else b.add("Pad", [x, b.constant(ints(*pads))])
    return b.add("Sum", [wide, b.conv(x, width + 3, 3)])


def _clipped(b: Builder, x: str) -> str:
    """A clip and a dropout, bounds and ratio as attributes or inputs."""
    if b.opset < 11:
        x = b.add("Clip", [x], min=-2.0, max=2.0)
    else:
        x = b.add("Clip", [x, b.constant(np.float32(-2)), b.constant(np.float32(2))])
    if b.opset < 12:
        return b.add("Dropout", [x], 2, ratio=0.3)
    return b.add("Dropout", [x, b.constant(np.float32(0.3))], 2)


def _split(b: Builder, x: str) -> str:
    """Halves of attribute sizes; one is normalized, one weighs the other."""
    wide = b.conv(x, 10)
    left, right = b.add_many("Split", [wide], 2, axis=1, split=[5, 5])
    left = b.add("InstanceNormalization", [left, b.weights((5,)), b.weights((5,))])
    return b.conv(b.add("Mul", [left, b.add("PRelu", [right, b.weights((5, 1, 1))])]), 8)


def _squeeze_excite(b: Builder, x: str) -> str:
    """Means by their axes, squeezed and unsqueezed by attributes, through two Gemms."""
    width = b.shape(x)[1]
    mean = b.add("Squeeze", [b.add("ReduceMean", [x], axes=[2, 3])], axes=[2, 3])
    hidden = b.add("Relu", [b.add("Gemm", [mean, b.weights((4, width), width), b.weights((4,))], transB=1)])
    gate = b.add("Sigmoid", [b.add("Gemm", [hidden, b.weights((4, width)), b.weights((width,))])])
    return b.add("Mul", [x, b.add("Unsqueeze", [gate], axes=[2, 3])])


def _by_computed_sizes(b: Builder, x: str) -> str:
    """Shape → Gather → Unsqueeze → Concat → Reshape, the channels' number written in."""
    width = b.shape(x)[1]
    batch = b.unsqueeze(b.add("Gather", [b.add("Shape", [x]), b.constant(np.array(0))], axis=0), [0])
    flat = b.add("Concat", [batch, b.constant(ints(16 * width))], axis=0)
    b.values[flat] = onnx.numpy_helper.from_array(ints(1, 16 * width), flat)
    back = b.add("Concat", [batch, b.constant(ints(width, 4, 4))], axis=0)
    b.values[back] = onnx.numpy_helper.from_array(ints(1, width, 4, 4), back)
    return b.add("Reshape", [b.leaky(b.add("Reshape", [x, flat])), back])


def _transposed(b: Builder, x: str) -> str:
    """A transposed convolution, and a normalization with `spatial`, which old opsets need."""
    up = b.add("ConvTranspose", [x, b.weights((b.shape(x)[1], 6, 2, 2)), b.weights((6,))], strides=[2, 2])
    stored = [b.weights((6,)) for _ in range(3)] + [b.constant(np.ones(6, np.float32))]
    attributes = {"spatial": 1} if b.opset < 9 else {}
    up = b.add("BatchNormalization", [up, *stored], epsilon=1e-4, **attributes)
    return b.conv(b.add("MaxPool", [up], kernel_shape=[2, 2], strides=[2, 2]), 8)


BLOCKS: dict[str, Callable[[Builder, str], str]] = {
    block.__name__[1:]: block
    for block in (
        _upsampled, _sliced, _padded, _clipped, _split, _squeeze_excite, _by_computed_sizes, _transposed,
    )
}  # fmt: skip


def _model(opset: int, style: str, names: list[str]) -> onnx.ModelProto:
    b = Builder(opset, seed=opset, dynamic=True, style=style)
    x = b.leaky(b.norm(b.conv(b.input("x", (1, 3, 4, 4)), 8, 3)))
    for name in names:
        x = BLOCKS[name](b, x)
    pooled = b.add("Flatten", [b.add("GlobalAveragePool", [b.leaky(b.conv(x, 6))])])
    logits = b.add("Gemm", [pooled, b.weights((4, 6)), b.weights((4,))], transB=1)
    model = b.model([b.add("Softmax", [logits], axis=1)])
    model.ir_version = 3 if style == "input" else 4
    onnx.checker.check_model(model, full_check=True)
    return model


# Before opset 9 a Constant node cannot hold the integers of a shape.
@pytest.mark.parametrize(
    ("opset", "style"),
    [(o, style) for o in OPSETS for style in ("input", "initializer", "node") if o >= 9 or style != "node"],
)
def test_all_forms_together(opset: int, style: str) -> None:
    model = _model(opset, style, list(BLOCKS))
    structure = analyse(model)
    assert not structure.coupling.declined, structure.coupling.declined
    prune_and_verify(model, structure, seed=1)
    removed = draw_units(structure, 1.0, seed=2)
    reference, pruned = masked(model, structure, removed), apply(model, structure, removed)
    assert pruned.ir_version == model.ir_version
    assert [(o.domain, o.version) for o in pruned.opset_import] == [("", opset)]
    listed = {value.name: value for value in pruned.graph.input}
    for tensor in pruned.graph.initializer:
        assert (tensor.name in listed) == (style == "input")
        if style == "input":
            declared = [dim.dim_value for dim in listed[tensor.name].type.tensor_type.shape.dim]
            assert declared == list(tensor.dims)
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)}
    expected, found = Session(reference, CPU).run(feeds), Session(pruned, CPU).run(feeds)
    for name, value in expected.items():
        gap = relative_difference(value, found[name])
        assert gap is not None and gap <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("opset", OPSETS)
def test_every_form_can_be_pruned_through(opset: int, name: str) -> None:
    structure = analyse(_model(opset, "input", [name]))
    made = [c.produced for c in structure.coupling.findings.contractions if c.kernel is not None]
    atoms = np.concatenate([atoms for atoms in made[:-1] if atoms is not None])
    assert (structure.units_on(atoms) >= 0).all(), "only the last layer's filters may be frozen"


@pytest.mark.parametrize("opset", [7, 8])
def test_a_normalization_per_element_is_declined(opset: int) -> None:
    """`spatial` 0 has parameters for every pixel, and so no channel axis of one value each."""
    b = Builder(opset, seed=0, dynamic=False)
    x = b.conv(b.input("x", (1, 3, 4, 4)), 6, 3)
    stored = [b.weights((6, 4, 4)) for _ in range(4)]
    y = b.add("BatchNormalization", [x, *stored], spatial=0)
    structure = analyse(b.model([b.add("GlobalAveragePool", [b.conv(b.conv(y, 5), 2)])]))
    assert [reason.text for _, reason in structure.coupling.declined] == [
        "BatchNormalization with parameters for every element"
    ]
    assert len(structure.unit_class) == 5
