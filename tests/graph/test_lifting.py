"""Weights that nodes make are stored before recovery, and only then."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import chain, outputs

import onnxcop
from onnxcop.analysis.analyze import analyze
from onnxcop.graph.passes.lift_constants import lift_constants
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
X = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)


def in_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every weight in a Constant node."""
    held = [
        helper.make_node("Constant", [], [t.name], f"hold_{t.name}", value=numpy_helper.from_array(
            numpy_helper.to_array(t)
        )) for t in model.graph.initializer
    ]  # fmt: skip
    nodes = [*held, *model.graph.node]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.initializer[:], changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def reshaped(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same model with a weight that is stored flat and transposed, and put right by two nodes."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    at = next(i for i, t in enumerate(graph.initializer) if t.name == name)
    values = numpy_helper.to_array(graph.initializer[at])
    del graph.initializer[at]
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values.T.reshape(-1)), "flat"))
    graph.initializer.append(numpy_helper.from_array(np.array(values.T.shape, np.int64), "shape"))
    graph.node.insert(0, helper.make_node("Reshape", ["flat", "shape"], ["turned"], "reshape"))
    perm = list(reversed(range(values.ndim)))
    graph.node.insert(1, helper.make_node("Transpose", ["turned"], [name], "transpose", perm=perm))
    return changed


def open_layers(model: onnx.ModelProto) -> list[bool]:
    working = MaskedNetwork.of(analyze(model, options=CPU, biases=True))
    return [working.is_open(layer) for layer in working.layers]


def error(model: onnx.ModelProto, result: onnxcop.PruneResult) -> float:
    fresh = np.random.default_rng(1).standard_normal((64, 3, 8, 8)).astype(np.float32)
    expected = outputs(model, fresh)
    return float(np.linalg.norm(outputs(result.model, fresh) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("change", [in_constants, lambda model: reshaped(model, "w2")])
def test_layers_whose_weights_nodes_make_are_recovered_alike(change: object) -> None:
    model = chain()
    other = change(model)  # type: ignore[operator]
    assert open_layers(model) == open_layers(other) == [True, True]
    quick = RecoverySettings(rounds=1, curve_passes=2)
    results = [onnxcop.prune(m, macs=0.6, data={"x": X}, options=CPU, settings=quick) for m in (model, other)]
    assert results[0].report.after.macs == results[1].report.after.macs
    errors = [error(model, result) for result in results]
    deleted = error(model, onnxcop.prune(other, macs=0.6, data={"x": X}, options=CPU, recover="none"))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert errors[1] < deleted


def test_the_graph_is_unchanged_if_nothing_is_recovered() -> None:
    result = onnxcop.prune(in_constants(chain()), macs=0.6, criterion="l2", recover="none", options=CPU)
    assert {node.op_type for node in result.model.graph.node} >= {"Constant"}
    assert not result.model.graph.initializer


def test_a_file_whose_initializers_are_inputs_is_left_alone() -> None:
    model = in_constants(chain())
    model.ir_version = 3
    assert lift_constants(model) == 0
    assert not model.graph.initializer


def test_a_tensor_that_others_read_too_is_not_doubled() -> None:
    model = reshaped(chain(), "w3")
    model.graph.node.append(helper.make_node("Identity", ["flat"], ["copy"], "reader"))
    model.graph.output.append(helper.make_tensor_value_info("copy", onnx.TensorProto.FLOAT, [80]))
    assert lift_constants(model) == 0
    assert [node.name for node in model.graph.node[:2]] == ["reshape", "transpose"]


def test_constants_that_are_given_out_stay_nodes() -> None:
    model = in_constants(chain())
    model.graph.output.append(helper.make_tensor_value_info("shift", onnx.TensorProto.FLOAT, [5]))
    assert lift_constants(model) == 6  # seven weights, without that one
    assert "shift" in {name for node in model.graph.node for name in node.output}
