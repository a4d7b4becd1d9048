"""Tensors that a graph makes: their axes are prunable if the size is a plain number."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcop
from onnxcop.graph.shapes import infer
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions("cpu", threads=1)
HIDDEN = 24


def _cell(maker: str, width: str) -> onnx.ModelProto:
    """One step of a recurrent cell whose zero state the graph makes for a dynamic batch.

    Args:
        maker: Operator that makes the state, ConstantOfShape or Expand.
        width: "number" where the state's width is written down, "computed" where it comes from a
            runtime tensor.
    """
    rng = np.random.default_rng(0)
    node = helper.make_node
    constants = {
        "w": rng.standard_normal((5, HIDDEN)), "r": rng.standard_normal((HIDDEN, HIDDEN)),
        "v": rng.standard_normal((HIDDEN, 3)), "zero": np.zeros((1, 1)),
    }  # fmt: skip
    sizes = {"start": [0], "one": [1], "two": [2], "width": [HIDDEN]}
    nodes = [
        node("MatMul", ["x", "w"], ["xw"], "input"),
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "start", "one"], ["batch"]),
        node("Shape", ["side"], ["side_shape"]),
        node("Slice", ["side_shape", "one", "two"], ["side_width"]),
        node("Concat", ["batch", "width" if width == "number" else "side_width"], ["asked"], axis=0),
        node("ConstantOfShape", ["asked"], ["state"])
        if maker == "ConstantOfShape"
        else node("Expand", ["zero", "asked"], ["state"]),
        node("MatMul", ["state", "r"], ["sr"], "recurrent"),
        node("Add", ["xw", "sr"], ["sum"]),
        node("Tanh", ["sum"], ["gate"]),
        node("Mul", ["gate", "gate"], ["kept"]),
        node("Add", ["kept", "state"], ["next"]),
        node("MatMul", ["next", "v"], ["y"], "output"),
    ]
    graph = helper.make_graph(
        nodes, "cell",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5]),
            helper.make_tensor_value_info("side", TensorProto.FLOAT, ["N", HIDDEN]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()]
        + [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in sizes.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("maker", ["ConstantOfShape", "Expand"])
def test_a_state_of_a_written_width_shrinks_and_its_batch_stays_dynamic(maker: str) -> None:
    result = onnxcop.prune(_cell(maker, "number"), macs=0.5, options=CPU)
    assert [(group.width, group.exact) for group in result.report.groups] == [(HIDDEN, True)]
    kept = result.report.groups[0].kept
    assert kept < HIDDEN
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None
    assert result.report.verification.max_difference < 1e-5
    rng = np.random.default_rng(1)
    with Session(result.model, CPU) as session:
        for batch in (1, 7):
            feeds = {
                name: rng.standard_normal((batch, size)).astype(np.float32)
                for name, size in (("x", 5), ("side", HIDDEN))
            }
            assert session.run(feeds)["y"].shape == (batch, 3)


@pytest.mark.parametrize("maker", ["ConstantOfShape", "Expand"])
def test_a_state_of_a_computed_width_is_frozen(maker: str) -> None:
    analysis = onnxcop.analyze(_cell(maker, "computed"), options=CPU)
    assert len(analysis.structure.unit_class) == 0


def test_computed_and_constant_elements_of_a_size_are_distinguished() -> None:
    shapes = infer(_cell("Expand", "number"), {"x": (2, 5), "side": (2, HIDDEN)})
    asked = shapes["asked"]
    assert asked.value is not None
    assert asked.varies is not None
    assert asked.value.tolist() == [2, HIDDEN]
    assert asked.varies.tolist() == [True, False]
    assert asked.sized
    assert shapes["width"].varies is None
    assert not shapes["width"].sized
    both = infer(_cell("Expand", "computed"), {"x": (2, 5), "side": (2, HIDDEN)})["asked"].varies
    assert both is not None
    assert both.all()
