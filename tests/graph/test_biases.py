"""Biases that are added for recovery, and removed again if they stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, finished, linear, weights

from onnxcop.graph.passes.add_biases import AddedBiases
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)


def model_of(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int], tensors: dict[str, Sequence[int]], outputs: str = "y"
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [weights(name, size) for name, size in tensors.items()],
    )
    return finished(onnx.shape_inference.infer_shapes(helper.make_model(graph)).graph)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], output, **attributes)


def convolutions() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1"], "a", group=2),
        node("ConvTranspose", ["a", "w2"], "b", group=2),
        node("Conv", ["b", "w3", "b3"], "y"),
    ]
    return model_of(nodes, (4, 6, 6), {"w1": (6, 2, 3, 3), "w2": (6, 4, 2, 2), "w3": (5, 8, 1, 1), "b3": (5,)})


def products() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], "a", transB=1),
        node("Gemm", ["a", "w2"], "b"),
        node("MatMul", ["b", "w3"], "c"),
        node("Relu", ["c"], "d"),
        node("MatMul", ["d", "w4"], "e"),
        node("Add", ["e", "b4"], "f"),
        node("MatMul", ["f", "w5"], "y"),
    ]
    sizes = {"w1": (7, 4), "w2": (7, 6), "w3": (6, 5), "w4": (5, 8), "b4": (8,), "w5": (8, 3)}
    return model_of(nodes, (4,), sizes, "y e")


MODELS = {"chain": chain, "linear": linear, "convolutions": convolutions, "products": products}


def run(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shape = [dim.dim_value or 3 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    with Session(model, CPU) as session:
        return session.run({"x": rng.standard_normal(shape).astype(np.float32)})


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


@pytest.mark.parametrize(("name", "sizes"), [
    ("chain", {}),
    ("linear", {"m1__bias": 16, "y__bias": 4}),
    ("convolutions", {"a__bias": 6, "b__bias": 8}),
    ("products", {"a__bias": 7, "b__bias": 6, "c__bias": 5, "e__bias": 8, "y__bias": 3}),
])  # fmt: skip
def test_layers_without_a_bias_get_a_zero_one(name: str, sizes: dict[str, int]) -> None:
    model = MODELS[name]()
    wanted = run(model)
    added = AddedBiases.forward(model)
    onnx.checker.check_model(model, full_check=True)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {name: stored[name].size for name in added.names} == sizes
    assert not any(stored[name].any() for name in added.names)
    found = run(model)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("name", MODELS)
def test_idle_biases_leave_no_trace(name: str) -> None:
    model = MODELS[name]()
    before = copied(model)
    AddedBiases.forward(model).undo(model)
    assert model == before


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_bias_of_one_number_is_repeated_until_it_is_known_to_stay_one(shape: tuple[int, ...]) -> None:
    model = model_of([node("Gemm", ["x", "w", "b"], "y")], (4,), {"w": (4, 6), "b": shape})
    before, wanted = copied(model), run(model)
    added = AddedBiases.forward(model)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "b")
    assert bias.dims == [6]
    np.testing.assert_array_equal(run(model)["y"], wanted["y"])
    changed = copied(model)
    added.undo(model)
    assert model == before
    bias = next(tensor for tensor in changed.graph.initializer if tensor.name == "b")
    bias.CopyFrom(numpy_helper.from_array(np.arange(6, dtype=np.float32), "b"))
    added.undo(changed)
    np.testing.assert_allclose(
        run(changed)["y"] - run(before)["y"], np.tile(np.arange(6) - bias_of(before), (3, 1)), atol=1e-5
    )


def bias_of(model: onnx.ModelProto) -> float:
    return next(numpy_helper.to_array(t).item() for t in model.graph.initializer if t.name == "b")


@pytest.mark.parametrize("name", ["linear", "convolutions", "products"])
def test_used_biases_stay(name: str) -> None:
    model = MODELS[name]()
    added = AddedBiases.forward(model)
    used = sorted(added.names)[-1]
    for tensor in model.graph.initializer:
        if tensor.name == used:
            tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), 2.0, np.float32), used))
    wanted = run(model)
    added.undo(model)
    onnx.checker.check_model(model, full_check=True)
    assert added.names & {tensor.name for tensor in model.graph.initializer} == {used}
    for key, value in run(model).items():
        np.testing.assert_array_equal(value, wanted[key])


@pytest.mark.parametrize("seen_elsewhere", [False, True])
def test_a_bias_before_a_normalization_moves_into_its_mean(seen_elsewhere: bool) -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], "n"),
        node("Add", ["n", "c" if seen_elsewhere else "n"], "y"),
    ]
    vectors = dict.fromkeys(("gamma", "beta", "mean", "variance"), (6,))
    model = model_of(nodes, (3, 8, 8), {"w": (6, 3, 3, 3), **vectors})
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    stored["variance"].CopyFrom(numpy_helper.from_array(np.linspace(0.5, 2, 6, dtype=np.float32), "variance"))
    added = AddedBiases.forward(model)
    shift = next(tensor for tensor in model.graph.initializer if tensor.name in added.names)
    shift.CopyFrom(numpy_helper.from_array(np.linspace(-1, 2, 6, dtype=np.float32), shift.name))
    wanted, before = run(model), {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    added.undo(model)
    left = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    if seen_elsewhere:
        assert shift.name in left and (left["mean"] == before["mean"]).all()
    else:
        np.testing.assert_allclose(left["mean"], before["mean"] - before[next(iter(added.names))])
        assert not added.names & left.keys() and len(model.graph.node[0].input) == 2
    for key, value in run(model).items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-6)


def test_zero_biases_of_the_model_itself_stay() -> None:
    model = chain()
    for tensor in model.graph.initializer:
        if tensor.name == "b1":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(8, np.float32), "b1"))
    before = copied(model)
    AddedBiases.forward(model).undo(model)
    assert model == before


def test_names_that_are_taken() -> None:
    nodes = [node("MatMul", ["x", "w"], "a__bias"), node("Gemm", ["a__bias", "w2"], "a"), node("Relu", ["a"], "y")]
    model = model_of(nodes, (4,), {"w": (4, 5), "w2": (5, 3)})
    wanted = run(model)
    added = AddedBiases.forward(model)
    onnx.checker.check_model(model, full_check=True)
    names = [name for entry in model.graph.node for name in entry.output] + [t.name for t in model.graph.initializer]
    assert len(names) == len(set(names))
    assert len(added.names) == 2
    np.testing.assert_array_equal(run(model)["y"], wanted["y"])


def test_weights_that_are_no_weights() -> None:
    nodes = [node("Transpose", ["x"], "t"), node("MatMul", ["x", "t"], "y")]
    model = model_of(nodes, (4,), {})
    before = copied(model)
    assert AddedBiases.forward(model) == AddedBiases()
    assert model == before
