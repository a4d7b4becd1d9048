"""Weights [groups, in, out, taps]: reading and writing are inverse, and agree with the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from small_models import chain, finished, weights

import onnxcop
from onnxcop.analysis.layers import layers_of
from onnxcop.graph.linear import Kernel, StoredLayer, convolution, following_bias, kernel_of, matrix, stored_layer
from onnxcop.graph.traits import MICROSOFT, TRAITS, Trait
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
Array = np.ndarray[Any, Any]


def node(operator: str, **attributes: Any) -> onnx.NodeProto:
    domain = MICROSOFT if operator.startswith("Fused") else ""
    return helper.make_node(operator, ["x", "w", "b"], ["y"], domain=domain, **attributes)


LAYOUTS: dict[str, tuple[onnx.NodeProto, int, Sequence[int], tuple[int, int, int, int]]] = {
    "convolution": (node("Conv"), 1, (6, 4, 3, 2), (1, 4, 6, 6)),
    "of one axis": (node("Conv", group=2), 1, (6, 4, 3), (2, 4, 3, 3)),
    "of three axes": (node("FusedConv"), 1, (6, 4, 3, 2, 2), (1, 4, 6, 12)),
    "grouped": (node("Conv", group=3), 1, (6, 4, 3, 3), (3, 4, 2, 9)),
    "depthwise": (node("FusedConv", group=6), 1, (6, 1, 3, 3), (6, 1, 1, 9)),
    "transposed": (node("ConvTranspose"), 1, (6, 4, 3, 2), (1, 6, 4, 6)),
    "transposed and grouped": (node("ConvTranspose", group=3), 1, (6, 4, 3, 2), (3, 2, 4, 6)),
    "transposed and depthwise": (node("ConvTranspose", group=6), 1, (6, 1, 2), (6, 1, 1, 2)),
    "Gemm": (node("Gemm"), 1, (4, 5), (1, 4, 5, 1)),
    "Gemm, data transposed": (node("Gemm", transA=1, beta=2.0), 1, (4, 5), (1, 4, 5, 1)),
    "Gemm, weights transposed": (node("Gemm", transB=1, alpha=0.3), 1, (4, 5), (1, 5, 4, 1)),
    "Gemm, both": (node("FusedGemm", transA=1, transB=1, alpha=-2.0), 1, (4, 5), (1, 5, 4, 1)),
    "MatMul": (node("MatMul"), 1, (4, 5), (1, 4, 5, 1)),
    "MatMul, weights first": (node("MatMul"), 0, (4, 5), (1, 5, 4, 1)),
    "FusedMatMul": (node("FusedMatMul", transB=1, alpha=0.7), 1, (4, 5), (1, 5, 4, 1)),
    "FusedMatMul, weights first": (node("FusedMatMul", transA=1, transB=1), 0, (4, 5), (1, 4, 5, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_read_is_written_back(name: str) -> None:
    layer, position, shape, sizes = LAYOUTS[name]
    kernel = kernel_of(layer, position)
    assert kernel is not None
    assert kernel.shape(shape) == sizes
    for seed in range(5):
        stored = np.random.default_rng(seed).standard_normal(shape)
        normal = kernel.read(stored)
        assert normal.shape == sizes
        assert np.sort(normal / kernel.scale, axis=None) == pytest.approx(np.sort(stored, axis=None))
        np.testing.assert_allclose(kernel.write(normal, shape), stored, rtol=1e-15)
        other = np.random.default_rng(seed + 9).standard_normal(sizes)
        np.testing.assert_allclose(kernel.read(kernel.write(other, shape)), other, rtol=1e-15)


@pytest.mark.parametrize("kind", ["conv", "deconv"])
def test_channels_are_in_their_groups(kind: Any) -> None:
    stored = np.arange(6 * 4 * 2).reshape(6, 4, 2)
    kernel = Kernel(1, *((1, 0) if kind == "conv" else (0, 1)), groups=3, kind=kind)
    normal = kernel.read(stored)
    for group in range(3):
        own = stored[2 * group : 2 * group + 2]
        np.testing.assert_array_equal(normal[group], own.swapaxes(0, 1) if kind == "conv" else own)
    six, four = np.arange(6), np.arange(4)
    np.testing.assert_array_equal(kernel.by_group(six, 0), six.reshape(3, 2))
    np.testing.assert_array_equal(kernel.by_group(four, 1), [four] * 3)


def test_every_layer_of_the_table_is_described_and_nothing_else() -> None:
    for domain, name in TRAITS:
        extra = {"equation": "abc,cd->abd"} if name == "Einsum" else {}
        found = kernel_of(helper.make_node(name, ["x", "w"], ["y"], domain=domain, **extra))
        assert (found is not None) == bool(TRAITS[domain, name] & Trait.LINEAR)
    assert kernel_of(node("FusedMatMul", transBatchA=1)) is None
    assert kernel_of(node("Gemm"), 0) is None


@pytest.mark.parametrize(("equation", "axes"), [
    ("abc,cd->abd", (0, 1)), ("abc,dc->abd", (1, 0)), ("ab , bc", (0, 1)), ("...b,cb->...c", (1, 0)),
    ("abc,bd->adc", None), ("abc,cd->bad", None), ("abc,cd->adb", None), ("abc,cb->ac", None), ("abc,cde->abde", None),
    ("abc,cd", (0, 1)), ("abc,c->ab", None), ("abc,cd->abcd", None), ("ab,bc,cd->ad", None), ("aac,cd->aad", None),
])  # fmt: skip
def test_an_einsum_over_the_last_axis_is_a_layer(equation: str, axes: tuple[int, int] | None) -> None:
    found = kernel_of(helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation))
    assert (found and (found.in_axis, found.out_axis)) == axes


def test_rules_say_the_same() -> None:
    structure = onnxcop.analyze(chain(), options=CPU).structure
    found = {c.node: c.kernel for c in structure.coupling.findings.contractions}
    nodes = chain().graph.node
    assert {number: kernel_of(nodes[number]) for number in found} == found
    assert len(found) == 3


def where(layer: onnx.NodeProto, after: Sequence[onnx.NodeProto] = (), **sizes: Sequence[int]) -> StoredLayer | None:
    stored = {name: weights(name, size) for name, size in sizes.items()}
    nodes = [layer, *after]
    reads = [name for one in nodes for name in one.input]
    kernel = kernel_of(layer, next(p for p, name in enumerate(layer.input) if name == "w"))
    assert kernel is not None
    return stored_layer(nodes, 0, kernel, stored, reads.count)


def test_the_place_of_weights_and_biases() -> None:
    own = where(node("Conv"), w=(4, 3, 1, 1), b=(4,))
    assert own == StoredLayer(convolution(node("Conv")), "w", "b", "y", 1, plain=True)
    shared = where(node("Conv"), [helper.make_node("Neg", ["b"], ["z"])], w=(4, 3, 1, 1), b=(4,))
    assert shared is not None
    assert (shared.bias, shared.plain) == (None, False)
    one_number = where(node("Gemm"), w=(4, 5), b=(1,))
    assert one_number is not None
    assert (one_number.bias, one_number.plain) == (None, False)
    unused = where(node("Gemm", beta=0.0), w=(4, 5), b=(1,))
    assert unused is not None
    assert (unused.bias, unused.plain) == (None, True)
    active = where(node("FusedConv", activation="Relu"), w=(4, 3, 1, 1), b=(4,))
    assert active is not None
    assert (active.bias, active.plain) == ("b", False)
    assert where(node("Conv"), [helper.make_node("Neg", ["w"], ["z"])], w=(4, 3, 1, 1)) is None
    assert where(node("Gemm", alpha=0.0), w=(4, 5)) is None


def test_the_addition_after_a_product_holds_its_bias() -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    found = where(product, [helper.make_node("Add", ["b", "y"], ["z"])], w=(4, 5), b=(5,))
    assert found == StoredLayer(matrix(product), "w", "b", "z", 2, plain=True)
    scalar = where(product, [helper.make_node("Add", ["b", "y"], ["z"])], w=(4, 5), b=(1,))
    assert scalar == StoredLayer(matrix(product), "w", None, "y", 1, plain=True)
    first = helper.make_node("MatMul", ["w", "x"], ["y"])
    after = helper.make_node("Sum", ["y", "b"], ["z"])
    found = where(first, [after], w=(4, 5), b=(4, 1))
    assert found == StoredLayer(matrix(first, 0), "w", "b", "z", 2, plain=True)
    stored = {"b": weights("b", (4,))}
    assert following_bias(after, "y", stored) == "b"
    assert following_bias(after, "y", stored, -2) is None
    assert following_bias(helper.make_node("Sub", ["y", "b"], ["z"]), "y", stored) is None


def test_statistics_of_flattened_maps_are_by_channel() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv"),
        helper.make_node("Flatten", ["c"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2"], ["y"], "head"),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, ["N", 3, 2, 2])]
    outputs = [helper.make_tensor_value_info("y", 1, ["N", 5])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weights("w1", (6, 3, 1, 1)), weights("w2", (24, 5))])
    analysis = onnxcop.analyze(finished(graph), options=CPU)
    (layer,) = layers_of(analysis.model, analysis.structure)
    stored = np.arange(24.0 * 5).reshape(24, 5)
    normal = layer.read(stored)
    assert normal.shape == (1, 6, 5, 4)
    np.testing.assert_array_equal(normal[0, 2, :, 1], stored[2 * 4 + 1])
    np.testing.assert_array_equal(layer.write(normal, stored.shape), stored)
