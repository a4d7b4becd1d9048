"""Fused layers are split during recovery and fused again: outputs do not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import weights

import onnxcop
from onnxcop.graph.passes.split_activations import SplitActivations
from onnxcop.graph.traits import MICROSOFT
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)

CONV: dict[str, list[float]] = {
    "Relu": [], "Tanh": [], "Sigmoid": [], "LeakyRelu": [0.3], "Clip": [-0.5, 0.5], "HardSigmoid": [0.3, 0.4],
}  # fmt: skip
GEMM: dict[str, dict[str, float]] = {
    "Relu": {}, "Tanh": {}, "Sigmoid": {}, "Softplus": {}, "Softsign": {}, "LeakyRelu": {"alpha": 0.3},
    "Elu": {"alpha": 0.7}, "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "Selu": {"alpha": 1.5, "gamma": 1.1},
    "ThresholdedRelu": {"alpha": 0.2},
}  # fmt: skip


def model_of(nodes: list[onnx.NodeProto], opset: int = 17, **sizes: tuple[int, ...]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "fused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [weights(name, size) for name, size in sizes.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def convolutions(activation: str = "Relu", opset: int = 17, added: bool = True) -> onnx.ModelProto:
    """`conv, fused conv with the sum of the first, head`, the middle one with an activation inside."""
    attributes: dict[str, Any] = {"activation": activation, "pads": [1] * 4, "domain": MICROSOFT}
    if CONV.get(activation):
        attributes["activation_params"] = CONV[activation]
    inputs = ["a", "w2", "b2", "a"] if added else ["a", "w2"]
    nodes = [
        helper.make_node("FusedConv", ["x", "w1"], ["a"], "one", **attributes),
        helper.make_node("FusedConv", inputs, ["b"], "two", **attributes),
        helper.make_node("GlobalAveragePool", ["b"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    return model_of(nodes, opset, w1=(12, 3, 3, 3), w2=(12, 12, 3, 3), b2=(12,), w3=(5, 12), b3=(5,))


def products(activation: str) -> onnx.ModelProto:
    own = {f"activation_{name}": value for name, value in GEMM[activation].items()}
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], "flatten"),
        helper.make_node("FusedGemm", ["f", "w1", "b1"], ["a"], "one", domain=MICROSOFT, alpha=0.5, transB=1,
                         activation=activation, **own),
        helper.make_node("Gemm", ["a", "w2"], ["y"], "head"),
    ]  # fmt: skip
    return model_of(nodes, w1=(16, 192), b1=(16,), w2=(16, 5))


def ran(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    with Session(model, CPU, optimize=False) as session:
        return np.asarray(session.run({"x": x})["y"])


MODELS = {
    **{f"convolution, {name}": convolutions(name) for name in CONV},
    **{f"product, {name}": products(name) for name in GEMM},
    "bounds as attributes": convolutions("Clip", 10),
    "nothing added": convolutions(added=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_taken_apart_and_fused_again(name: str) -> None:
    original = MODELS[name]
    model = onnx.ModelProto()
    model.CopyFrom(original)
    done = SplitActivations.forward(model)
    assert len(done.split) == (2 if "product" not in name else 1)
    assert not any(node.op_type.startswith("Fused") for node in model.graph.node)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(ran(model), ran(original), rtol=1e-6, atol=1e-6)
    done.undo(model)
    assert model.graph == original.graph


@pytest.mark.parametrize("node", [
    helper.make_node("FusedConv", ["x", "w1"], ["y"], domain=MICROSOFT, activation="Swish"),
    helper.make_node("FusedConv", ["x", "w1"], ["y"], domain=MICROSOFT, activation="LeakyRelu"),
    helper.make_node("FusedConv", ["x", "w1"], ["y"], domain="my.domain", activation="Relu"),
    helper.make_node("FusedConv", ["x", "computed"], ["y"], domain=MICROSOFT, activation="Relu"),
    helper.make_node("Conv", ["x", "w1"], ["y"]),
], ids=["unknown", "no slope", "another domain", "computed weights", "plain"])  # fmt: skip
def test_what_is_not_known_in_full_stays(node: onnx.NodeProto) -> None:
    model = model_of([node], w1=(12, 3, 3, 3))
    before = model.SerializeToString()
    assert SplitActivations.forward(model) == SplitActivations()
    assert model.SerializeToString() == before


def test_parts_with_something_between_them_stay_split() -> None:
    model = convolutions()
    done = SplitActivations.forward(model)
    between, parts = done.split[1][1][-1], model.graph.node
    index = next(i for i, node in enumerate(parts) if node.output[0] == "b")
    assert parts[index] == between
    parts.insert(index, helper.make_node("Neg", [parts[index].input[0]], ["negative"], "negative"))
    parts[index + 1].input[0] = "negative"
    expected = ran(model)
    done.undo(model)
    assert [node.op_type for node in model.graph.node[:4]] == ["FusedConv", "Conv", "Add", "Neg"]
    np.testing.assert_allclose(ran(model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["convolution, Relu", "convolution, Clip", "product, LeakyRelu", "nothing added"])
def test_a_pruned_model_is_fused_as_its_original_was(name: str) -> None:
    original = MODELS[name]
    x = np.random.default_rng(1).standard_normal((64, 3, 8, 8)).astype(np.float32)
    result = onnxcop.prune(original, data={"x": x}, macs=0.6, options=CPU)
    assert [node.op_type for node in result.model.graph.node] == [node.op_type for node in original.graph.node]
    names = {tensor.name for tensor in result.model.graph.initializer}
    assert {tensor.name for tensor in original.graph.initializer} <= names
    for before, after in zip(original.graph.node, result.model.graph.node, strict=True):
        assert list(after.attribute) == list(before.attribute)
        assert before.name == after.name
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    error = ran(result.model) - ran(original)
    assert error.var() < 0.5 * ran(original).var()
