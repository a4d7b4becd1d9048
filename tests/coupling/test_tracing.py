"""What the tracer notes of a graph, and what it does with rules that are wrong."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper, parser
from small_models import finished, weights

import onnxcop
from onnxcop.analysis.analyze import analyze
from onnxcop.coupling.ops import DEFAULT_RULES, Op
from onnxcop.coupling.tracing import trace
from onnxcop.graph.shapes import infer

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def test_what_follows_from_constants_is_known_but_not_what_a_body_makes() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,6] x) => (float[N,5] y)
    {
      turned = Transpose <perm = [1, 0]> (w0)
      again = Neg (turned)
      h = MatMul (x, again)
      b = If (choice) <
        then_branch = left () => (float[N,8] l) { l = Relu (h) },
        else_branch = right () => (float[N,8] r) { r = Neg (h) }
      >
      y = MatMul (b, w1)
    }
    """
    model = parser.parse_model(text)
    model.graph.initializer.extend([weights("w0", (8, 6)), weights("w1", (8, 5))])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "choice"))
    known = trace(model, infer(model, {"x": (2, 6)})).derived
    assert known == {"w0", "w1", "choice", "turned", "again"}


def test_axes_of_other_sizes_than_the_tensor_are_frozen() -> None:
    """A rule that turns nothing around, for an operator that does: its axes would be cut in the wrong places."""

    def wrong(op: Op) -> None:
        op.emit(op.label(0))

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "one"),
        helper.make_node("Transpose", ["h"], ["t"], "turned", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["w2", "t"], ["u"], "two"),
        helper.make_node("ReduceSum", ["u", "last"], ["y"], "sum", keepdims=0),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])
    stored = [weights("w1", (3, 6)), weights("w2", (5, 6)), numpy_helper.from_array(np.array([2]), "last")]
    model = finished(helper.make_graph(nodes, "g", [x], [y], stored))
    right = analyze(model, options=CPU).structure
    assert [group.width for group in right.groups] == [6]
    found = analyze(model, options=CPU, rules=DEFAULT_RULES | {("", "Transpose"): wrong}).structure
    assert found.groups == ()
    axis = found.coupling.labels["h"][2]
    assert axis is not None
    reasons = [reason.text for reason in found.coupling.classes.reasons[int(found.coupling.classes.of[axis[0]])]]
    assert "is combined with a tensor of unknown shape" in reasons
