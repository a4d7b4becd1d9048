"""Corners of operator rules that random samples seldom reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from onnxcop.coupling.atoms import AtomPool
from onnxcop.coupling.ops import Op
from onnxcop.coupling.ops.facts import Findings, SizeEdit
from onnxcop.coupling.ops.reshape import blocks_of
from onnxcop.coupling.result import Coupling
from onnxcop.coupling.tracing import trace
from onnxcop.graph.shapes import infer
from ops.oracle import analyse, check_labels, check_moves, check_removal, prune_and_verify, trace_alone
from ops.sample import Sample, floats, ints, positive

MICROSOFT = "com.microsoft"


def kept(op: str, inputs: tuple[Any, ...], live: dict[int, tuple[int, ...]], units: int, **more: Any) -> Sample:
    """A sample of which this many units remain free."""
    return Sample(op, inputs, live, units=units, **more)


QUANTIZED = (
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    *(
        np.array(value, kind)
        for value, kind in ((0.05, np.float32), (9, np.uint8), (1 / 256, np.float32), (0, np.uint8))
    ),
)
EXACT = {
    "a scale for each index of axis 1, which is the default": kept(
        "QuantizeLinear", (floats((2, 4, 3)), positive((4,)) * 0.1, np.arange(4, dtype=np.uint8)), {0: (1,)}, 4
    ),
    "an axis cut in steps to an end counted from behind": kept(
        "Slice", (floats((2, 9)), ints(0), ints(-2), ints(1), ints(2)), {0: (1,)}, 5, moves=True
    ),
    "an axis cut in steps from the end of the first step on": kept(
        "Slice", (floats((2, 8)), ints(2), ints(8), ints(1), ints(2)), {0: (1,)}, 0, moves=False
    ),
    "a softmax of the first opset that takes one axis": kept(
        "Softmax", (floats((2, 3, 4)),), {0: (1, 2)}, 4, attributes={"axis": 1}, opset=13
    ),
    "a softmax of the last opset that takes all axes from one on": kept(
        "Softmax", (floats((2, 3, 4)),), {0: (1, 2)}, 0, attributes={"axis": 1}, opset=12
    ),
    "a largest value whose place is not asked for": kept(
        "MaxPool",
        (floats((2, 4, 4, 4)),),
        {0: (1,)},
        4,
        attributes={"kernel_shape": [2, 2]},
        outputs=2,
        skip_outputs=(1,),
    ),
    "a convolution that adds another tensor, as onnxruntime fuses it": kept(
        "FusedConv",
        (floats((3, 2, 5, 5)), floats((4, 2, 1, 1), 1), floats((4,), 2), floats((3, 4, 5, 5), 3)),
        {0: (0, 1), 3: (0, 1)},
        9,
        attributes={"kernel_shape": [1, 1], "activation": "Relu"},
        domain=MICROSOFT,
    ),
    "a size that is copied from an axis in front of another one": kept(
        "Reshape", (floats((4, 2, 2)), ints(2, 0, 4)), {0: (0,)}, 2, moves=True
    ),
    "a size that is copied from an axis that stays": kept(
        "Reshape", (floats((4, 2, 3)), ints(1, 0, 2, 6)), {0: (0,)}, 2, moves=True
    ),
    "a softmax of bytes over one axis, as from opset 13 on": kept(
        "QLinearSoftmax", QUANTIZED, {0: (1, 2)}, 4, attributes={"axis": 1, "opset": 13}, domain=MICROSOFT
    ),
    "a softmax of bytes over all axes from one on, as before opset 13": kept(
        "QLinearSoftmax", QUANTIZED, {0: (1, 2)}, 0, attributes={"axis": 1, "opset": 12}, domain=MICROSOFT
    ),
    "positions to sample at, computed from channels": kept(
        "GridSample", (floats((2, 4, 5, 5)), np.tanh(floats((2, 3, 3, 2), 1))), {0: (1,), 1: (1,)}, 4, opset=16
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_corner(name: str) -> None:
    sample = EXACT[name]
    if sample.moves:
        check_labels(sample)
    check_moves(sample)
    check_removal(sample)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_of_constants_alone_is_a_one_hot_encoding(axis: int) -> None:
    shape = [2, 3, 4]
    data, known = floats([1 if place == axis else size for place, size in enumerate(shape)]), floats(shape, 1)
    sample = kept("Less", (data, known), {0: tuple(place for place in range(3) if place != axis)}, 9 - shape[axis])
    check_removal(sample)
    classes, label = _traced(sample).classes, _traced(sample).labels["in1"]
    for place, atoms in enumerate(label):
        assert atoms is not None
        reasons = {reason.text for index in classes.of[atoms] for reason in classes.reasons.get(int(index), ())}
        assert ("one-hot encoding" in reasons) == (place == axis)


def _traced(sample: Sample) -> Coupling:
    """The sample with its first input computed from another tensor."""
    model = sample.fed_model([0])
    return trace(model, infer(model, {"in0": sample.inputs[0].shape}))  # type: ignore[union-attr]


def _declined(sample: Sample) -> str:
    model = sample.stored_model()
    shapes = infer(model, {})
    ((_, reason),) = trace(model, shapes).declined
    return reason.text


def test_old_normalization_in_training_is_declined() -> None:
    inputs = (floats((2, 3, 4)), *(positive((3,), seed) for seed in range(4)))
    assert "training mode" in _declined(Sample("BatchNormalization", inputs, {0: (1,)}, {"is_test": 0}, 6))


@pytest.mark.parametrize("position", [1, 2, 6, 7])
def test_a_product_of_integers_with_a_scale_for_every_row_is_declined(position: int) -> None:
    scale, zero = np.float32(0.1), np.uint8(3)
    both = np.full((3, 4), 7, np.uint8)
    inputs: list[Any] = [both, scale, zero, both.T, scale, zero, scale, zero]
    for place in {1, 2} if position < 3 else {6, 7}:
        inputs[place] = np.full(3, inputs[place])
    sample = Sample("QLinearMatMul", tuple(np.asarray(value) for value in inputs), {0: (1,)})
    assert _declined(sample) == "QLinearMatMul with a scale per row"


def parsed(body: str, weights: dict[str, Any]) -> onnx.ModelProto:
    """A model of inputs `x` and outputs `y` of three axes, the second of any size."""
    header = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,T,6] x) => (float[N,T,5] y)'
    model = parser.parse_model(f"{header} {{ {body} }}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items())
    return model


def test_rows_that_are_picked_as_many_as_there_are_tokens_stay() -> None:
    body = """
      h = MatMul (x, w0)
      sizes = Shape (x)
      count = Gather (sizes, one)
      rows = Range (zero, count, one)
      picked = Gather (table, rows)
      s = Add (h, picked)
      y = MatMul (s, w1)
    """
    stored = {"w0": floats((6, 8)), "w1": floats((8, 5)), "table": floats((9, 8)), "zero": 0, "one": 1}
    model = parsed(body, stored)
    structure = analyse(model, {"x": (2, 4, 6)})
    assert [group.width for group in structure.groups] == [8]
    rows = structure.coupling.labels["table"][0]
    assert rows is not None
    classes = structure.coupling.classes
    reasons = {reason.text for index in classes.of[rows].tolist() for reason in classes.reasons[index]}
    assert reasons == {"is indexed by values computed from a size"}
    prune_and_verify(model, structure, 0)


def test_channels_that_are_cut_to_a_size_of_the_input_follow_it() -> None:
    """Unlike rows of stored tables, which other inputs need."""
    body = """
      h = MatMul (x, w0)
      sizes = Shape (x)
      end = Gather (sizes, last)
      s = Slice (h, zero, end, last)
      y = MatMul (s, w1)
    """
    stored = {"w0": floats((6, 8)), "w1": floats((6, 5)), "zero": ints(0), "last": ints(2)}
    model = parsed(body, stored)
    structure = analyse(model, {"x": (2, 4, 6)})
    assert sorted(group.width for group in structure.groups) == [2, 6]
    prune_and_verify(model, structure, 0)


def _in_blocks() -> list[Any]:
    """Inputs of a MatMulNBits of 4 bits: 5 columns and 3 blocks of 16."""
    packed = np.arange(5 * 3 * 8, dtype=np.uint8).reshape(5, 3, 8)
    return [floats((2, 48)), packed, positive((5, 3)), np.full((5, 2), 0x88, np.uint8)]


IN_BLOCKS = {"K": 48, "N": 5, "bits": 4, "block_size": 16}


@pytest.mark.parametrize("position", [1, 2, 3])
def test_blocks_in_one_row_are_declined(position: int) -> None:
    inputs = _in_blocks()
    inputs[position] = inputs[position].reshape(-1)
    found = _declined(Sample("MatMulNBits", tuple(inputs), {0: (1,)}, IN_BLOCKS, domain=MICROSOFT))
    assert found == "MatMulNBits with scales or zero points in one row"


def test_columns_of_packed_weights_are_measured_by_their_scales() -> None:
    coupling = trace_alone(Sample("MatMulNBits", tuple(_in_blocks()), {0: (1,)}, IN_BLOCKS, domain=MICROSOFT))
    ((kernel, produced),) = ((c.kernel, c.produced) for c in coupling.findings.contractions if c.kernel is not None)
    assert kernel is not None and (kernel.input, kernel.in_axis, kernel.out_axis) == (2, 1, 0)
    columns = coupling.labels["out0"][1]
    assert columns is not None and produced is not None
    np.testing.assert_array_equal(coupling.classes.of[produced], coupling.classes.of[columns])


def test_channels_of_experts_are_measured_by_all_their_weights() -> None:
    inputs = (floats((2, 3, 8)), floats((6, 4), 1), floats((4, 12, 8), 2), None, floats((4, 8, 12), 4))
    coupling = trace_alone(Sample("MoE", inputs, {0: (2,)}, {"k": 2}, domain=MICROSOFT))
    measured = {c.kernel.input: c for c in coupling.findings.contractions if c.kernel is not None}
    assert {place: (c.kernel.in_axis, c.kernel.out_axis) for place, c in measured.items() if c.kernel is not None} == {
        2: (2, 1), 4: (2, 1)
    }  # fmt: skip
    assert [len(c.produced) for c in measured.values() if c.produced is not None] == [12, 8]


def test_shapes_are_cut_into_the_smallest_blocks_of_one_product() -> None:
    assert blocks_of((2, 3, 4), (6, 4)) == [((0, 1), (0,)), ((2,), (1,))]
    assert blocks_of((5, 6, 4), (5, 2, 3, 4)) == [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    assert blocks_of((4, 6), (6, 4)) == [((0, 1), (0, 1))]


# The interface of rules


def _op(**more: Any) -> Op:
    node = helper.make_node("Anything", [], ["first", "second"], "subject")
    known: dict[str, Any] = {
        "index": 3, "node": node, "opset": 17, "attributes": {}, "infos": (), "out_infos": (), "pool": AtomPool(),
        "findings": Findings(), "label_of": lambda name: None, "preferred": {}, "constants": set(),
    }  # fmt: skip
    return Op(**known | more)


def test_an_option_that_is_not_there_gives_way_to_the_default() -> None:
    for preferred, taken in ((1, 1), (2, 0), (3, 0)):
        op = _op(preferred={3: preferred})
        assert op.choose(2, np.arange(4)) == taken
        assert op.findings.choices[-1].taken == taken


def test_the_first_output_is_labelled_unless_another_is_named() -> None:
    op = _op()
    op.emit((np.arange(2),))
    assert list(op.labels_out) == [0]


def test_a_node_freezes_for_its_own_reason_and_not_for_the_purpose_of_the_model() -> None:
    op = _op()
    atoms = op.pool.allocate(2)
    op.freeze(atoms, "because")
    ((reason,), (again,)) = op.pool.solve().reasons.values()
    assert reason == again and not reason.given and reason.node == "subject"


def test_a_reversed_axis_needs_no_rewritten_bounds() -> None:
    sample = Sample("Slice", (floats((2, 5)), ints(-1), ints(-6), ints(1), ints(-1)), {0: (1,)}, moves=True, units=5)
    check_labels(sample)
    assert not [edit for edit in trace_alone(sample).findings.edits if isinstance(edit, SizeEdit)]
