"""The masked original of small networks, tensor by tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, finished, weights

import onnxcop
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.graph.io import WeightFile, values_of
from onnxcop.runtime.session import Session
from onnxcop.verification.masked_model import masked

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def units_of(found: Analysis, tensor: str, axis: int) -> np.ndarray[Any, Any]:
    atoms = found.structure.coupling.labels[tensor][axis]
    assert atoms is not None
    return found.structure.units_on(atoms)


def read(model: onnx.ModelProto, node: str, position: int) -> np.ndarray[Any, Any]:
    """The stored tensor that a node reads."""
    name = next(n for n in model.graph.node if n.name == node).input[position]
    return values_of(next(tensor for tensor in model.graph.initializer if tensor.name == name))


@pytest.mark.parametrize("in_file", [False, True])
def test_weights_of_removed_channels_are_zero_where_they_are_summed(
    in_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcop.graph.io._SMALL", 1)
    found = analyze(chain(), options=CPU)
    before = found.model.SerializeToString()
    first, second = units_of(found, "w2", 1), units_of(found, "w2", 0)
    file = WeightFile() if in_file else None
    model = masked(found.model, found.structure, np.array([first[1], first[6], second[3]]), file)
    expected = numpy_helper.to_array(next(t for t in found.model.graph.initializer if t.name == "w2")).copy()
    expected[:, [1, 6]] = 0
    np.testing.assert_array_equal(read(model, "conv2", 1), expected)
    head = numpy_helper.to_array(next(t for t in found.model.graph.initializer if t.name == "w3")).copy()
    head[:, 3] = 0
    np.testing.assert_array_equal(read(model, "head", 1), head)
    np.testing.assert_array_equal(read(model, "conv1", 1), read(found.model, "conv1", 1))
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in found.model.graph.node]
    assert found.model.SerializeToString() == before
    untouched = masked(found.model, found.structure, np.array([second[0]]))
    np.testing.assert_array_equal(read(untouched, "conv2", 1), read(found.model, "conv2", 1))


def products() -> onnx.ModelProto:
    """Queries and keys of two heads, multiplied twice."""
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], "query"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], "key"),
        helper.make_node("Transpose", ["k"], ["kt"], "turned", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["y"], "scores"),
        helper.make_node("MatMul", ["x", "wv"], ["v"], "value"),
        helper.make_node("Transpose", ["v"], ["vt"], "turned_too", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["v", "vt"], ["z"], "squares"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6, 8])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 6, 6]) for name in "yz"]
    stored = [weights(name, (8, 5)) for name in ("wq", "wk", "wv")]
    return finished(helper.make_graph(nodes, "products", [x], results, stored))


def test_one_of_two_activations_is_multiplied_by_zeros_and_ones() -> None:
    found = analyze(products(), options=CPU)
    queries, values = units_of(found, "wq", 1), units_of(found, "wv", 1)
    model = masked(found.model, found.structure, np.array([queries[1], queries[4], values[0]]))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["MatMul", "MatMul", "Transpose", "Mul", "MatMul", "MatMul", "Transpose", "Mul", "MatMul"]
    first, second = (node for node in model.graph.node if node.op_type == "Mul")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored[first.input[1]].tolist() == [[[1, 0, 1, 1, 0]]]
    assert stored[second.input[1]].tolist() == [[[0, 1, 1, 1, 1]]]
    assert stored[first.input[1]].dtype == np.float32
    assert next(node for node in model.graph.node if node.name == "scores").input[0] == first.output[0]
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    wq, wk, wv = (weights(name, (8, 5)) for name in ("wq", "wk", "wv"))
    q, k, v = (x @ numpy_helper.to_array(w) for w in (wq, wk, wv))
    q[..., [1, 4]] = 0
    v[..., 0] = 0
    with Session(model, CPU) as session:
        result = session.run({"x": x})
    np.testing.assert_allclose(result["y"], q @ k.transpose(0, 2, 1), atol=1e-4)
    np.testing.assert_allclose(result["z"], v @ v.transpose(0, 2, 1), atol=1e-4)


@pytest.mark.parametrize("zeros", [[7], [3, 0, 9, 200]])
def test_zero_of_quantized_weights_is_their_zero_point(zeros: list[int]) -> None:
    """One for all output channels, or one for each."""
    rng = np.random.default_rng(0)
    scalar = len(zeros) == 1
    constants = {
        "xs": np.float32(0.1), "xz": np.uint8(128), "w1": rng.integers(0, 255, (8, 6), np.uint8),
        "s1": np.float32(0.02), "z1": np.uint8(120), "ms": np.float32(0.3), "mz": np.uint8(99),
        "w2": rng.integers(0, 255, (6, 4), np.uint8),
        "s2": np.float32(0.02) if scalar else np.full(4, 0.02, np.float32),
        "z2": np.uint8(zeros[0]) if scalar else np.array(zeros, np.uint8),
        "ys": np.float32(0.5), "yz": np.uint8(128),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "quantize"),
        helper.make_node("QLinearMatMul", ["xq", "xs", "xz", "w1", "s1", "z1", "ms", "mz"], ["m"], "one"),
        helper.make_node("QLinearMatMul", ["m", "ms", "mz", "w2", "s2", "z2", "ys", "yz"], ["yq"], "two"),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"], "dequantize"),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    found = analyze(finished(helper.make_graph(nodes, "q", border[:1], border[1:], stored)), options=CPU)
    units = units_of(found, "w2", 0)
    assert (units >= 0).all()
    cut = read(masked(found.model, found.structure, np.array([units[2], units[5]])), "two", 3)
    expected = constants["w2"].copy()
    expected[[2, 5]] = zeros
    np.testing.assert_array_equal(cut, expected)
