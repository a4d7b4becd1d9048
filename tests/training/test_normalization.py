"""BatchNormalization trains with the statistics of the batch, and stores those of the trained weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import brightest_channels

import onnxcop
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.gradient import differentiate
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.training.normalization import estimated_statistics, use_batch_statistics

ENGINE = EngineOptions("cpu", 1)


def network(seed: int = 0, shared: bool = False) -> onnx.ModelProto:
    """Conv, BatchNormalization and a classifier on `[N, 3, 6, 6]`, with statistics that fit nothing."""
    rng = np.random.default_rng(seed)
    sizes = {"w": (4, 3, 3, 3), "b": (4,), "scale": (4,), "shift": (4,), "v": (4, 3)}
    stored = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    stored |= {"mean": np.full(4, 3.0, np.float32), "var": np.full(4, 9.0, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], epsilon=1e-3),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    if shared:
        nodes.insert(2, helper.make_node("Add", ["mean", "var"], ["other"]))
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("x", 1, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", 1, ["N", 3])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def samples(count: int = 128) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return brightest_channels(count, 6, seed=1)


def run(model: onnx.ModelProto, **feed: Any) -> dict[str, np.ndarray[Any, Any]]:
    with Session(model, ENGINE) as session:
        return session.run(feed)


def test_outputs_and_gradients_are_those_of_training_mode() -> None:
    torch = pytest.importorskip("torch")
    model, (images, _) = network(), samples(8)
    work, nodes = use_batch_statistics(model, ENGINE)
    assert [node.stored for node in nodes] == [("mean", "var")]
    arrays = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    trained = ["w", "scale", "shift", "v"]
    for name in trained:
        arrays[name].requires_grad_(True)
    conv = torch.nn.functional.conv2d(torch.tensor(images), arrays["w"], arrays["b"], padding=1)
    normal = torch.nn.functional.batch_norm(conv, None, None, arrays["scale"], arrays["shift"], training=True, eps=1e-3)
    y = torch.relu(normal).mean((2, 3)) @ arrays["v"]
    np.testing.assert_allclose(run(work, x=images)["y"], y.detach().numpy(), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    work.graph.node.extend([
        helper.make_node("Mul", ["y", "y"], ["squares"]),
        helper.make_node("ReduceSum", ["squares"], ["loss"], keepdims=0),
    ])  # fmt: skip
    work.graph.output.append(helper.make_tensor_value_info("loss", 1, []))
    found = differentiate(work, "loss", trained, input_shapes={"x": images.shape}, options=ENGINE)
    gradients = run(found.model, x=images)
    for name in trained:
        np.testing.assert_allclose(gradients[found.names[name]], arrays[name].grad.numpy(), rtol=2e-3, atol=2e-4)


def test_stored_statistics_are_those_of_all_samples() -> None:
    images, _ = samples()
    work, nodes = use_batch_statistics(network(), ENGINE)
    found = estimated_statistics(work, nodes, ({"x": part} for part in np.split(images, 4)), ENGINE)
    exposed = network()
    exposed.graph.output.append(helper.make_tensor_value_info("c", 1, ["N", 4, 6, 6]))
    conv = run(exposed, x=images)["c"].astype(np.float64)
    np.testing.assert_allclose(found["mean"], conv.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["var"], conv.var((0, 2, 3)), rtol=1e-5)


def test_a_network_with_wrong_statistics_is_mended_by_training() -> None:
    images, labels = samples(400)
    usual = {"labels": labels, "epochs": 8, "rate": 1e-2, "batch_size": 16, "engine": ENGINE}
    found = onnxcop.finetune(network(), {"x": images}, batch_norm="batch", **usual)
    assert found.after > 0.85 > found.before
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.model.graph.initializer}
    assert np.abs(stored["mean"]).max() < 2.5 and stored["var"].dtype == np.float32
    assert [node.op_type for node in found.model.graph.node] == [node.op_type for node in network().graph.node]
    again = onnxcop.finetune(network(), {"x": images}, batch_norm="batch", **usual)
    assert again.model.SerializeToString() == found.model.SerializeToString()


def test_what_cannot_be_used_is_refused() -> None:
    images, labels = samples(32)
    model = network()
    _, nodes = use_batch_statistics(network(shared=True), ENGINE)
    assert not nodes
    with pytest.raises(CalibrationError, match="--batch-norm 'running' does not exist; choose one of frozen, batch"):
        onnxcop.finetune(model, {"x": images}, labels=labels, batch_norm="running", engine=ENGINE)
    folded = network(shared=True)
    with pytest.raises(ModelError, match="no BatchNormalization with stored statistics"):
        onnxcop.finetune(folded, {"x": images}, labels=labels, batch_norm="batch", engine=ENGINE)
