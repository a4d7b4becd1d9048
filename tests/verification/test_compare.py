"""Comparison of pruned models with their masked original: faults are visible, noise is not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcop
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.dequantize import rounds, unrounded
from onnxcop.verification.difference import TOLERANCE, comparable_outputs, difference, relative_difference
from onnxcop.verification.masked_model import masked
from onnxcop.verification.verify import verify

CPU = EngineOptions("cpu", threads=1)
BIG = np.float32(1e6)
X = np.random.default_rng(7).standard_normal((3, 6)).astype(np.float32)


def _model(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], output: tuple[str, list[int]]
) -> onnx.ModelProto:
    """A graph from `x` [3, 6] to one float output."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 6])],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _quantized(between: list[onnx.NodeProto], start: str, end: str) -> onnx.ModelProto:
    """x @ a, quantized, `between`, dequantized, @ b; the weights of b are quantized too."""
    node = helper.make_node
    return _model(
        [
            node("MatMul", ["x", "a"], ["h"]),
            node("QuantizeLinear", ["h", "s", "z"], [start]),
            *between,
            node("DequantizeLinear", [end, "s", "z"], ["back"]),
            node("DequantizeLinear", ["bq", "s", "z"], ["b"]),
            node("MatMul", ["back", "b"], ["y"]),
        ],
        {
            "a": _weights(6, 8), "s": np.float32(0.25), "z": np.int8(0), "axes": np.array([0]),
            "bq": np.random.default_rng(1).integers(-9, 9, (8, 4)).astype(np.int8),
        },
        ("y", [3, 4]),
    )  # fmt: skip


def _expected(model: onnx.ModelProto) -> np.ndarray:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return X @ stored["a"] @ (stored["bq"].astype(np.float32) * stored["s"])


def test_pairs_on_activations_are_bypassed_and_weights_stay_quantized() -> None:
    model = _quantized([], "q", "q")
    before = model.SerializeToString()
    float_model = unrounded(model)
    assert model.SerializeToString() == before
    # ONNX Runtime's own optimizer would quantize activations to suit the quantized weights.
    kinds = [node.op_type for node in float_model.graph.node]
    assert kinds == ["MatMul", "Identity", "Identity", "DequantizeLinear", "MatMul"]
    assert rounds(model)
    assert not rounds(float_model)
    result = Session(float_model, CPU, optimize=False).run({"x": X})["y"]
    np.testing.assert_allclose(result, _expected(model), rtol=1e-5, atol=1e-5)
    rounded = Session(model, CPU, optimize=False).run({"x": X})["y"]
    assert np.abs(rounded - _expected(model)).max() > 0.01


def test_pairs_are_bypassed_through_movement() -> None:
    node = helper.make_node
    between = [
        node("Unsqueeze", ["q", "axes"], ["w"]),
        node("Squeeze", ["w", "axes"], ["v"]),
        node("Split", ["v"], ["left", "right"], axis=1),
        node("Concat", ["left", "right"], ["u"], axis=1),
    ]
    model = _quantized(between, "q", "u")
    float_model = unrounded(model)
    assert not rounds(float_model)
    onnx.checker.check_model(float_model, full_check=True)
    result = Session(float_model, CPU, optimize=False).run({"x": X})["y"]
    np.testing.assert_allclose(result, _expected(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reader", ["integer operator", "mixed concat", "graph output"])
def test_what_integers_read_stays_quantized(reader: str) -> None:
    node = helper.make_node
    if reader == "integer operator":
        model = _quantized([node("MatMulInteger", ["q", "bq"], ["unused"])], "q", "q")
    elif reader == "mixed concat":
        between = [
            node("Concat", ["q", "iq"], ["u"], axis=1),
            node("Split", ["u"], ["v", "w"], axis=1),
        ]
        model = _quantized(between, "q", "v")
        model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 8), np.int8), "iq"))
    else:
        model = _quantized([], "q", "q")
        model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.INT8, [3, 8]))
    assert unrounded(model).graph.node == model.graph.node


def test_a_quantized_model_is_verified_without_its_rounding() -> None:
    model = _quantized([], "q", "q")
    result = onnxcop.prune(model, macs=0.6, options=CPU)
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None
    assert result.report.verification.max_difference < TOLERANCE["float32"]
    assert rounds(result.model)


def test_outputs_are_compared_before_they_are_squashed() -> None:
    node = helper.make_node
    model = _model(
        [
            node("MatMul", ["x", "a"], ["logits"]),
            node("Softmax", ["logits"], ["p"]),
            node("Identity", ["p"], ["y"]),
        ],
        {"a": _weights(6, 4)},
        ("y", [3, 4]),
    )
    assert comparable_outputs(model) == ["logits"]
    direct = _model([node("Sigmoid", ["x"], ["y"])], {}, ("y", [3, 6]))
    assert comparable_outputs(direct) == ["y"]


def _deaf() -> onnx.ModelProto:
    """Two layers whose output is the same whatever the input is."""
    node = helper.make_node
    return _model(
        [
            node("MatMul", ["x", "a"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "b"], ["t"]),
            node("Clip", ["t", "low", "high"], ["y"]),
        ],
        {"a": _weights(6, 8), "b": _weights(8, 4, seed=1), "low": BIG, "high": BIG},
        ("y", [3, 4]),
    )  # fmt: skip


def test_if_outputs_do_not_react_inner_layers_are_compared() -> None:
    analysis = onnxcop.analyze(_deaf(), options=CPU)
    structure = analysis.structure
    removed = np.array([1, 4], dtype=np.int64)
    pruned = onnxcop.apply(analysis.model, structure, removed)
    assert verify(analysis.model, pruned, structure, removed, CPU).notes == ()
    wrong = onnx.ModelProto()
    wrong.CopyFrom(pruned)
    (tensor,) = [tensor for tensor in wrong.graph.initializer if tensor.name == "b"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), "b"))
    with pytest.raises(onnxcop.OnnxcopError, match="'t' differs from the masked original"):
        verify(analysis.model, wrong, structure, removed, CPU)


def test_a_difference_names_its_tensor_and_limit() -> None:
    analysis = onnxcop.analyze(_quantized([], "q", "q"), options=CPU)
    removed = np.array([0], dtype=np.int64)
    reference = masked(analysis.model, analysis.structure, removed)
    pruned = onnxcop.apply(analysis.model, analysis.structure, removed)
    found = difference(reference, pruned, analysis.structure, removed, shapes={"x": (3, 6)}, options=CPU)
    assert found.tensor == "y"
    assert found.limit == TOLERANCE["float32"]
    assert found.reacts
    assert found.worst is not None
    assert 0 <= found.worst < 1e-5


@pytest.mark.parametrize(
    ("expected", "found", "result"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([np.nan, 1.0], [1.0, 1.0], None),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([1.0, 1.0], [1.0], np.inf),
        ([], [], None),
    ],
)
def test_relative_difference(expected: list[float], found: list[float], result: float | None) -> None:
    assert relative_difference(np.array(expected), np.array(found)) == result
