"""How much a layer's outputs matter, on networks where that is plain to see."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, finished, weights

from onnxcop.analysis import analyze
from onnxcop.engine import EngineOptions
from onnxcop.lookahead import output_importance
from onnxcop.working import Working

CPU = EngineOptions(provider="cpu", threads=1)


def scaled(model: onnx.ModelProto, name: str, channel: int, factor: float) -> onnx.ModelProto:
    """A copy in which one input channel of a layer weighs more or less."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[:, channel] *= factor
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return copy


def importance(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """By name of the layer."""
    analysis = analyze(model, options=CPU)
    nodes = analysis.model.graph.node
    return {nodes[index].name: found for index, found in output_importance(Working.of(analysis)).items()}


def test_an_output_matters_as_the_square_of_what_the_next_layer_makes_of_it() -> None:
    plain, weaker = importance(chain()), importance(scaled(chain(), "w3", 5, 0.5))
    np.testing.assert_allclose(
        weaker["conv2"][5] / weaker["conv2"][4], plain["conv2"][5] / plain["conv2"][4] / 4, rtol=1e-6
    )
    assert all(abs(found.mean() - 1) < 1e-9 for found in weaker.values())


def test_what_the_end_does_not_see_matters_to_no_layer_before() -> None:
    """Of three convolutions the last one's channels but one are cut off the head."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "conv1"),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], "conv2"),
        helper.make_node("Conv", ["c2", "w3"], ["c3"], "conv3"),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4"], ["y"], "head", transB=1),
    ]
    sizes = {"w1": (8, 3, 3, 3), "w2": (9, 8, 3, 3), "w3": (7, 9, 3, 3), "w4": (5, 7)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [weights(name, size) for name, size in sizes.items()],
    )  # fmt: skip
    model = finished(graph)
    for channel in range(6):
        model = scaled(model, "w4", channel, 0.0)
    found = importance(model)
    assert found["conv3"][6] == found["conv3"].sum() > 0
    third = numpy_helper.to_array(next(t for t in graph.initializer if t.name == "w3")).astype(np.float64)
    expected = (third[6] ** 2).sum(axis=(1, 2))
    np.testing.assert_allclose(found["conv2"], expected / expected.mean(), rtol=1e-6)
    assert (found["head"] == 1).all()
