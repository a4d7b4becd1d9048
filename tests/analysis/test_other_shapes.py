"""Verification of models with dynamic sizes at more than the analysed ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from ops.oracle import CPU, analyse, draw_units

from onnxcop.coupling.groups import Structure
from onnxcop.errors import VerificationError
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.inputs import other_shapes
from onnxcop.verification.verify import Verification, verify

TRACED = (1, 3, 4, 6)
_AXIS = {"zero": np.array([0]), "axis": np.array([2])}
FREE = ("batch", 3, "height", "width")


def _model(nodes: str, shape: tuple[int | str, ...], **stored: np.ndarray) -> onnx.ModelProto:
    """Two convolutions of three by three, and then some."""
    rng = np.random.default_rng(0)
    stored |= {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((5, 8, 3, 3)).astype(np.float32),
    }
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[] y) {'
        "  h = Conv<pads=[1, 1, 1, 1]>(x, w) r = Relu(h) c = Conv<pads=[1, 1, 1, 1]>(r, v)" + nodes + "}"
    )
    model = onnx.parser.parse_model(text)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return model


def _pruned(model: onnx.ModelProto, traced: tuple[int, ...] = TRACED) -> tuple[Structure, onnx.ModelProto, np.ndarray]:
    structure = analyse(model, {"x": traced})
    removed = draw_units(structure, 0.4, seed=0)
    return structure, apply(model, structure, removed), removed


def _verified(model: onnx.ModelProto) -> Verification:
    structure, pruned, removed = _pruned(model)
    return verify(model, pruned, structure, removed, CPU)


def _shapes(model: onnx.ModelProto, traced: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [found["x"] for found in other_shapes(model, {"x": traced})]


def test_the_other_sizes() -> None:
    assert _shapes(_model("y = Relu(c)", FREE), TRACED) == [(2, 3, 8, 12), (2, 3, 4, 6), (1, 3, 8, 12)]
    assert _shapes(_model("y = Relu(c)", FREE), (4, 3, 224, 48)) == [(5, 3, 192, 96), (5, 3, 224, 48), (4, 3, 192, 96)]
    assert _shapes(_model("y = Relu(c)", ("n", 3, 4, 6)), TRACED) == [(2, 3, 4, 6)]
    assert _shapes(_model("y = Relu(c)", (1, 3, 4, "n")), TRACED) == [(1, 3, 4, 12)]
    assert _shapes(_model("y = Relu(c)", TRACED), TRACED) == []


@pytest.mark.parametrize("shape", [FREE, (1, 3, "n", "n"), ("n", 3, 4, 6)])
def test_what_is_right_at_all_sizes_is_verified_at_another(shape: tuple[int | str, ...]) -> None:
    model = _model("y = GlobalAveragePool(c)", shape)
    found = _verified(model)
    assert found.other_shapes["x"] == _shapes(model, TRACED)[0]
    assert found.max_difference is not None and found.max_difference < 1e-5


def test_fixed_sizes_have_no_other() -> None:
    assert _verified(_model("y = Relu(c)", TRACED)).other_shapes == {}


def test_sizes_that_the_original_does_not_run_with_are_passed_over() -> None:
    flat = np.random.default_rng(1).standard_normal((5 * 4 * 6, 2)).astype(np.float32)
    by_batch = _model("f = Flatten(c) y = MatMul(f, flat)", FREE, flat=flat)
    assert _verified(by_batch).other_shapes == {"x": (2, 3, 4, 6)}
    alone = _model("f = Reshape(c, to) y = MatMul(f, flat)", FREE, flat=flat, to=np.array([1, 120]))
    assert _verified(alone).other_shapes == {}


def test_a_run_that_takes_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcop.verification.verify._LONG_RUN", -1.0)
    assert _verified(_model("y = Relu(c)", FREE)).other_shapes == {}


def _replaced(model: onnx.ModelProto, output: str, value: np.ndarray) -> onnx.ModelProto:
    """The model with a stored value in place of what a node computes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (node,) = (node for node in copy.graph.node if output in node.output)
    copy.graph.node.remove(node)
    copy.graph.initializer.append(numpy_helper.from_array(value, output))
    return copy


def _fails(model: onnx.ModelProto, output: str, value: np.ndarray, message: str) -> None:
    structure, pruned, removed = _pruned(model)
    assert verify(model, pruned, structure, removed, CPU).max_difference is not None
    with pytest.raises(VerificationError, match=message):
        verify(model, _replaced(pruned, output, value), structure, removed, CPU)


def test_a_size_that_was_written_down_stops_a_run() -> None:
    model = _model("s = Shape(c) t = Identity(s) y = Reshape(c, t)", FREE)
    baked = np.array([1, 5, 4, 6])
    _fails(model, "t", baked, r"does not run with x of 2,3,8,12, though the original does: .*fix the sizes")


def test_a_size_that_was_written_down_gives_outputs_of_other_shapes() -> None:
    model = _model("n = Shape<start=2, end=3>(c) a = Identity(n) y = Slice(c, zero, a, axis)", FREE, **_AXIS)
    _fails(model, "a", np.array([4]), r"output 'y' is float32\[2, 5, 4, 12\] with x of 2,3,8,12, the original's is")


def test_a_size_that_was_written_down_gives_other_numbers() -> None:
    model = _model("n = Size(x) f = Cast<to=1>(n) s = ReduceSum<keepdims=0>(c) y = Div(s, f)", FREE)
    _fails(model, "f", np.float32(3 * 4 * 6)[...], r"tensor 'y' differs .* of its largest value with x of 2,3,8,12 \(")


def test_a_fault_at_the_analysed_sizes_names_no_other_sizes() -> None:
    model = _model("n = Size(x) f = Cast<to=1>(n) s = ReduceSum<keepdims=0>(c) y = Div(s, f)", FREE)
    structure, pruned, removed = _pruned(model)
    with pytest.raises(VerificationError, match=r"of its largest value \(allowed"):
        verify(model, _replaced(pruned, "f", np.float32(7)[...]), structure, removed, CPU)


def test_a_batch_that_the_original_mixes_is_not_compared() -> None:
    """The batch of one is written down, yet another runs: channels of two samples then share a row."""
    nodes = "f = Reshape(c, to) m = ReduceMean<axes=[2], keepdims=0>(f) y = MatMul(m, head)"
    head = np.random.default_rng(1).standard_normal((5, 2)).astype(np.float32)
    free_batch = _model(nodes, ("n", 3, 4, 6), to=np.array([1, 5, -1]), head=head)
    found = _verified(free_batch)
    assert found.max_difference is not None and found.max_difference < 1e-5
    assert found.notes[-1].startswith("with other batches the original mixes samples")
    assert found.other_shapes == {}
