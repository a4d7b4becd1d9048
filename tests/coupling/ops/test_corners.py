"""Corners of operator rules that random samples seldom reach."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxcop.coupling.atoms import AtomPool
from onnxcop.coupling.ops import Op
from onnxcop.coupling.ops.facts import Findings, SizeEdit
from onnxcop.coupling.result import Coupling
from onnxcop.coupling.tracing import trace
from onnxcop.graph.shapes import infer
from ops.oracle import check_labels, check_moves, check_removal, trace_alone
from ops.sample import Sample, floats, ints, positive


def kept(op: str, inputs: tuple[Any, ...], live: dict[int, tuple[int, ...]], units: int, **more: Any) -> Sample:
    """A sample of which this many units remain free."""
    return Sample(op, inputs, live, units=units, **more)


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


# Multiply-accumulates against counts over the elements of the operands

_BATCH, _INS, _OUTS = 2, 4, 6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("space", [(5,), (5, 4)], ids=str)
def test_a_deconvolution_multiplies_every_input_with_its_kernels(groups: int, space: tuple[int, ...]) -> None:
    kernel = (3, 2)[: len(space)]
    inputs = (floats((_BATCH, _INS, *space)), floats((_INS, _OUTS // groups, *kernel), 1))
    attributes = {"group": groups, "strides": [2] * len(space)}
    assert _macs(Sample("ConvTranspose", inputs, {0: (1,)}, attributes)) == inputs[0].size * prod(inputs[1].shape[1:])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("space", [(5,), (5, 4)], ids=str)
def test_a_convolution_multiplies_for_every_output(groups: int, space: tuple[int, ...]) -> None:
    kernel = (3, 2)[: len(space)]
    inputs = (floats((_BATCH, _INS, *space)), floats((_OUTS, _INS // groups, *kernel), 1))
    made = _BATCH * _OUTS * prod(size - width + 1 for size, width in zip(space, kernel, strict=True))
    assert _macs(Sample("Conv", inputs, {0: (1,)}, {"group": groups})) == made * prod(inputs[1].shape[1:])


def _macs(sample: Sample) -> float:
    (macs,) = trace_alone(sample).findings.macs
    return macs.scale * prod(len(axis) for axis in macs.axes)


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
