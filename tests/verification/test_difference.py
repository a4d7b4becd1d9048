"""How large a difference from the masked original may be, and which tensors are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import finished, linear, weights

import onnxcop
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.errors import VerificationError
from onnxcop.rewrite.apply import apply
from onnxcop.verification.difference import (
    TOLERANCE,
    Difference,
    comparable_outputs,
    difference,
    relative_difference,
    witnesses,
)
from onnxcop.verification.masked_model import masked
from onnxcop.verification.verify import verify

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
# What rounding explains: a few hundred units in the last place of single precision, fewer of double, some of half.
ROUNDING = {"float32": 1e-4, "float64": 1e-6, "float16": 2e-2}


def cut(dtype: Any = np.float32) -> tuple[Analysis, onnx.ModelProto, np.ndarray[Any, Any]]:
    """A model, what is left of it without some units, and those."""
    found = analyze(linear(dtype), options=CPU)
    removed = np.array([0, 3, 20])
    return found, apply(found.model, found.structure, removed), removed


def scaled(model: onnx.ModelProto, factor: float, name: str = "w3") -> onnx.ModelProto:
    """The same with one of its weights, and so its outputs, multiplied by a factor."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values.astype(np.float64) * factor).astype(values.dtype), name))
    return copy


def test_tolerances_are_what_rounding_explains() -> None:
    assert TOLERANCE == ROUNDING


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_error_of_ten_times_the_rounding_is_refused(dtype: Any) -> None:
    found, pruned, removed = cut(dtype)
    limit = ROUNDING[np.dtype(dtype).name]
    checked = verify(found.model, pruned, found.structure, removed, CPU)
    assert checked.max_difference is not None
    assert checked.max_difference < limit
    assert checked.exact_units == 3
    assert checked.unproven == ""
    verify(found.model, scaled(pruned, 1 + limit / 3), found.structure, removed, CPU)
    with pytest.raises(VerificationError, match=r"differs from the masked original by .* of its largest value"):
        verify(found.model, scaled(pruned, 1 + 10 * limit), found.structure, removed, CPU)


def test_the_difference_is_relative_to_the_largest_value() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 0.0]])
    assert relative_difference(expected, expected) == 0
    assert relative_difference(expected, expected + 0.5) == pytest.approx(0.125)
    assert relative_difference(expected, expected[:1]) == float("inf")
    assert relative_difference(expected, np.full((2, 2), np.nan)) == float("inf")
    assert relative_difference(np.array([np.inf, 1.0]), np.array([1.0, 1.0])) is None
    assert relative_difference(np.empty(0), np.empty(0)) is None
    assert relative_difference(np.zeros(2), np.array([0.0, 3.0])) == 3.0
    assert relative_difference(["text"], ["text"]) is None
    assert relative_difference(np.array(["a"], object), np.array(["a"], object)) is None
    assert relative_difference(np.array([2, 4]), np.array([2, 5])) == 0.25
    assert relative_difference(np.array([True, False]), np.array([True, True])) == 1.0


def test_a_difference_is_excessive_above_its_limit_alone() -> None:
    assert not Difference().excessive
    assert not Difference(1e-4).excessive
    assert Difference(2e-4).excessive
    assert not Difference(2e-4, limit=2e-2).excessive


def squashed(*operators: str) -> onnx.ModelProto:
    """A linear layer behind which come some activations, one after the other."""
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["m0"])]
    for place, operator in enumerate(operators):
        nodes.append(helper.make_node(operator, [f"m{place}"], [f"m{place + 1}"]))
    nodes[-1].output[0] = "y"
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    return finished(helper.make_graph(nodes, "g", border[:1], border[1:], [weights("w1", (8, 4))]))


@pytest.mark.parametrize(
    ("operators", "compared"),
    [(("Relu",), "y"), (("Sigmoid",), "m0"), (("Softmax", "Identity"), "m0"), (("Relu", "Tanh"), "m1"), ((), "y")],
)
def test_what_squashes_is_bypassed(operators: tuple[str, ...], compared: str) -> None:
    assert comparable_outputs(squashed(*operators)) == [compared]


def test_an_input_that_is_squashed_at_once_is_no_argument() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    model = finished(helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", [x], [y]))
    assert comparable_outputs(model) == ["y"]


def test_a_saturated_output_hides_no_error() -> None:
    """Behind a Sigmoid of large numbers everything is 0 or 1; the numbers themselves differ."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["y"]),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    stored = [weights("w1", (8, 16)), weights("w2", (16, 4))]
    model = scaled(finished(helper.make_graph(nodes, "g", border[:1], border[1:], stored)), 1e6, "w2")
    found, removed = analyze(model, options=CPU), np.array([1, 2])
    pruned = apply(found.model, found.structure, removed)
    verify(found.model, pruned, found.structure, removed, CPU)
    with pytest.raises(VerificationError, match="tensor 'b'"):
        verify(found.model, scaled(pruned, 1.01, "w2"), found.structure, removed, CPU)


def unmoved() -> onnx.ModelProto:
    """The largest of four logits, which a constant settles: the output does not react to the inputs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], "two"),
        helper.make_node("Add", ["b", "shift"], ["c"]),
        helper.make_node("ArgMax", ["c"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["N", 1])
    shift = numpy_helper.from_array(np.array([0, 1e6, 0, 0], np.float32), "shift")
    return finished(helper.make_graph(nodes, "g", [x], [y], [weights("w1", (8, 16)), weights("w2", (16, 4)), shift]))


def test_if_outputs_do_not_react_layers_are_compared() -> None:
    found, removed = analyze(unmoved(), options=CPU), np.array([1, 2])
    pruned = apply(found.model, found.structure, removed)
    reference = masked(found.model, found.structure, removed)
    names = witnesses(reference, pruned, found.structure, removed)
    assert list(names) == ["b", "a"]
    assert names["b"][1] is None or names["b"][1].tolist() == [0, 1, 2, 3]
    (batch, kept) = names["a"]
    assert batch is None
    assert kept is not None
    assert kept.tolist() == [i for i in range(16) if i not in (1, 2)]
    how: dict[str, Any] = {"shapes": found.input_shapes, "options": CPU}
    good = difference(reference, pruned, found.structure, removed, **how)
    assert good.reacts
    assert good.worst is not None
    assert not good.excessive
    for name, tensor in (("w2", "b"), ("w1", "a")):
        bad = difference(reference, scaled(pruned, 1.001, name), found.structure, removed, **how)
        assert bad.excessive
        assert bad.worst == pytest.approx(1e-3, rel=0.02)
        assert bad.tensor in (tensor, "b")


def test_an_error_at_other_sizes_alone_is_found() -> None:
    """A size written down as a number fits the analysed one, and no other."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["b"]),
        helper.make_node("Slice", ["b", "from", "to", "axis"], ["s"]),
        helper.make_node("ReduceSum", ["s", "axis"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "L", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 4])
    numbers = {"from": 0, "to": 1 << 40, "axis": 1}
    stored = [numpy_helper.from_array(np.array([value]), name) for name, value in numbers.items()]
    stored += [weights("w1", (8, 16)), weights("w2", (16, 4))]
    model = finished(helper.make_graph(nodes, "g", [x], [y], stored))
    found, removed = analyze(model, input_shapes={"x": (1, 6, 8)}, options=CPU), np.array([1, 2])
    pruned = apply(found.model, found.structure, removed)
    assert verify(found.model, pruned, found.structure, removed, CPU).other_shapes != {}
    stop = next(t for t in pruned.graph.initializer if t.name == "to")
    stop.CopyFrom(numpy_helper.from_array(np.array([6]), "to"))
    with pytest.raises(VerificationError, match="with x of 1,12,8"):
        verify(found.model, pruned, found.structure, removed, CPU)
