"""Importance of a layer's outputs, on networks with an obvious answer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, finished, weights

from onnxcop.analysis.analyze import analyze
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.patches import PatchStatistics, unfolded
from onnxcop.data.open import input_specs, open_source
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.propagation import propagate_importance
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)


def scaled(model: onnx.ModelProto, name: str, axis: int, channel: int, factor: float) -> onnx.ModelProto:
    """A copy in which one channel of a tensor is larger or smaller."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    np.moveaxis(values, axis, 0)[channel] *= factor
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return copy


def importance(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """By name of the layer."""
    analysis = analyze(model, options=CPU)
    working = MaskedNetwork.of(analysis)
    side = analysis.input_shapes["x"][-1]
    pictures = np.random.default_rng(0).standard_normal((40, 3, side, side)).astype(np.float32)
    data = open_source({"x": pictures}, input_specs(analysis), samples=40, batch_size=8, seed=0)
    unfolding, patches = unfolded(working.model, working.layers, working.partition.shapes)
    taps = [patches.get(layer.node, layer) for layer in working.layers]
    seen = PatchStatistics(calibrate(unfolding, taps, data, CPU, sha=analysis.sha256, positions=None), patches)
    nodes = analysis.model.graph.node
    return {nodes[index].name: found for index, found in propagate_importance(working, seen).items()}


def three() -> onnx.ModelProto:
    """Three convolutions without activations, and a head."""
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
    return finished(graph)


def test_an_output_matters_as_the_square_of_what_the_next_layer_makes_of_it() -> None:
    plain, weaker = importance(chain()), importance(scaled(chain(), "w3", 1, 5, 0.5))
    np.testing.assert_allclose(
        weaker["conv2"][5] / weaker["conv2"][4], plain["conv2"][5] / plain["conv2"][4] / 4, rtol=1e-4
    )
    assert all(abs(found.mean() - 1) < 1e-9 for found in weaker.values())


def test_a_gain_that_the_next_layer_undoes_changes_only_the_unit_of_the_error() -> None:
    """Twice the output with half the weight behind it: an error of the same variance matters a quarter."""
    plain, moved = importance(three()), importance(scaled(scaled(three(), "w2", 0, 3, 2.0), "w3", 1, 3, 0.5))
    ratio = (moved["conv2"] / moved["conv2"][0]) / (plain["conv2"] / plain["conv2"][0])
    np.testing.assert_allclose(ratio[3], 0.25, rtol=1e-3)
    np.testing.assert_allclose(np.delete(ratio, 3), 1.0, rtol=1e-3)
    np.testing.assert_allclose(moved["conv3"], plain["conv3"], rtol=1e-3)


def test_what_the_end_does_not_see_matters_to_no_layer_before() -> None:
    """Of three convolutions the last one's channels but one are cut off the head."""
    model = three()
    for channel in range(6):
        model = scaled(model, "w4", 1, channel, 0.0)
    found = importance(model)
    assert found["conv3"][6] == found["conv3"].sum() > 0
    assert (found["head"] == 1).all()
    unseen = importance(scaled(model, "w3", 0, 2, 50.0))  # what a channel that is cut off makes of the others
    np.testing.assert_allclose(unseen["conv2"], found["conv2"], rtol=1e-3)


def test_a_single_output_is_the_average() -> None:
    assert importance(chain(classes=1))["head"].tolist() == [1.0]


def beside(first: bool) -> onnx.ModelProto:
    """Layers in a row, and one beside them that reads the same; its node is the first or the last of them."""
    row = [
        helper.make_node("Conv", ["c0", "w1"], ["c1"], "conv1"),
        helper.make_node("Conv", ["c1", "dw"], ["d"], "depthwise", group=8),
        helper.make_node("Conv", ["d", "w2"], ["c2"], "conv2"),
    ]
    aside = [helper.make_node("Conv", ["c0", "w3"], ["c3"], "aside")]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], "conv0"),
        *(aside + row if first else row + aside),
        helper.make_node("GlobalAveragePool", ["c2"], ["p2"]),
        helper.make_node("GlobalAveragePool", ["c3"], ["p3"]),
        helper.make_node("Concat", ["p2", "p3"], ["p"], axis=1),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["y"], "head", transB=1),
    ]
    sizes = {
        "w0": (7, 3, 3, 3),
        "w1": (8, 7, 3, 3),
        "dw": (8, 1, 1, 1),
        "w2": (6, 8, 3, 3),
        "w3": (4, 7, 3, 3),
        "w4": (5, 10),
    }
    value = helper.make_tensor_value_info
    stored = [weights(name, size) for name, size in sizes.items()]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["N", 3, 9, 9])], [value("y", TensorProto.FLOAT, ["N", 5])], stored
    )
    return finished(graph)


def test_layers_that_do_not_read_each_other_may_be_in_any_order() -> None:
    one, other = importance(beside(True)), importance(beside(False))
    assert one.keys() == other.keys() == {"conv1", "conv2", "aside", "head"}  # that before a depthwise one as well
    assert len(np.unique(one["conv1"])) == 8
    for name, found in one.items():
        np.testing.assert_allclose(other[name], found, rtol=1e-6)


def in_parts(nodes: str, sizes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A model in text, with a global pool and a head behind its tensor `last`; nodes are named after their outputs."""
    tail = "p = GlobalAveragePool (last) f = Flatten (p) y = Gemm <transB = 1> (f, w4)"
    header = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,9,9] x) => (float[N,5] y)'
    model = onnx.parser.parse_model(f"{header} {{ {nodes} {tail} }}")
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(weights(name, size) for name, size in sizes.items())
    return model


def test_layers_before_one_of_several_groups_are_weighed_too() -> None:
    nodes = "c0 = Conv (x, w0) c1 = Conv (c0, w1) c2 = Conv <group = 2> (c1, w2) last = Conv (c2, w3)"
    sizes = {"w0": (6, 3, 1, 1), "w1": (8, 6, 1, 1), "w2": (6, 4, 3, 3), "w3": (7, 6, 1, 1), "w4": (5, 7)}
    found = importance(in_parts(nodes, sizes))
    assert found.keys() == {"c1", "last", "y"}
    assert (found["c1"] == 1).all()  # nothing is known of what the groups make of them


def test_the_first_unit_of_a_network_is_weighed_as_the_others() -> None:
    """A layer that writes to the channels it reads."""
    nodes = "c0 = Conv (x, w0) c1 = Conv (c0, w1) last = Add (c0, c1)"
    model = in_parts(nodes, {"w0": (6, 3, 1, 1), "w1": (6, 6, 1, 1), "w4": (5, 6)})
    plain, weaker = importance(model), importance(scaled(model, "w4", 1, 0, 0.5))
    assert (plain["c1"] > 0).all()
    ratio = (weaker["c1"] / weaker["c1"][1]) / (plain["c1"] / plain["c1"][1])
    np.testing.assert_allclose(ratio, [0.25, 1, 1, 1, 1, 1], rtol=1e-6)


def test_inputs_of_the_network_beside_channels_add_nothing_to_a_unit() -> None:
    nodes = "c0 = Conv (x, w0) c1 = Conv (c0, w1) last = Concat <axis = 1> (c1, x)"
    model = in_parts(nodes, {"w0": (6, 3, 1, 1), "w1": (7, 6, 1, 1), "w4": (5, 10)})
    louder = model
    for channel in (7, 8, 9):
        louder = scaled(louder, "w4", 1, channel, 20.0)
    np.testing.assert_allclose(importance(louder)["c1"], importance(model)["c1"], rtol=1e-6)
