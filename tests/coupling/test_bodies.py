"""Bodies of If, Loop and Scan: pruned inside, and coupled to what they read and give out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from body_models import model
from onnx import TensorProto, helper, parser
from ops.oracle import CPU, draw_units, prune_and_verify
from small_models import weights

import onnxcop
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.census import census
from onnxcop.coupling.tracing import trace
from onnxcop.errors import VerificationError
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.shapes import infer
from onnxcop.graph.subgraphs import Scopes, make_names_unique
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import Session
from onnxcop.verification.difference import relative_difference
from onnxcop.verification.masked_model import masked
from onnxcop.verification.verify import verify


def _widths(analysis: Analysis) -> dict[str, tuple[int, int]]:
    """Filters and how many of them may go, by the output of the layer."""
    return {analysis.nodes[e.node].output[0]: (e.filters, e.prunable) for e in census(analysis)}


def _dims(found: onnx.ModelProto) -> dict[str, list[int]]:
    return {name: list(tensor.dims) for name, tensor in constant_tensors(found).items()}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["branches", "loop", "scan", "nested"])
def test_pruned_equals_masked(name: str, inside: bool) -> None:
    analysis = analyze(model(name, inside=inside), options=CPU)
    assert not analysis.structure.coupling.declined
    prune_and_verify(analysis.model, analysis.structure, seed=1)


def test_branches_are_tied_and_captured_filters_sliced() -> None:
    analysis = analyze(model("branches"), options=CPU)
    structure = analysis.structure
    assert sorted(group.width for group in structure.groups) == [8, 10, 12]
    assert _widths(analysis) == {"c1": (8, 8), "l1": (10, 10), "l4": (12, 12), "r2": (12, 12), "y": (5, 0)}
    for group, sizes in (
        (8, {"w1": [5, 3, 3, 3], "wl": [10, 5, 3, 3], "wr": [12, 5, 3, 3]}),
        (10, {"wl": [7, 8, 3, 3], "wl2": [12, 7, 1, 1]}),
        (12, {"wl2": [9, 10, 1, 1], "wr": [9, 8, 3, 3], "w3": [9, 5]}),
    ):
        units = next(g.units for g in structure.groups if g.width == group)
        pruned = apply(analysis.model, structure, units[:3])
        assert _dims(pruned) == _dims(analysis.model) | sizes
        onnx.checker.check_model(pruned, full_check=True)
        declared = {value.name: value for scope in Scopes.of(pruned).all[1:] for value in scope.graph.output}
        channels = {name: value.type.tensor_type.shape.dim[1].dim_value for name, value in declared.items()}
        kept = 9 if group == 12 else 12
        assert channels == {"l4": kept, "r4": kept}


@pytest.mark.parametrize("choice", [True, False])
def test_either_branch_is_the_masked_one(choice: bool) -> None:
    analysis = analyze(model("branches"), options=CPU)
    removed = draw_units(analysis.structure, 0.5, seed=3)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32), "choice": np.array(choice)}
    expected = Session(masked(analysis.model, analysis.structure, removed), CPU).run(feeds)["y"]
    found = Session(apply(analysis.model, analysis.structure, removed), CPU).run(feeds)["y"]
    gap = relative_difference(expected, found)
    assert gap is not None and gap < 1e-5
    assert found.std() > 0


def test_verification_sees_the_branch_that_random_inputs_do_not_take() -> None:
    analysis = analyze(model("branches"), options=CPU)
    removed = next(g.units for g in analysis.structure.groups if g.width == 10)[:3]
    for name, seed in (("wl2", 0), ("wl2", 1)):  # of the then_branch, whatever the draws of `choice` are
        pruned = apply(analysis.model, analysis.structure, removed)
        tensor = constant_tensors(pruned)[name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 2, name))
        with pytest.raises(VerificationError, match="differs from the masked original"):
            verify(analysis.model, pruned, analysis.structure, removed, CPU, seed=seed)


def test_a_state_is_tied_through_all_steps() -> None:
    analysis = analyze(model("loop"), options=CPU)
    groups = analysis.structure.groups
    assert sorted(group.width for group in groups) == [9, 16]
    units = next(g.units for g in groups if g.width == 16)[:4]
    sizes = {"w0": [6, 12], "wa": [12, 9], "wb": [9, 12], "w1": [12, 4]}
    pruned = apply(analysis.model, analysis.structure, units)
    assert _dims(pruned) == _dims(analysis.model) | sizes
    body = Scopes.of(pruned).all[1].graph
    assert body.input[2].type.tensor_type.shape.dim[1].dim_value == 12


def test_work_is_counted_as_often_as_it_is_done() -> None:
    macs = {}
    for name in ("loop", "scan", "branches"):
        analysis = analyze(model(name), options=CPU)
        by_node = analysis.cost.by_node(analysis.structure.axis_sizes)
        macs[name] = {analysis.nodes[number].output[0]: cost for number, cost in by_node.items()}
    assert macs["loop"]["a"] == 3 * 16 * 9
    assert macs["loop"]["h0"] == 6 * 16
    assert macs["scan"]["b"] == 5 * 16 * 16
    assert macs["branches"]["l1"] == 64 * 10 * 8 * 9
    assert macs["branches"]["r2"] == 64 * 12 * 8 * 9


def test_a_state_that_is_an_input_stays() -> None:
    changed = model("scan")
    del changed.graph.initializer[[t.name for t in changed.graph.initializer].index("zero")]
    changed.graph.input.append(helper.make_tensor_value_info("zero", TensorProto.FLOAT, ["N", 16]))
    analysis = analyze(changed, options=CPU)
    assert _widths(analysis)["b"] == (16, 0)
    assert _widths(analysis)["d"] == (10, 10)
    reasons = {reason.text for entry in census(analysis) for reason in entry.reasons}
    assert "is combined with an axis that is never pruned" in reasons


def test_branches_of_different_shape_are_frozen() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3,8,8] x, bool choice) => (float[N,5] y)
    {
      c1 = Conv (x, w1)
      b = If (choice) <
        then_branch = left () => (float[N,12,8,8] l) { l = Conv (c1, wl) },
        else_branch = right () => (float[N,10,8,8] r) { r = Conv (c1, wr) }
      >
      p = GlobalAveragePool (b)
      m = ReduceMean <axes=[1], keepdims=0> (p)
      f = Flatten (m)
      y = Gemm (f, w3)
    }
    """
    built = parser.parse_model(text)
    shapes = {"w1": (8, 3, 1, 1), "wl": (12, 8, 1, 1), "wr": (10, 8, 1, 1), "w3": (1, 5)}
    built.graph.initializer.extend(weights(name, shape) for name, shape in shapes.items())
    analysis = analyze(built, options=CPU)
    assert _widths(analysis) == {"c1": (8, 8), "l": (12, 0), "r": (10, 0), "y": (5, 0)}
    prune_and_verify(analysis.model, analysis.structure, seed=0)


def test_stacked_outputs_of_a_loop_keep_their_other_axes() -> None:
    """The new axis of stacked outputs is the first; the channels behind it are those of the body."""
    analysis = analyze(model("scan"), options=CPU)
    assert _widths(analysis) == {"d": (10, 10), "a": (16, 16), "b": (16, 16), "y": (4, 0), "ys": (4, 0)}
    assert [len(a) if a is not None else None for a in analysis.structure.coupling.labels["hs"]] == [None, None, 16]


@pytest.mark.parametrize("sized", [True, False])
def test_branches_of_different_rank_are_frozen_in_both(sized: bool) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,6] x, bool choice) => (float[N,5] y)
    {
      c1 = MatMul (x, w1)
      b = If (choice) <
        then_branch = left () => (float[A,12] l) { l = MatMul (c1, wl) },
        else_branch = right () => (float[A,1,10] r) { e = Unsqueeze (c1, one) r = MatMul (e, wr) }
      >
      y = MatMul (c1, w3)
    }
    """
    built = parser.parse_model(text.replace("=> (float[N,5] y)", "=> (float[N,5] y, float b)"))
    built.graph.output[1].type.tensor_type.ClearField("shape")
    shapes = {"w1": (6, 8), "wl": (8, 12), "wr": (8, 10), "w3": (8, 5)}
    built.graph.initializer.extend(weights(name, shape) for name, shape in shapes.items())
    built.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    if sized:  # the number of rows decides
        built.graph.node[1].input[0] = "many"
        for position, node in enumerate([
            helper.make_node("Size", ["x"], ["size"]), helper.make_node("Greater", ["size", "limit"], ["many"]),
        ]):  # fmt: skip
            built.graph.node.insert(position, node)
        built.graph.initializer.append(onnx.numpy_helper.from_array(np.array(60), "limit"))
        del built.graph.input[1]
    analysis = analyze(built, options=CPU)
    assert _widths(analysis) == {"c1": (8, 8), "l": (12, 0), "r": (10, 0), "y": (5, 0)}
    reasons = {reason.text for entry in census(analysis) for reason in entry.reasons}
    assert any("and a dynamic size decides between them" in text for text in reasons) == sized
    assert ("differs in shape between branches or steps" in reasons) != sized


def test_sizes_computed_in_a_body_follow() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3,4,4] x, bool choice) => (float[N,6] y, int64 channels)
    {
      c1 = Conv (x, w1)
      full = Shape (c1)
      f, n = If (choice) <
        then_branch = left () => (float[N,128] l, int64 k) {
          r = Relu (c1)
          shape = Constant <value = int64[2] {0, 128}> ()
          l = Reshape (r, shape)
          one = Constant <value = int64 {1}> ()
          k = Gather (full, one)
        },
        else_branch = right () => (float[N,128] e, int64 j) {
          s = Shape <start = 0, end = 1> (c1)
          rest = Constant <value = int64[1] {128}> ()
          whole = Concat <axis = 0> (s, rest)
          e = Reshape (c1, whole)
          place = Constant <value = int64 {1}> ()
          all = Shape (c1)
          j = Gather (all, place)
        }
      >
      y = MatMul (f, w2)
      channels = Identity (n)
    }
    """
    built = parser.parse_model(text)
    built.graph.initializer.extend([weights("w1", (8, 3, 1, 1)), weights("w2", (128, 6))])
    analysis = analyze(built, options=CPU)
    assert _widths(analysis)["c1"] == (8, 8)
    removed = analysis.structure.groups[0].units[:3]
    pruned = apply(analysis.model, analysis.structure, removed)
    verify(analysis.model, pruned, analysis.structure, removed, CPU)
    for choice in (True, False):  # with another batch than the traced one only the batch follows
        found = Session(pruned, CPU).run({"x": np.ones((2, 3, 4, 4), np.float32), "choice": np.array(choice)})
        assert found["y"].shape == (2, 6)
        assert found["channels"] == 8


def test_names_that_branches_share_become_unique() -> None:
    shared = model("nested")
    before = {name: list(tensor.dims) for name, tensor in constant_tensors(shared).items()}
    renamed = make_names_unique(shared)
    assert renamed == {"l4_2": "l4"}
    assert not Scopes.of(shared).reused()
    assert make_names_unique(shared) == {}
    assert _dims(shared) == before
    onnx.checker.check_model(shared, full_check=True)


def test_unknown_bodies_freeze_what_they_read() -> None:
    built = model("branches")
    built.graph.node[2].op_type = "Either"
    built.graph.node[2].domain = "my.domain"
    built.opset_import.append(helper.make_opsetid("my.domain", 1))
    analysis = analyze(built, options=CPU)
    assert _widths(analysis)["c1"] == (8, 0)
    first = analysis.structure.coupling.declined[0]
    assert (first[0], str(first[1])) == (2, "Either holds a graph of its own (Either → b)")


@pytest.mark.parametrize("criterion", ["cop", "l1", "l2", "fpgm", "random"])
def test_the_whole_way(criterion: str) -> None:
    result = onnxcop.prune(model("branches"), macs=0.6, criterion=criterion, recover="none", options=CPU)
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    checked = result.report.verification
    assert checked is not None and checked.max_difference is not None and checked.max_difference < 1e-5


def _between_convolutions() -> onnx.ModelProto:
    """The branches with two convolutions after them."""
    built = model("branches")
    nodes = [
        helper.make_node("Conv", ["b", "wd"], ["d"], pads=[1] * 4),
        helper.make_node("Conv", ["d", "we"], ["e"], pads=[1] * 4),
    ]
    built.graph.node[3].input[0] = "e"
    following = list(built.graph.node)
    del built.graph.node[:]
    built.graph.node.extend([*following[:3], *nodes, *following[3:]])
    built.graph.initializer.extend([weights("wd", (14, 12, 3, 3)), weights("we", (12, 14, 3, 3))])
    return built


def _samples() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((24, 3, 8, 8)).astype(np.float32), "choice": np.array(True)}


@pytest.mark.parametrize("criterion", ["wanda", "cop-activation", "cop-multiple"])
def test_units_that_only_bodies_read_have_scores(criterion: str) -> None:
    analysis = onnxcop.analyze(_between_convolutions(), input_shapes={"x": (1, 3, 8, 8), "choice": ()})
    stats = onnxcop.statistics(analysis, data=_samples(), options=CPU)
    structure = analysis.structure
    context = onnxcop.PruningContext.of(analysis.model, structure, analysis.cost, stats)
    importance = onnxcop.criterion_named(criterion).rank(context).importance(structure.axis_sizes)
    inside = next(group for group in structure.groups if group.width == 10)
    found = importance[inside.units]
    assert np.isfinite(found).all()
    assert len(np.unique(found)) == 10


def test_recovery_leaves_bodies_as_they_are() -> None:
    result = onnxcop.prune(
        _between_convolutions(), macs=0.7, data=_samples(), recover="full", options=CPU,
        input_shapes={"x": (1, 3, 8, 8), "choice": ()},
    )  # fmt: skip
    assert result.report.after.macs <= 0.7 * result.report.before.macs
    assert result.report.quality["divergence"] < 1
    inside = constant_tensors(model("branches"))
    for name in ("wl", "wr"):
        whole = onnx.numpy_helper.to_array(inside[name]).ravel()
        assert np.isin(onnx.numpy_helper.to_array(constant_tensors(result.model)[name]), whole).all()


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_16k_op15"])
def test_a_model_inside_one_branch_reaches_its_budget(zoo: Path, name: str) -> None:
    result = onnxcop.prune(zoo / "trained" / f"{name}.onnx", macs=0.7, criterion="l2", recover="none", options=CPU)
    assert result.report.after.macs <= 0.7 * result.report.before.macs
    checked = result.report.verification
    assert checked is not None and checked.max_difference is not None and checked.max_difference < 1e-4


SQUEEZED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,3,8,1] x) => (float[2,5] y)
{
  c1 = Conv (x, w1)
  shape = Shape (c1)
  last = Constant <value = int64 {3}> ()
  width = Gather (shape, last)
  one = Constant <value = int64 {1}> ()
  thin = Equal (width, one)
  s = If (thin) <
    then_branch = squeezed () => (float[2,16,8] t) {
      axes = Constant <value = int64[1] {3}> ()
      t = Squeeze (c1, axes)
    },
    else_branch = whole () => (float[2,16,8,1] e) { e = Identity (c1) }
  >
  z = Conv (s, w2)
  m = ReduceMean <axes=[2], keepdims=0> (z)
  y = MatMul (m, w3)
}
"""


def _squeezed() -> onnx.ModelProto:
    built = parser.parse_model(SQUEEZED)
    shapes = {"w1": (16, 3, 1, 1), "w2": (9, 16, 3), "w3": (9, 5)}
    built.graph.initializer.extend(weights(name, shape) for name, shape in shapes.items())
    return built


def test_an_if_that_sizes_settle_is_replaced_by_its_branch() -> None:
    analysis = analyze(_squeezed(), options=CPU)
    assert "If" not in [node.op_type for node in analysis.nodes]
    assert _widths(analysis) == {"c1": (16, 16), "z": (9, 9), "y": (5, 0)}
    prune_and_verify(analysis.model, analysis.structure, seed=2)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 1)).astype(np.float32)
    one, two = (Session(m, CPU).run({"x": x})["y"] for m in (analysis.original, analysis.model))
    np.testing.assert_array_equal(one, two)


def test_an_if_that_a_dynamic_size_decides_stays() -> None:
    built = _squeezed()
    built.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "W"
    analysis = analyze(built, options=CPU, input_shapes={"x": (2, 3, 8, 1)})
    assert "If" in [node.op_type for node in analysis.nodes]
    assert _widths(analysis) == {"c1": (16, 0), "z": (9, 9), "y": (5, 0)}
    reasons = {reason.text for entry in census(analysis) for reason in entry.reasons}
    assert "differs in shape between branches, and a dynamic size decides between them" in reasons
    prune_and_verify(analysis.model, analysis.structure, seed=2)


def test_settled_branches_inside_bodies_keep_what_they_store() -> None:
    built = model("nested")
    del built.graph.input[2]
    built.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "deep"))
    before = analyze(model("nested"), options=CPU)
    analysis = analyze(built, options=CPU)
    assert [node.op_type for node in analysis.nodes].count("If") == 1
    assert {"wi", "wr", "w1", "w3"} <= constant_tensors(analysis.model).keys()
    prune_and_verify(analysis.model, analysis.structure, seed=2)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32), "choice": np.array(True)}
    found = Session(analysis.model, CPU).run(feeds)["y"]
    expected = Session(before.model, CPU).run(feeds | {"deep": np.array(True)})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_functions_called_in_a_body_are_inlined() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N,3,4,4] x, bool choice) => (float[N,6] y)
    {
      c1 = Conv (x, w1)
      b = If (choice) <
        then_branch = left () => (float[N,9,4,4] l) { l = local.block (c1, wl) },
        else_branch = right () => (float[N,9,4,4] r) { r = Conv (c1, wr) }
      >
      p = GlobalAveragePool (b)
      f = Flatten (p)
      y = MatMul (f, w2)
    }
    <domain: "local", opset_import: ["" : 17]>
    block (a, w) => (z)
    {
      r = Relu (a)
      z = Conv (r, w)
    }
    """
    built = parser.parse_model(text)
    shapes = {"w1": (8, 3, 1, 1), "wl": (9, 8, 1, 1), "wr": (9, 8, 1, 1), "w2": (9, 6)}
    built.graph.initializer.extend(weights(name, shape) for name, shape in shapes.items())
    analysis = analyze(built, options=CPU)
    assert not analysis.structure.coupling.declined
    assert sorted(group.width for group in analysis.structure.groups) == [8, 9]
    prune_and_verify(analysis.model, analysis.structure, seed=0)


def _recognizer(**attributes: Any) -> onnx.ModelProto:
    """Two convolutions, their columns as a sequence, and a recurrent layer read by all its outputs."""
    both = 2 if attributes.get("direction") == "bidirectional" else 1
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4, strides=[4, 1]),
        helper.make_node("Squeeze", ["c2", "two"], ["s"]),
        helper.make_node("Transpose", ["s"], ["t"], perm=[2, 0, 1]),
        helper.make_node("LSTM", ["t", "W", "R", "B", "", "h0", "k0"], ["Y", "Yh", "Yc"], hidden_size=7, **attributes),
        helper.make_node("Transpose", ["Y"], ["yt"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["yt", "flat"], ["q"]),
        helper.make_node("MatMul", ["q", "w3"], ["y"]),
        helper.make_node("Add", ["Yh", "Yc"], ["last"]),
        helper.make_node("MatMul", ["last", "w4"], ["z"]),
    ]
    shapes = {
        "w1": (8, 3, 3, 3), "w2": (10, 8, 3, 3), "W": (both, 28, 10), "R": (both, 28, 7), "B": (both, 56),
        "h0": (both, 1, 7), "k0": (both, 1, 7), "w3": (both * 7, 5), "w4": (7, 5),
    }  # fmt: skip
    stored = [weights(name, shape) for name, shape in shapes.items()]
    stored.append(onnx.numpy_helper.from_array(np.array([2]), "two"))
    stored.append(onnx.numpy_helper.from_array(np.array([0, 0, both * 7]), "flat"))
    graph = helper.make_graph(
        nodes,
        "recognizer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 12])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [12, 1, 5]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [both, 1, 5]),
        ],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_convolutions_before_and_states_of_a_recurrent_layer_are_cut(direction: str) -> None:
    analysis = analyze(_recognizer(direction=direction), options=CPU)
    assert sorted(group.width for group in analysis.structure.groups) == [7, 8, 10]
    prune_and_verify(analysis.model, analysis.structure, seed=1)
    hidden = next(g.units for g in analysis.structure.groups if g.width == 7)[:3]
    both = 2 if direction == "bidirectional" else 1
    sizes = {"W": [both, 16, 10], "R": [both, 16, 4], "B": [both, 32], "h0": [both, 1, 4], "k0": [both, 1, 4],
             "w3": [both * 4, 5], "w4": [4, 5]}  # fmt: skip
    pruned = apply(analysis.model, analysis.structure, hidden)
    assert _dims(pruned) == _dims(analysis.model) | sizes


def test_a_recurrent_layer_in_a_branch_that_does_not_fit_is_declined() -> None:
    """A branch that the analysed sizes never take may well hold operators whose inputs have the wrong rank."""
    built = _recognizer()
    built.graph.node[3].CopyFrom(helper.make_node("Identity", ["c2"], ["s"]))
    built.graph.node[4].CopyFrom(helper.make_node("Transpose", ["s"], ["t"], perm=[3, 0, 2, 1]))
    coupling = trace(built, infer(built, {"x": (1, 3, 4, 12)}))
    assert next(str(reason) for _, reason in coupling.declined).startswith("a recurrent layer of an input with 4 axes")


def test_a_recurrent_state_that_is_given_keeps_the_hidden_size_only() -> None:
    built = _recognizer(direction="forward")
    del built.graph.initializer[[t.name for t in built.graph.initializer].index("h0")]
    built.graph.input.append(helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, 1, 7]))
    analysis = analyze(built, options=CPU)
    assert sorted(group.width for group in analysis.structure.groups) == [8, 10]
    (entry,) = [e for e in census(analysis) if analysis.nodes[e.node].op_type == "LSTM"]
    assert entry.prunable == 0
    assert next(iter(entry.reasons)).text == "belongs to a recurrent state that is given or never pruned"
