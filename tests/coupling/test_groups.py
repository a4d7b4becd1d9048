"""Units, groups and axes of small networks, written down by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, finished, weights

import onnxcop
from onnxcop.analysis.analyze import analyze
from onnxcop.coupling.groups import Structure, structure_of
from onnxcop.coupling.ops.facts import Mac

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def structure(model: onnx.ModelProto) -> Structure:
    return analyze(model, options=CPU).structure


def from_x_to_y(nodes: Sequence[onnx.NodeProto], stored: Sequence[onnx.TensorProto], width: int = 4) -> onnx.ModelProto:
    """A model of nodes that read `x`, of 8 channels, and make `y`."""
    sizes = (("x", 8), ("y", width))
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in sizes]
    return finished(helper.make_graph(nodes, "g", border[:1], border[1:], stored))


def residual() -> onnx.ModelProto:
    """A layer whose sum with its own input is read by two layers, of which one is joined with the other twice."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w2"], ["b"], "two"),
        helper.make_node("Add", ["r", "b"], ["s"], "add"),
        helper.make_node("MatMul", ["s", "w3"], ["c"], "three"),
        helper.make_node("Concat", ["s", "c", "s"], ["j"], "joined", axis=1),
        helper.make_node("MatMul", ["j", "w4"], ["y"], "four"),
    ]
    stored = [weights("w1", (8, 6)), weights("w2", (6, 6)), weights("w3", (6, 4)), weights("w4", (16, 5))]
    return from_x_to_y(nodes, stored, width=5)


def test_filters_of_a_chain() -> None:
    found = structure(chain())
    first, second = found.groups
    assert [first.index, second.index] == [0, 1]
    assert (first.width, second.width) == (8, 16)
    assert first.units.tolist() == list(range(8))
    assert second.units.tolist() == list(range(8, 24))
    assert (first.producers, first.consumers) == ((0,), (2,))
    assert (second.producers, second.consumers) == ((2,), (6,))
    assert first.exact and second.exact and first.reasons == second.reasons == ()
    assert found.group_of.tolist() == [0] * 8 + [1] * 16
    assert found.class_unit[found.unit_class].tolist() == list(range(24))
    assert sorted(found.class_unit[found.class_unit >= 0]) == list(range(24))
    assert (found.class_unit >= 0).sum() == 24
    assert found.unit_class.dtype == found.group_of.dtype == np.int64


def test_axes_of_a_chain_hold_every_unit_once() -> None:
    found = structure(chain())
    weights_of_second = found.coupling.labels["w2"]
    out, into = weights_of_second[:2]
    assert out is not None and into is not None
    assert found.units_on(into).tolist() == list(range(8))
    assert found.units_on(out).tolist() == list(range(8, 24))
    assert found.axis_sizes[found.axis_id(into)] == 8
    assert found.axis_sizes[found.axis_id(out)] == 16
    dense = found.incidence.toarray()
    assert dense[:8, found.axis_id(into)].tolist() == [1] * 8
    assert dense[8:, found.axis_id(into)].sum() == 0
    assert dense[8:, found.axis_id(out)].tolist() == [1] * 16
    assert set(found.limited_axes) >= {found.axis_id(into), found.axis_id(out)}
    assert found.axis_id(into) == found.axis_id(found.coupling.labels["b1"][0])  # one axis, wherever it occurs
    classes = found.coupling.labels["w3"][0]  # what the output fixes
    assert classes is None or (found.units_on(classes) == -1).all()


def test_a_sum_is_one_group_and_a_join_counts_it_twice() -> None:
    found = structure(residual())
    wide, narrow = sorted(found.groups, key=lambda group: -group.width)
    assert (wide.width, narrow.width) == (6, 4)
    assert wide.producers == (0, 2)
    assert wide.consumers == (2, 4, 6)
    assert (narrow.producers, narrow.consumers) == ((4,), (6,))
    joined = found.coupling.labels["w4"][0]
    assert joined is not None
    assert found.axis_sizes[found.axis_id(joined)] == 16
    column = found.incidence.toarray()[:, found.axis_id(joined)]
    assert column[wide.units].tolist() == [2] * 6
    assert column[narrow.units].tolist() == [1] * 4
    units = found.units_on(joined).tolist()
    assert units[:6] == units[10:] == wide.units.tolist()
    assert units[6:10] == narrow.units.tolist()


def test_a_class_that_is_a_whole_axis_stays() -> None:
    """Two channels of which each is added to the other must go together, and nothing would be left."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
        helper.make_node("Gather", ["a", "order"], ["t"], "turned", axis=1),
        helper.make_node("Add", ["a", "t"], ["s"], "sum"),
        helper.make_node("MatMul", ["s", "w2"], ["h"], "two"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w3"], ["y"], "three"),
    ]
    stored = [weights("w1", (8, 2)), weights("w2", (2, 6)), weights("w3", (6, 4))]
    stored.append(onnx.numpy_helper.from_array(np.array([1, 0]), "order"))
    found = structure(from_x_to_y(nodes, stored))
    assert [group.width for group in found.groups] == [6]
    pair = found.coupling.labels["w1"][1]
    assert pair is not None
    assert found.units_on(pair).tolist() == [-1, -1]


def test_what_a_statistic_depends_on_is_a_group_of_its_own() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], "one"),
        helper.make_node("LayerNormalization", ["m", "scale"], ["n"], "norm", axis=-1),
        helper.make_node("MatMul", ["n", "w2"], ["h"], "two"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w3"], ["y"], "three"),
    ]
    stored = [weights("w1", (8, 16)), weights("w2", (16, 16)), weights("w3", (16, 4)), weights("scale", (16,))]
    found = structure(from_x_to_y(nodes, stored))
    inexact, exact = found.groups
    assert (inexact.exact, exact.exact) == (False, True)
    assert inexact.reasons and not exact.reasons
    assert any(reason.node == "norm" for reason in inexact.reasons)


def test_nothing_to_remove() -> None:
    found = structure(chain(widths=(1, 1)))
    assert found.groups == ()
    assert found.incidence.shape[0] == len(found.unit_class) == len(found.group_of) == 0


def test_units_that_differ_in_what_they_reach_are_groups_of_their_own() -> None:
    """Of three channels the first two change places before they are added, so they go together."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
        helper.make_node("Gather", ["a", "order"], ["t"], "turned", axis=1),
        helper.make_node("Add", ["a", "t"], ["s"], "sum"),
        helper.make_node("MatMul", ["s", "w2"], ["y"], "two"),
    ]
    stored = [weights("w1", (8, 3)), weights("w2", (3, 4)), onnx.numpy_helper.from_array(np.array([1, 0, 2]), "order")]
    found = structure(from_x_to_y(nodes, stored))
    assert [group.width for group in found.groups] == [1, 1]
    assert [group.units.tolist() for group in found.groups] == [[0], [1]]
    axis = found.coupling.labels["w1"][1]
    assert axis is not None
    assert found.units_on(axis).tolist() == [0, 0, 1]


def test_axes_that_only_count_work_are_not_limited() -> None:
    """At least one index of every axis of a tensor stays; what is merely counted may vanish."""
    coupling = structure(chain()).coupling
    axis = coupling.labels["w1"][0]
    assert axis is not None
    part = axis[:3].copy()
    changed = replace(coupling, findings=replace(coupling.findings, macs=[Mac(0, 1.0, (part,))]))
    found = structure_of(changed)
    assert found.axis_id(part) not in found.limited_axes
    assert found.axis_id(axis) in found.limited_axes
    assert found.axis_sizes[found.axis_id(part)] == 3


def test_a_structure_does_not_change() -> None:
    found = structure(chain())
    with pytest.raises(FrozenInstanceError):
        found.groups = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        found.groups[0].exact = False  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        found.coupling.labels = {}  # type: ignore[misc]
