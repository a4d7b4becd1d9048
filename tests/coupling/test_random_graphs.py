"""Random networks of usual blocks: pruned ≡ masked, whatever is combined with what."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.blocks import BLOCKS, FORMS
from ops.builder import Builder
from ops.oracle import CPU, analyse, draw_units, prune_and_verify

from onnxcop.coupling.groups import Structure
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import Session
from onnxcop.verification.difference import TOLERANCE, relative_difference
from onnxcop.verification.masked_model import masked

OPSETS = (11, 13, 17, 18, 20)
STYLES = ("initializer", "node", "input")
# How many channels must go together, of what goes into a block and of what comes out; elsewhere one.
TIED = {"grouped": (2, 2), "shuffle": (2, 2), "group_normalized": (1, 4)}
RELAXED = settings(
    deadline=None,
    derandomize=True,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _stem(b: Builder, width: int) -> str:
    return b.leaky(b.norm(b.conv(b.input("x", (1, 3, 4, 4)), width, 3)))


def _head(b: Builder, x: str, kind: str, form: str) -> str:
    """Three numbers out of an image."""
    width = b.shape(x)[1]
    if kind == "pool":
        return b.linear(b.add("Flatten", [b.add("GlobalAveragePool", [x])]), 3)
    if kind == "mean":
        axes = {"axes": [2, 3]} if b.opset < 18 else {}
        inputs = [x] if axes else [x, b.constant(np.array([2, 3]))]
        return b.linear(b.add("ReduceMean", inputs, keepdims=0, **axes), 3)
    if kind == "flatten":
        weights = b.weights((3, width * 16), width * 16)
        return b.add("Gemm", [b.add("Flatten", [x]), weights, b.weights((3,))], transB=1)
    return b.linear(b.reshape(x, [width * 16], form), 3)


def _check_batch(model: onnx.ModelProto, structure: Structure, seed: int) -> None:
    """The pruned model must take other batches than the one it was traced with."""
    removed = draw_units(structure, 0.5, seed)
    exact = np.array([structure.groups[g].exact for g in structure.group_of[removed]], dtype=np.bool_)
    removed = removed[exact]
    feeds = {"x": np.random.default_rng(seed).standard_normal((3, 3, 4, 4)).astype(np.float32)}
    expected = Session(masked(model, structure, removed), CPU, optimize=False).run(feeds)
    found = Session(apply(model, structure, removed), CPU, optimize=False).run(feeds)
    for name, value in expected.items():
        gap = relative_difference(value, found[name])
        assert gap is not None and gap <= TOLERANCE["float32"], (name, gap)


@st.composite
def _networks(draw: Any) -> tuple[Builder, list[str]]:
    b = Builder(
        draw(st.sampled_from(OPSETS)), draw(st.integers(0, 99)), dynamic=draw(st.booleans()),
        style=draw(st.sampled_from(STYLES)),
    )  # fmt: skip
    x = _stem(b, draw(st.integers(4, 9)))
    trunk = [x]
    for name in draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5)):
        form = draw(st.sampled_from(FORMS))
        b.story.append(f"{name}({x}, {form})")
        x = BLOCKS[name](b, x, form)
        if draw(st.integers(0, 3)) == 0:
            x = b.add("Concat", [x, draw(st.sampled_from(trunk))], axis=1)
        trunk.append(x)
    heads = draw(st.lists(st.sampled_from(["pool", "mean", "flatten", "reshape"]), min_size=1, max_size=2))
    outputs = [_head(b, b.conv(x, 5), kind, draw(st.sampled_from(FORMS))) for kind in heads]
    return b, outputs


@RELAXED
@given(network=_networks(), seed=st.integers(0, 99))
def test_pruned_equals_masked(network: tuple[Builder, list[str]], seed: int) -> None:
    b, outputs = network
    model = b.model(outputs)
    structure = analyse(model)
    assert not structure.coupling.declined, structure.coupling.declined
    prune_and_verify(model, structure, seed)
    if b.dynamic:
        _check_batch(model, structure, seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_can_be_pruned(name: str, form: str) -> None:
    b = Builder(17, seed=5, dynamic=True)
    x = _stem(b, 8)
    y = BLOCKS[name](b, x, form)
    model = b.model([_head(b, y, "pool", form)])
    structure = analyse(model)
    for tensor, tied in zip((x, y), TIED.get(name, (1, 1)), strict=True):
        label = structure.coupling.labels[tensor][1]
        assert label is not None
        units = structure.units_on(label)
        assert (units >= 0).all()
        distinct = len(np.unique(units)) + (name == "picked" and tensor == y)  # one is picked twice
        assert len(label) == distinct * tied, "channels are coupled more than they must be"
    prune_and_verify(model, structure, seed=1)
    _check_batch(model, structure, seed=2)
