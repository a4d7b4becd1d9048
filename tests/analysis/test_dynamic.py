"""Dynamic batch, height, width and sequence: pruned ≡ masked at sizes other than the traced ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from ops.dynamic_blocks import BLOCKS, SizedBuilder
from ops.oracle import CPU, analyse, draw_units
from ops.sample import ints

from onnxcop.coupling.groups import Structure
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.session import Session
from onnxcop.verification.difference import TOLERANCE, relative_difference
from onnxcop.verification.masked_model import masked

TRACED = (1, 3, 4, 6)
OTHERS = ((1, 3, 4, 6), (3, 3, 8, 4), (2, 3, 5, 9))
SOME_FROZEN = {"numbered_channels"}


def _freed(model: onnx.ModelProto, names: dict[int, str]) -> onnx.ModelProto:
    """The model with the given axes of its input dynamic, and all sizes of its outputs unknown."""
    (image,) = (value for value in model.graph.input if value.name == "x")
    for axis, name in names.items():
        image.type.tensor_type.shape.dim[axis].dim_param = name
    for value in model.graph.output:
        del value.type.tensor_type.shape.dim[:]
        value.type.tensor_type.ClearField("shape")
    return model


def _images(b: SizedBuilder, names: list[str]) -> onnx.ModelProto:
    x = b.leaky(b.norm(b.conv(b.input("x", TRACED), 8, 3)))
    for name in names:
        b.story.append(name)
        x = BLOCKS[name](b, x)
    pooled = b.add("Flatten", [b.add("GlobalAveragePool", [b.leaky(b.conv(x, 6, 3))])])
    model = b.model([b.linear(pooled, 4), b.conv(x, 2)])
    return _freed(model, {0: "batch", 2: "height", 3: "width"})


def _check(model: onnx.ModelProto, structure: Structure, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    """Compare with the masked original at every size, with few units removed and with as many as possible."""
    exact = np.array([structure.groups[group].exact for group in structure.group_of], dtype=np.bool_)
    for fraction in (0.4, 1.0):
        removed = draw_units(structure, fraction, seed)
        removed = removed[exact[removed]]
        reference, pruned = masked(model, structure, removed), apply(model, structure, removed)
        with Session(reference, CPU, optimize=False) as one, Session(pruned, CPU) as two:
            for number, shape in enumerate(shapes):
                feeds = {"x": np.random.default_rng(number).standard_normal(shape).astype(np.float32)}
                expected, found = one.run(feeds), two.run(feeds)
                for name, value in expected.items():
                    assert value.shape == found[name].shape
                    gap = relative_difference(value, found[name])
                    assert gap is not None and gap <= TOLERANCE["float32"], (name, shape, gap)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_whose_sizes_are_computed(name: str) -> None:
    model = _images(SizedBuilder(17, seed=1, dynamic=False), [name])
    structure = analyse(model, {"x": TRACED})
    assert not structure.coupling.declined, structure.coupling.declined
    first = structure.coupling.findings.contractions[0].produced
    assert first is not None
    assert name in SOME_FROZEN or (structure.units_on(first) >= 0).all(), "the filters before it are frozen"
    _check(model, structure, OTHERS, seed=2)


@settings(deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=2, max_size=5), seed=st.integers(0, 99),
    opset=st.sampled_from([13, 17, 20]), style=st.sampled_from(["initializer", "node"]),
)  # fmt: skip
def test_any_of_them_one_after_another(names: list[str], seed: int, opset: int, style: str) -> None:
    model = _images(SizedBuilder(opset, seed, dynamic=False, style=style), names)
    structure = analyse(model, {"x": TRACED})
    _check(model, structure, OTHERS, seed)


@pytest.mark.parametrize("target", ["zero", "computed"])
def test_sequences_of_any_length(target: str) -> None:
    """Attention over a dynamic sequence; heads by 0 and -1, or all computed."""
    b = SizedBuilder(17, seed=3, dynamic=False)
    x = b.linear(b.input("x", (1, 5, 8)), 12)
    length = b.size_of(x, 1)
    split = b.constant(ints(0, 0, 3, -1)) if target == "zero" else b.sizes(b.size_of(x, 0), length, 3, 4)
    heads = [b.add("Transpose", [b.add("Reshape", [b.linear(x, 12), split])], perm=[0, 2, 1, 3]) for _ in range(3)]
    scores = b.add("MatMul", [heads[0], b.add("Transpose", [heads[1]], perm=[0, 1, 3, 2])])
    mixed = b.add("MatMul", [b.add("Softmax", [scores], axis=-1), heads[2]])
    join = b.constant(ints(0, 0, -1)) if target == "zero" else b.sizes(b.size_of(x, 0), length, 12)
    joined = b.add("Reshape", [b.add("Transpose", [mixed], perm=[0, 2, 1, 3]), join])
    model = _freed(b.model([b.linear(b.leaky(b.linear(joined, 10)), 3)]), {0: "batch", 1: "length"})
    structure = analyse(model, {"x": (1, 5, 8)})
    assert not structure.coupling.classes.frozen[structure.coupling.classes.of[_produced(structure)]].any()
    _check(model, structure, ((1, 5, 8), (4, 1, 8), (2, 17, 8)), seed=0)


def _produced(structure: Structure) -> Any:
    """Atoms of the filters of all layers but the last."""
    made = [c.produced for c in structure.coupling.findings.contractions if c.kernel is not None]
    return np.concatenate([atoms for atoms in made[:-1] if atoms is not None])


def test_a_size_that_is_given_out_stays_the_original_one() -> None:
    b = SizedBuilder(17, seed=0, dynamic=False)
    x = b.leaky(b.conv(b.input("x", TRACED), 8, 3))
    model = b.model([b.conv(x, 2)])
    shape = b.add("Shape", [x])
    model.graph.node.append(b.nodes[-1])
    model.graph.output.append(helper.make_tensor_value_info(shape, onnx.TensorProto.INT64, [4]))
    model = _freed(model, {0: "batch", 2: "height", 3: "width"})
    structure = analyse(model, {"x": TRACED})
    assert len(structure.unit_class) == 8
    _check(model, structure, OTHERS, seed=1)
