"""Channel shuffles move channels and tie none; groups of a convolution lose equal shares."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.builder import Builder
from ops.oracle import CPU, analyse, draw_units, prune_and_verify

from onnxcop.coupling.balance import bundles
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.shuffles import find
from onnxcop.graph.shapes import infer
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import Session
from onnxcop.verification.difference import TOLERANCE, relative_difference
from onnxcop.verification.masked_model import masked


def _shuffled(b: Builder, x: str, groups: int, form: str) -> str:
    width, size = b.shape(x)[1], b.shape(x)[2:]
    apart = b.reshape(x, [groups, width // groups, *size], form)
    return b.reshape(b.add("Transpose", [apart], perm=[0, 2, 1, 3, 4]), [width, *size], form)


def _head(b: Builder, x: str) -> str:
    return b.linear(b.add("Flatten", [b.add("GlobalAveragePool", [x])]), 3)


def _halves(depth: int, form: str) -> tuple[onnx.ModelProto, list[str]]:
    """Blocks that work on one half of the channels and shuffle both, as in ShuffleNet v2."""
    b = Builder(17, seed=0, dynamic=True)
    x = b.leaky(b.conv(b.input("x", (1, 3, 4, 4)), 12, 3))
    joined = []
    for _ in range(depth):
        left, right = b.split(x, [6, 6], 1)
        x = _shuffled(b, b.add("Concat", [left, b.leaky(b.conv(right, 6, 3))], axis=1), 2, form)
        joined.append(x)
    return b.model([_head(b, x)]), joined


@pytest.mark.parametrize("form", ["zero", "minus", "last", "chain"])
def test_shuffles_of_halves_tie_no_channels(form: str) -> None:
    model, joined = _halves(4, form)
    structure = analyse(model)
    for name in joined:
        _all_apart(structure, name, 12)
    makers = {c.node for c in structure.coupling.findings.contractions}
    assert all(makers.issuperset(group.producers) and group.producers for group in structure.groups)
    prune_and_verify(model, structure, seed=3)
    removed = draw_units(structure, 0.4, 3)
    reference, pruned = masked(model, structure, removed), apply(model, structure, removed)
    _same_at_other_batches(reference, pruned)


def test_a_shuffle_that_loses_nothing_stays_as_it_was() -> None:
    model, _ = _halves(2, "minus")
    structure = analyse(model)
    last = structure.coupling.findings.contractions[0]
    assert last.produced is not None
    elsewhere = next(group for group in structure.groups if group.width == 12 or group.producers)
    kinds = [node.op_type for node in apply(model, structure, np.empty(0, np.int64)).graph.node]
    assert kinds == [node.op_type for node in model.graph.node]
    pruned = apply(model, structure, elsewhere.units[:1])
    assert sum(node.op_type == "Gather" for node in pruned.graph.node) >= 1
    assert not any(node.op_type == "Transpose" for node in pruned.graph.node)


@pytest.mark.parametrize(("width", "groups", "units"), [(16, 4, 1), (12, 4, 3), (24, 3, 8), (20, 2, 5), (24, 4, 3)])
def test_groups_lose_equal_shares_before_and_after_a_shuffle(width: int, groups: int, units: int) -> None:
    """Two grouped convolutions with a shuffle between, as in ShuffleNet v1."""
    b = Builder(13, seed=1, dynamic=False)
    x = b.leaky(b.conv(b.input("x", (1, groups * 2, 4, 4)), width, 3, groups=groups))
    x = b.conv(_shuffled(b, x, groups, "zero"), width, 3, groups=width)
    y = b.conv(b.leaky(b.conv(x, 2 * width, groups=groups)), 5)
    model = b.model([_head(b, y)])
    structure = analyse(model)
    label = structure.coupling.labels[x][1]
    assert label is not None
    found = structure.units_on(label)
    if units == 1:
        assert (found < 0).all(), "all of the axis can only go together"
    else:
        assert len(np.unique(found[found >= 0])) == units
    prune_and_verify(model, structure, seed=2)


def _view(b: Builder, x: str, numbers: str) -> str:
    """A strided view, as some exporters write it: all elements in a row, then a Gather of their numbers."""
    view = b.add("Gather", [b.add("Reshape", [x, b.constant(np.array([-1]))]), numbers], axis=0)
    b.types[view] = b.types[x]  # inference does not know how many numbers there are
    return view


@pytest.mark.parametrize("rotated", [False, True])
def test_a_view_by_the_numbers_of_its_elements_keeps_channels_apart(rotated: bool) -> None:
    b = Builder(17, seed=0, dynamic=False)
    x = b.add("GlobalAveragePool", [b.leaky(b.conv(b.input("x", (2, 3, 4, 4)), 6, 3))])
    numbers = np.arange(12).reshape(2, 6, 1, 1)
    view = _view(b, x, b.constant(numbers[:, ::-1].copy() if rotated else numbers))
    model = b.model([b.linear(b.add("Flatten", [view]), 3)])
    structure = analyse(model)
    _all_apart(structure, view, 6)
    prune_and_verify(model, structure, seed=1)


def test_a_view_by_numbers_that_follow_from_the_batch() -> None:
    b = Builder(17, seed=0, dynamic=True)
    x = b.add("GlobalAveragePool", [b.leaky(b.conv(b.input("x", (2, 3, 4, 4)), 6, 3))])
    zero, one, width = (b.constant(np.array(number)) for number in (0, 1, 6))
    first = b.add("Mul", [b.add("Range", [zero, b.add("Squeeze", [b.size_of(x, 0)]), one]), width])
    numbers = b.add("Add", [b.unsqueeze(first, [1, 2, 3]), b.constant(np.arange(6).reshape(1, 6, 1, 1))])
    view = _view(b, x, numbers)
    model = b.model([b.linear(b.add("Flatten", [view]), 3)])
    structure = analyse(model)
    _all_apart(structure, view, 6)
    removed = draw_units(structure, 0.4, 3)
    reference, pruned = masked(model, structure, removed), apply(model, structure, removed)
    assert not any(node.op_type == "Range" for node in pruned.graph.node)
    _same_at_other_batches(reference, pruned)


def _same_at_other_batches(reference: onnx.ModelProto, pruned: onnx.ModelProto) -> None:
    for batch in (2, 5):
        feeds = {"x": np.random.default_rng(batch).standard_normal((batch, 3, 4, 4)).astype(np.float32)}
        expected, found = Session(reference, CPU).run(feeds), Session(pruned, CPU).run(feeds)
        for name, value in expected.items():
            gap = relative_difference(value, found[name])
            assert gap is not None and gap <= TOLERANCE["float32"]


def _all_apart(structure: Structure, name: str, channels: int) -> None:
    label = structure.coupling.labels[name][1]
    assert label is not None
    units = structure.units_on(label)
    assert (units >= 0).all()
    assert len(np.unique(units)) == channels, "channels are tied"


def test_what_is_no_shuffle_is_not_taken_for_one() -> None:
    b = Builder(17, seed=0, dynamic=False)
    x = b.conv(b.input("x", (1, 3, 4, 4)), 8, 3)
    apart = b.reshape(x, [4, 2, 4, 4], "zero")
    read_twice = b.add("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    back = b.reshape(read_twice, [8, 4, 4], "zero")
    other = b.reshape(b.add("Neg", [read_twice]), [8, 4, 4], "zero")
    mixed = b.reshape(b.add("Transpose", [b.reshape(x, [8, 2, 8], "zero")], perm=[0, 2, 1, 3]), [8, 4, 4], "zero")
    model = b.model([_head(b, b.add("Sum", [back, other, mixed]))])
    assert find(model, infer(model, {"x": (1, 3, 4, 4)})) == {}


def test_what_is_given_out_halfway_is_no_shuffle() -> None:
    """An output keeps its numbers in their places, so the Reshape before it cannot become part of a permutation."""
    b = Builder(17, seed=0, dynamic=False)
    x = b.conv(b.input("x", (1, 3, 4, 4)), 8, 3)
    turned = b.add("Transpose", [b.reshape(x, [4, 2, 4, 4], "zero")], perm=[0, 2, 1, 3, 4])
    back = _head(b, b.reshape(turned, [8, 4, 4], "zero"))
    shapes = {"x": (1, 3, 4, 4)}
    alone, given = b.model([back]), b.model([back, turned])
    assert len(find(alone, infer(alone, shapes))) == 3
    assert find(given, infer(given, shapes)) == {}


def test_a_shuffle_must_be_one_at_every_size() -> None:
    """A Reshape to baked sizes shuffles pictures of one size only, and mixes rows of larger ones."""
    model, _ = _halves(1, "minus")
    assert len(find(model, infer(model, {"x": (1, 3, 4, 4)}))) == 3
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "size"
    assert find(model, infer(model, {"x": (1, 3, 4, 4)})) == {}


@settings(deadline=None, derandomize=True, max_examples=200, database=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 30), st.integers(0, 999))
def test_bundles_have_equal_shares(groups: int, size: int, kinds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, kinds, (groups, size))
    frozen = rng.random(kinds) < 0.2
    found, lone = bundles(rows, frozen)
    of = np.arange(kinds)
    for classes in found:
        of[classes] = classes[0]
    assert len(np.unique(np.concatenate([np.empty(0, np.int64), *found]))) == sum(map(len, found))
    for kind in np.unique(of[rows]):
        shares = (of[rows] == kind).sum(axis=1)
        assert frozen[kind] or kind in lone or (shares == shares[0]).all()
    if not frozen[rows].any():
        assert len(lone) == 0, "whole groups always go together"


def test_bundles_are_as_small_as_shares_allow_and_found_in_the_order_of_their_members() -> None:
    """Class 0 has two members in the first group, class 5 two in the second, and the others have one."""
    rows = np.array([[3, 0, 0, 1], [5, 4, 7, 5]])
    found, lone = bundles(rows, np.zeros(8, np.bool_))
    assert [sorted(classes.tolist()) for classes in found] == [[3, 4], [0, 5], [1, 7]]
    assert len(lone) == 0


def test_ties_without_any_order_are_put_together_at_once() -> None:
    rows = np.random.default_rng(0).integers(0, 4000, (32, 256))
    found, lone = bundles(rows, np.zeros(4000, np.bool_))
    assert (len(found), len(lone)) == (1, 0)
    np.testing.assert_array_equal(np.sort(found[0]), np.unique(rows))
