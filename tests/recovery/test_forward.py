"""A run from layer to layer gives what the whole model gives, and computes every layer once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import weights

import onnxcop
from onnxcop.graph.linear import kernel_of
from onnxcop.pipeline.quantize import quantize
from onnxcop.recovery import forward
from onnxcop.recovery.forward import ForwardRun
from onnxcop.recovery.int8 import tensors_of

CPU = onnxcop.EngineOptions("cpu", 1)
FEEDS = [{"x": np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype(np.float32)} for seed in range(6)]


def residual(depth: int) -> onnx.ModelProto:
    """A quantized network whose layers each read the sum of all before."""
    stored, nodes, last = [weights("w", (4, 3, 3, 3))], [helper.make_node("Conv", ["x", "w"], ["s0"], "first")], "s0"
    nodes[0].attribute.append(helper.make_attribute("pads", [1] * 4))
    for place in range(depth):
        stored.append(weights(f"w{place}", (4, 4, 1, 1)))
        nodes.append(helper.make_node("Conv", [last, f"w{place}"], [f"c{place}"], f"conv{place}"))
        nodes.append(helper.make_node("Relu", [f"c{place}"], [f"r{place}"], f"relu{place}"))
        nodes.append(helper.make_node("Add", [last, f"r{place}"], [f"s{place + 1}"], f"add{place}"))
        last = f"s{place + 1}"
    ends = [[helper.make_tensor_value_info(n, 1, ["N", c, 8, 8])] for n, c in (("x", 3), (last, 4))]
    model = helper.make_model(helper.make_graph(nodes, "residual", *ends, stored), ir_version=9)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 17))
    return quantize(model, "static", data=np.concatenate([feed["x"] for feed in FEEDS]), options=CPU)


def layers(model: onnx.ModelProto) -> list[tuple[int, str]]:
    return [(place, node.input[0]) for place, node in enumerate(model.graph.node) if kernel_of(node) is not None]


def test_layers_read_what_the_whole_model_gives_them_also_after_weights_have_changed() -> None:
    model = residual(4)
    run = ForwardRun(model, FEEDS, CPU)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for number, (place, data) in enumerate(layers(model)):
        count = (6, 2, 5, 6, 3)[number]  # batches that stay behind follow later
        found = list(run.before(place, data, count))
        wanted = [tensors[data] for tensors in tensors_of(model, [data], FEEDS[:count], CPU)]
        assert len(found) == count
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        makers = {name: node for node in model.graph.node for name in node.output}
        kernel = stored[makers[model.graph.node[place].input[1]].input[0]]
        values = numpy_helper.to_array(kernel)
        kernel.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), kernel.name))


def test_no_layer_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = residual(8), list[str]()

    def excerpt(*arguments: object) -> onnx.ModelProto:
        part = original(*arguments)
        computed.extend(node.name for node in part.graph.node if kernel_of(node) is not None)
        return part

    original = forward.excerpt
    monkeypatch.setattr(forward, "excerpt", excerpt)
    run = ForwardRun(model, FEEDS, CPU)
    for place, data in layers(model):
        assert len(list(run.before(place, data, len(FEEDS)))) == len(FEEDS)
    assert len(computed) == len(set(computed)) == len(layers(model)) - 1  # nothing reads the last one's output
