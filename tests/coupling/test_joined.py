"""Channels joined with others that are never pruned."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import finished, weights

import onnxcop
from onnxcop.analysis.analyze import analyze

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def joined(first: bool) -> onnx.ModelProto:
    """A convolution whose channels are joined with those of the input, before or after them."""
    order = ["x", "r"] if first else ["r", "x"]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Concat", order, ["j"], axis=1),
        helper.make_node("Conv", ["j", "w2"], ["d"], "conv2", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["d"], ["y"]),
    ]
    stored = [weights("w1", (8, 3, 3, 3)), weights("w2", (4, 11, 3, 3))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 1, 1])
    return finished(helper.make_graph(nodes, "joined", [x], [y], stored))


@pytest.mark.parametrize("first", [True, False])
def test_channels_of_the_input_stay_in_a_concat(first: bool) -> None:
    model = joined(first)
    found = analyze(model, options=CPU)
    atoms = found.structure.coupling.labels["j"][1]
    assert atoms is not None
    units = found.structure.units_on(atoms)
    rigid = np.arange(3) if first else np.arange(8, 11)
    assert (units[rigid] == -1).all()
    assert sorted(np.delete(units, rigid).tolist()) == list(range(8))
    reasons = found.structure.coupling.classes.reasons
    (reason,) = {reasons[int(c)][0].text for c in found.structure.coupling.classes.of[atoms[rigid]]}
    assert reason == "is concatenated with channels that are never pruned"
    result = onnxcop.prune(model, filters=0.2, recover="none", criterion="l2", options=CPU)
    assert next(t for t in result.model.graph.initializer if t.name == "w2").dims[1] < 11
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None


@pytest.mark.parametrize("opset", [11, 13])
def test_the_sizes_of_a_resize_follow_its_channels(opset: int) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv1", pads=[1] * 4),
        helper.make_node("Resize", ["c", "roi", "scales", "sizes"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["y"], "conv2", pads=[1] * 4),
    ]
    stored = [weights("w1", (8, 3, 3, 3)), weights("w2", (4, 8, 3, 3))]
    stored += [numpy_helper.from_array(np.zeros(0, np.float32), name) for name in ("roi", "scales")]
    stored.append(numpy_helper.from_array(np.array([1, 8, 12, 12], np.int64), "sizes"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 12, 12])
    model = finished(helper.make_graph(nodes, "resized", [x], [y], stored))
    model.opset_import[0].version = opset
    pruned = onnxcop.prune(model, filters=0.5, criterion="l2", recover="none", options=CPU).model
    sizes = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in pruned.graph.initializer}["sizes"]
    assert sizes[1] < 8 and [sizes[0], *sizes[2:]] == [1, 12, 12]
