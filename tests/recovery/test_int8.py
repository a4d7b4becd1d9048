"""What makes an int8 model close to the one before: balanced channels, ranges of least error, fitted layers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import outputs, weights

import onnxcop
from onnxcop.recovery.equalize import equalized
from onnxcop.recovery.int8_ranges import least_error_ranges
from onnxcop.recovery.rounding import rounded, rounded_together

CPU = onnxcop.EngineOptions("cpu", 1)
RNG = np.random.default_rng(0)
FEEDS = [{"x": RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)} for _ in range(8)]


def residual(uneven: float) -> onnx.ModelProto:
    """A residual network with a depthwise convolution; some channels of the sum have much larger values."""
    shapes = {
        "w1": (8, 3, 1, 1), "b1": (8,), "w2": (16, 8, 1, 1), "b2": (16,), "w3": (16, 1, 3, 3), "b3": (16,),
        "w4": (8, 16, 1, 1), "b4": (8,), "w5": (4, 8, 1, 1), "b5": (4,),
    }  # fmt: skip
    stored = [weights(name, shape) for name, shape in shapes.items()]
    stored += [numpy_helper.from_array(np.float32(value), name) for name, value in (("zero", 0), ("six", 6))]
    for place in (0, 1, 6, 7):
        values = numpy_helper.to_array(stored[place]).copy()
        values[0] *= uneven
        stored[place].CopyFrom(numpy_helper.from_array(values, stored[place].name))
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "one"),
        helper.make_node("Conv", ["a", "w2", "b2"], ["b"], "two"),
        helper.make_node("Clip", ["b", "zero", "six"], ["c"], "clip"),
        helper.make_node("Conv", ["c", "w3", "b3"], ["d"], "depthwise", pads=[1] * 4, group=16),
        helper.make_node("Relu", ["d"], ["e"], "relu"),
        helper.make_node("Conv", ["e", "w4", "b4"], ["f"], "four"),
        helper.make_node("Add", ["a", "f"], ["g"], "add"),
        helper.make_node("Conv", ["g", "w5", "b5"], ["y"], "five"),
    ]
    ends = [[helper.make_tensor_value_info(n, 1, ["N", c, 8, 8])] for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "residual", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def spread(model: onnx.ModelProto) -> float:
    """The largest channel of the sum over the smallest."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.append(helper.make_tensor_value_info("g", 1, ["N", 8, 8, 8]))
    peaks = np.abs(np.concatenate([outputs(watched, feed["x"]) for feed in FEEDS])).max(axis=(0, 2, 3))
    return float(peaks.max() / peaks.min())


def test_balanced_channels_change_nothing_but_their_magnitude() -> None:
    model = residual(40.0)
    balanced = equalized(model, FEEDS, CPU)
    assert balanced is not model
    for feed in FEEDS:
        wanted = outputs(model, feed["x"])
        np.testing.assert_allclose(outputs(balanced, feed["x"]), wanted, atol=1e-4 * np.abs(wanted).max())
    assert spread(balanced) < 0.5 * spread(model)


@pytest.mark.parametrize(
    "reader",
    [
        helper.make_node("Sigmoid", ["g"], ["s"], "sigmoid"),
        helper.make_node("Softmax", ["g"], ["s"], "softmax", axis=1),
        helper.make_node("Add", ["g", "x1"], ["s"], "broadcast"),
    ],
    ids=lambda node: node.op_type,
)
def test_channels_that_something_else_reads_stay(reader: onnx.NodeProto) -> None:
    model = residual(40.0)
    model.graph.initializer.append(weights("x1", (1, 8, 1, 1)))
    model.graph.node.append(reader)
    model.graph.output.append(helper.make_tensor_value_info("s", 1, ["N", 8, 8, 8]))
    assert spread(equalized(model, FEEDS, CPU)) == pytest.approx(spread(model))


def test_a_range_leaves_out_what_the_next_function_flattens() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "ten"], ["a"], "a"),
        helper.make_node("Sigmoid", ["a"], ["s"], "s"),
        helper.make_node("Mul", ["a", "s"], ["silu"], "silu"),
        helper.make_node("Clip", ["a", "zero", "six"], ["clip"], "clip"),
        helper.make_node("Conv", ["silu", "w"], ["y"], "y"),
    ]
    numbers = [numpy_helper.from_array(np.float32(v), n) for n, v in (("ten", 10), ("zero", 0), ("six", 6))]
    ends = [[helper.make_tensor_value_info(n, 1, ["N", c, 8, 8])] for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes[:3] + nodes[4:], "g", *ends, [*numbers, weights("w", (4, 3, 1, 1))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    low, high = least_error_ranges(model, ["a"], FEEDS, CPU)[0]["a"]
    assert -12 < low < -3 and high > 20  # values go from about -35 to 35
    for node in model.graph.node:
        node.input[:] = ["clip" if name == "silu" and node.op_type == "Conv" else name for name in node.input]
    model.graph.node.insert(1, nodes[3])
    del model.graph.node[2:4]
    low, high = least_error_ranges(model, ["a"], FEEDS, CPU)[0]["a"]
    assert low > -1 and 5 < high < 8
    raw = least_error_ranges(model, ["clip", "y", "x"], FEEDS, CPU)[0]
    assert raw["clip"][0] == 0.0 and raw["clip"][1] == pytest.approx(6.0, rel=0.1) and raw["y"][0] < 0 < raw["y"][1]


def test_weights_rounded_together_cancel_errors_of_inputs_that_belong_together() -> None:
    rows = RNG.standard_normal((500, 3)) @ RNG.standard_normal((3, 12)) + 0.05 * RNG.standard_normal((500, 12))
    matrix, steps = RNG.standard_normal((1, 12, 6)), np.full((1, 1, 6), 0.2)
    moments = (rows.T @ rows / len(rows))[None]

    def error(found: np.ndarray) -> float:
        assert np.array_equal(found, np.rint(found)) and np.abs(found).max() <= 127
        return float(np.linalg.norm(rows @ (found[0] * steps[0] - matrix[0])))

    nearest, together = (rounded(matrix, steps, 127), rounded_together(matrix, steps, 127, moments))
    assert error(together) < 0.6 * error(nearest)
    assert np.array_equal(rounded_together(matrix, steps, 127, np.eye(12)[None]), nearest)
