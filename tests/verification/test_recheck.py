"""What a later check of a pruned model compares, and what it may not rely on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from small_models import chain, weights

import onnxcop
from onnxcop.errors import VerificationError
from onnxcop.rewrite.plan import PruningPlan
from onnxcop.verification.recheck import Recheck, recheck
from onnxcop.verification.verify import Verification

CPU = onnxcop.EngineOptions("cpu", 1)
Pruned = tuple[onnx.ModelProto, onnx.ModelProto, PruningPlan]


def with_branches() -> onnx.ModelProto:
    """Products, a Reshape and a Gather with stored numbers, and two branches with constants of their own."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,6] x, bool[1] choice) => (float[N,5] y)
    {
      h = MatMul (x, w0)
      r = Relu (h)
      s = MatMul (r, w1)
      b = If <then_branch = left () => (float[N,5] l) { one = Constant <value = float[1] {1.0}> () l = Add (s, one) },
              else_branch = right () => (float[N,5] k) { k = Neg (s) }> (choice)
      r2 = Reshape (b, sizes)
      y = Gather <axis = 1> (r2, order)
    }
    """
    model = parser.parse_model(text)
    model.graph.initializer.extend([weights("w0", (6, 8)), weights("w1", (8, 5))])
    for name, values in (("sizes", [-1, 5]), ("order", [4, 3, 2, 1, 0])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    return model


def pruned(model: onnx.ModelProto) -> Pruned:
    result = onnxcop.prune(model, filters=0.7, criterion="l2", recover="none", options=CPU, latency_seconds=0.0)
    return model, result.model, result.plan


@pytest.fixture(scope="module", params=[chain, with_branches], ids=lambda made: made.__name__)
def made(request: pytest.FixtureRequest) -> Pruned:
    return pruned(request.param())


def test_names_and_notes_are_no_part_of_what_is_computed(made: Pruned) -> None:
    original, small, plan = made
    other = onnx.ModelProto()
    other.CopyFrom(small)
    for number, node in enumerate(other.graph.node):
        node.name, node.doc_string = f"renamed {number}", "a note"
        for attribute in node.attribute:
            attribute.doc_string = "another"
        order = sorted(node.attribute, key=lambda attribute: attribute.name, reverse=True)
        kept = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in order]
        del node.attribute[:]
        node.attribute.extend(kept)
    found = recheck(original, other, plan, options=CPU)
    assert found.verification is not None and found.changed == ()
    assert found.verification.exact_units == found.removed > 0


def test_another_operator_is_another_model(made: Pruned) -> None:
    original, small, plan = made
    other = onnx.ModelProto()
    other.CopyFrom(small)
    next(node for node in other.graph.node if node.op_type == "Relu").op_type = "Elu"
    with pytest.raises(VerificationError, match="its nodes are not the same"):
        recheck(original, other, plan, options=CPU)


def test_constants_of_branches_are_values_and_not_structure() -> None:
    original, small, plan = pruned(with_branches())
    (choice,) = (node for node in small.graph.node if node.op_type == "If")
    for attribute in choice.attribute:
        for node in attribute.g.node:
            if node.op_type == "Constant":
                (value,) = node.attribute
                value.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value.t) + 1))
    with pytest.raises(VerificationError, match="holds other values"):
        recheck(original, small, plan, options=CPU)
    assert recheck(original, small, plan, options=CPU, structure_only=True).verification is None


def test_a_model_with_other_values_has_to_run() -> None:
    original, small, plan = pruned(with_branches())
    order = next(tensor for tensor in small.graph.initializer if tensor.name == "order")
    order.CopyFrom(numpy_helper.from_array(np.array([4, 3, 2, 1, 99]), "order"))  # which no checker sees
    with pytest.raises(VerificationError, match="'order' holds other values"):
        recheck(original, small, plan, options=CPU)
    with pytest.raises(VerificationError, match="does not run"):
        recheck(original, small, plan, options=CPU, structure_only=True)


def test_the_summary_says_how_near_the_outputs_are() -> None:
    verification = Verification(max_difference=0.0, exact_units=3, inexact_units=0, notes=())
    found = Recheck(removed=3, tensors=7, changed=(), verification=verification, notes=())
    assert found.summary.endswith("the shapes of 7 stored tensors agree with the plan; it equals the masked original "
                                  "exactly")  # fmt: skip
    near = replace(verification, max_difference=0.00012, exact_units=1, inexact_units=2)
    assert replace(found, verification=near).summary.endswith(" to 1.2e-04 (2 inexact of 3 units left out of that)")
    unknown = replace(verification, max_difference=None)
    assert replace(found, verification=unknown).summary.endswith("; outputs were not compared")
    assert "1 of them hold other values" in replace(found, verification=None, changed=("w",)).summary
