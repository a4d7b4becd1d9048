"""Numbers of sizes after pruning: attributes, indices, and the nodes that correct what was computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops.facts import Edit, PinEdit, RatioEdit, SizeEdit, SplitEdit
from onnxcop.rewrite.sizes import SizeFix, attribute_values, corrections, kept_by_axis, remap, slice_label
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)
ELEMENT = {"i": TensorProto.INT64, "f": TensorProto.FLOAT, "b": TensorProto.BOOL}
GONE = {1, 4, 5, 11}  # atoms that are removed


def keep(atoms: IntArray) -> IntArray:
    return np.flatnonzero(~np.isin(atoms, list(GONE)))


SIX, FOUR = np.arange(6), np.arange(10, 14)  # three of six and three of four stay
WHOLE = np.arange(20, 25)


def node(op_type: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, ["x"], ["y"], **attributes)


@pytest.mark.parametrize(
    ("edit", "attributes", "expected"),
    [
        (SizeEdit(0, "hidden_size", 0, SIX), {"hidden_size": 6}, {"hidden_size": 3}),
        (SizeEdit(0, "hidden_size", 0, WHOLE), {"hidden_size": 5}, {}),  # nothing changes
        (SizeEdit(0, "shape", 1, SIX), {"shape": [0, 6, -1]}, {"shape": [0, 3, -1]}),
        (SizeEdit(0, "shape", 2, SIX), {"shape": [0, 6, -1]}, {}),  # the runtime works it out
        (SizeEdit(0, "shape", 0, SIX), {"shape": [0, 6, -1]}, {}),  # and copies this one
        (SizeEdit(0, "ends", 0, FOUR, SIX), {"ends": [-2]}, {"ends": [3]}),  # counted from an end that moves
        (SizeEdit(0, "ends", 0, FOUR, WHOLE), {"ends": [-2]}, {}),
        (RatioEdit(0, "group", SIX, 3), {"group": 2}, {"group": 1}),
        (RatioEdit(0, "group", SIX, FOUR), {"group": 9}, {"group": 1}),
        (SplitEdit(0, (SIX, FOUR, WHOLE)), {"split": [6, 4, 5]}, {"split": [3, 3, 5]}),
        (SplitEdit(0, (SIX, FOUR)), {}, {}),  # equal parts, or an input
        (PinEdit(0, "scale", 0.25, SIX), {}, {"scale": 0.25}),
        (PinEdit(0, "scale", 0.25, WHOLE), {}, {}),
    ],
    ids=str,
)
def test_attributes(edit: Edit, attributes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert attribute_values([edit], node("Any", **attributes), keep) == expected


def test_several_elements_of_one_attribute() -> None:
    edits: list[Edit] = [SizeEdit(0, "shape", 1, SIX), SizeEdit(0, "shape", 2, FOUR)]
    assert attribute_values(edits, node("Reshape", shape=[2, 6, 4]), keep) == {"shape": [2, 3, 3]}


def test_tensors_lose_what_their_label_loses() -> None:
    values = np.arange(5 * 6 * 4).reshape(5, 6, 4)
    assert {axis: kept.tolist() for axis, kept in kept_by_axis((WHOLE, SIX, FOUR), keep).items()} == {
        1: [0, 2, 3],
        2: [0, 2, 3],
    }
    cut = slice_label(values, (None, SIX, FOUR), keep)
    np.testing.assert_array_equal(cut, values[:, [0, 2, 3]][:, :, [0, 2, 3]])
    assert cut.flags["C_CONTIGUOUS"]
    assert slice_label(values, (WHOLE, None, None), keep).shape == values.shape


@pytest.mark.parametrize(
    ("indices", "axis", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], 0, [0, 1, 2]),
        ([5, 3, 3, 0], 0, [2, 2, 0]),
        ([[0, 2], [1, 3]], 0, [[0, 1]]),  # a row that reads what is removed goes
        ([[0, 1, 2], [3, 1, 0]], 1, [[0, 1], [2, 0]]),
        ([-1, -6], 0, [0]),
    ],
)
def test_indices_follow_the_positions_that_stay(indices: list[Any], axis: int, expected: list[Any]) -> None:
    found = remap(np.array(indices, np.int32), SIX, keep, axis)
    assert found.tolist() == expected
    assert found.dtype == np.int32


def test_one_index_and_indices_into_a_whole_axis() -> None:
    assert remap(np.array(3), SIX, keep).tolist() == 2
    indices = np.array([4, 0])
    assert remap(indices, WHOLE, keep) is indices


# Nodes that correct what is computed


def corrected(fix: SizeFix, opset: int, computed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the nodes make of a computed number, by ONNX Runtime."""
    value, nodes, stored = "x", [], []
    for place, step in enumerate(corrections(fix, opset)):
        names = {name: f"{step.name}.{name}" for name in step.constants}
        stored += [onnx.numpy_helper.from_array(np.asarray(v), names[n]) for n, v in step.constants.items()]
        nodes.append(helper.make_node(step.op_type, step.inputs(value, list(names.values())), [f"y{place}"], step.name))
        value = f"y{place}"
    kind = ELEMENT[computed.dtype.kind]
    border = [helper.make_tensor_value_info(name, kind, None) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", border[:1], border[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    with Session(model, CPU) as session:
        return np.asarray(session.run({"x": computed})[value])


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    numbers=st.lists(st.tuples(st.integers(1, 48), st.integers(1, 48)), min_size=1, max_size=4),
    times=st.integers(1, 5),
    real=st.booleans(),
)
def test_numbers_are_scaled_so_that_dynamic_sizes_stay_dynamic(
    numbers: list[tuple[int, int]], times: int, real: bool
) -> None:
    required, actual = (np.array(side, np.float32 if real else np.int64) for side in zip(*numbers, strict=True))
    found = corrected(SizeFix(0, 0, required, actual), 13, actual * times)
    np.testing.assert_allclose(found, np.where(required == actual, actual, required) * times, rtol=1e-6)
    assert found.dtype == required.dtype


def test_a_factor_is_one_node_and_a_fraction_two() -> None:
    def kinds(required: list[Any], actual: list[Any], dtype: Any = np.int64) -> list[str]:
        fix = SizeFix(0, 0, np.array(required, dtype), np.array(actual, dtype))
        return [step.op_type for step in corrections(fix, 13)]

    assert kinds([6], [3]) == ["Mul"]
    assert kinds([4], [6]) == ["Mul", "Div"]
    assert kinds([4], [6], np.float32) == ["Mul"]
    assert kinds([4], [0]) == ["Where"]  # nothing times zero is four
    assert kinds([4.0], [np.inf], np.float32) == ["Where"]
    assert kinds([True], [False], np.bool_) == ["Where"]


@pytest.mark.parametrize(("opset", "kinds"), [(13, ["Where"]), (9, ["Where"]), (8, ["Mul", "Add"])])
def test_what_cannot_be_scaled_is_written_over(opset: int, kinds: list[str]) -> None:
    fix = SizeFix(0, 0, np.array([4, 7, 5]), np.array([0, 7, 0]))
    assert [step.op_type for step in corrections(fix, opset)] == kinds
    if opset > 8:  # the kernels of ONNX Runtime for integers
        assert corrected(fix, opset, np.array([0, 14, 0])).tolist() == [4, 14, 5]
    else:
        (clear, write) = corrections(fix, opset)
        assert clear.constants["mask"].tolist() == [0, 1, 0]
        assert write.constants["value"].tolist() == [4, 0, 5]


def test_one_number_is_corrected_at_every_element() -> None:
    assert corrected(SizeFix(0, 0, np.array([4, 8]), np.array(2)), 13, np.array([2, 2])).tolist() == [4, 8]
