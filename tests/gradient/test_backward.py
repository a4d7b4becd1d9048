"""The walk that writes the backward graph: sums, stops, errors, dynamic sizes, and PyTorch's opinion."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from gradient_oracle import one_node, runner

from onnxcop.errors import ModelError
from onnxcop.gradient import differentiate, trainable


def parsed(text: str, **stored: Any) -> onnx.ModelProto:
    """A model of opset 18 from ONNX text, and stored tensors."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    for name, value in stored.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    onnx.checker.check_model(model)
    return model


def results(model: onnx.ModelProto, **feeds: Any) -> dict[str, Any]:
    """All outputs by name."""
    arrays = {name: np.asarray(value, np.float32) for name, value in feeds.items()}
    return dict(zip([value.name for value in model.graph.output], runner(model)(arrays), strict=True))


def test_what_several_readers_return_is_added_up() -> None:
    model = parsed(
        "g (float[N,3] x) => (float loss) { a = Mul(x, w) b = Mul(a, w) c = Add(b, w)"
        " loss = ReduceSum<keepdims=0>(c) }", w=[1, 2, 3],
    )  # fmt: skip
    found = differentiate(model)
    assert not found.stops and not found.missing
    x = np.arange(6).reshape(2, 3)
    slope = results(found.model, x=x)[found.names["w"]]
    np.testing.assert_allclose(slope, (2 * x * [1, 2, 3] + 1).sum(0))
    assert results(found.model, x=np.ones((5, 3)))[found.names["w"]].tolist() == [15, 25, 35]


def test_an_operator_without_a_rule_stops_only_its_own_gradient() -> None:
    model = parsed(
        "g (float[2,3] x) => (float loss) { a = Mul(x, w) b = Det(s) c = Add(a, b) d = Round(v) e = Add(c, d)"
        " loss = ReduceSum<keepdims=0>(e) }", w=[1, 2, 3], s=np.eye(2), v=[1, 2, 3],
    )  # fmt: skip
    found = differentiate(model)
    assert {(stop.node, stop.operator): stop.reason for stop in found.stops} == {
        ("b", "Det"): "there is no rule for the operator", ("d", "Round"): "its derivative is 0",
    }  # fmt: skip
    assert found.missing == ("s", "v") and set(found.names) == {"w"}


def test_a_choice_by_what_is_trained_passes_the_gradient_of_what_is_chosen() -> None:
    model = parsed(
        "g (float[N,3] x) => (float loss) { a = Mul(x, w) z = Constant<value_float = 0.0>() c = Greater(a, z)"
        " k = Constant<value_float = 0.1>() b = Mul(a, k) d = Where(c, a, b) loss = ReduceSum<keepdims=0>(d) }",
        w=[1, -2, 3],
    )  # fmt: skip
    found = differentiate(model)
    assert not found.stops
    x = np.array([[1.0, 2.0, -3.0], [-1.0, -2.0, 3.0]])
    slope = results(found.model, x=x)[found.names["w"]]
    np.testing.assert_allclose(slope, (x * np.where(x * [1, -2, 3] > 0, 1, 0.1)).sum(0), rtol=1e-6)


def test_bodies_of_control_flow_stop_the_gradient() -> None:
    model = parsed(
        "g (bool c, float[2] x) => (float loss) { a = Mul(x, w) b = If(c) <then_branch = t () => (float[2] p)"
        " { p = Mul(a, v) }, else_branch = e () => (float[2] q) { q = Identity(a) }> d = Add(a, b)"
        " loss = ReduceSum<keepdims=0>(d) }", w=[1, 2], v=[3, 4],
    )  # fmt: skip
    found = differentiate(model)
    assert [stop.operator for stop in found.stops] == ["If"]
    assert found.missing == ("v",) and "w" in found.names


def test_errors_say_what_to_do() -> None:
    model = parsed("g (float[2,3] x) => (float[2,3] y) { y = Mul(x, w) }", w=[1, 2, 3])
    with pytest.raises(ModelError, match=r"the loss 'y' has the shape \[2, 3\]; reduce it"):
        differentiate(model, "y")
    with pytest.raises(ModelError, match="computes no tensor 'loss'"):
        differentiate(model)
    scalar = parsed("g (float[2,3] x) => (float y) { z = Mul(x, w) y = ReduceSum<keepdims=0>(z) }", w=[1, 2, 3])
    with pytest.raises(ModelError, match="no stored tensor or input 'v'"):
        differentiate(scalar, "y", ["v"])


def test_the_model_is_not_changed_and_weights_may_be_in_constants() -> None:
    model = parsed(
        "g (float[N,3] x) => (float loss) { w = Constant<value = float[3] {1, 2, 3}>() y = Mul(x, w)"
        " loss = ReduceSum<keepdims=0>(y) }",
    )  # fmt: skip
    before = model.SerializeToString()
    found = differentiate(model)
    assert model.SerializeToString() == before
    assert trainable(model) == ["w"]
    np.testing.assert_allclose(results(found.model, x=np.ones((2, 3)))[found.names["w"]], [2, 2, 2])


def test_half_precision_and_old_opsets() -> None:
    values = np.array([[1.0, -2.0, 3.0]], np.float16)
    model = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 9]> g (float16[1,3] x) => (float16 loss)'
        " { y = Relu(x) loss = ReduceSum<keepdims=0>(y) }"
    )
    found = differentiate(model, "loss", ["x"])
    slope = dict(zip([v.name for v in found.model.graph.output], runner(found.model)({"x": values}), strict=True))
    np.testing.assert_array_equal(slope[found.names["x"]], np.array([[1, 0, 1]], np.float16))


def test_slices_of_what_was_transposed() -> None:
    model = parsed(
        "g (float[2,3,4] x) => (float loss) { s = Constant<value_ints = [0]>() e = Constant<value_ints = [1]>()"
        " a = MatMul(x, w) b = Transpose<perm = [2, 0, 1]>(a) c = Slice(b, s, e, s) d = Mul(c, c)"
        " loss = ReduceSum<keepdims=0>(d) }", w=np.eye(4),
    )  # fmt: skip
    x = np.arange(24).reshape(2, 3, 4) / 10
    expected = np.zeros((4, 4))
    expected[:, 0] = 2 * np.einsum("bij,bi->j", x, x[..., 0])
    found = differentiate(model)
    np.testing.assert_allclose(results(found.model, x=x)[found.names["w"]], expected, rtol=1e-5)


def random(*shape: int) -> Any:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


TORCH: list[tuple[str, str, list[Any], dict[str, Any], dict[str, Any]]] = [
    ("Conv", "conv2d", [random(4, 16, 9, 9), random(8, 8, 3, 3), random(8)],
     {"strides": [2, 2], "pads": [1, 1, 1, 1], "group": 2}, {"stride": 2, "padding": 1, "groups": 2}),
    ("Conv", "conv2d", [random(4, 16, 9, 9), random(16, 1, 5, 5), random(16)],
     {"pads": [2, 2, 2, 2], "group": 16}, {"padding": 2, "groups": 16}),
    ("Conv", "conv2d", [random(4, 16, 9, 9), random(8, 16, 3, 3), random(8)],
     {"pads": [2, 2, 2, 2], "dilations": [2, 2]}, {"padding": 2, "dilation": 2}),
    ("ConvTranspose", "conv_transpose2d", [random(4, 8, 5, 5), random(8, 6, 3, 3), random(6)],
     {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
     {"stride": 2, "padding": 1, "output_padding": 1}),
    ("MaxPool", "max_pool2d", [random(4, 8, 9, 9)],
     {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("AveragePool", "avg_pool2d", [random(4, 8, 9, 9)],
     {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
     {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
    ("Softmax", "softmax", [random(4, 8)], {}, {"dim": -1}),
    ("Relu", "relu", [np.array([-1.0, 0.0, 2.0], np.float32)], {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "function", "inputs", "ours", "theirs"), TORCH)
def test_gradients_equal_those_of_torch(
    kind: str, function: str, inputs: list[Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model, feeds, names = one_node(kind, inputs, **ours)
    found = differentiate(model, "loss", names)
    mine = dict(zip([value.name for value in found.model.graph.output], runner(found.model)(feeds), strict=True))
    leaves = [torch.tensor(value, requires_grad=True) for value in inputs]
    result = getattr(torch.nn.functional, function)(*leaves, **theirs)
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "r0")
    (result * torch.tensor(onnx.numpy_helper.to_array(weights))).sum().backward()
    for name, leaf in zip(names, leaves, strict=True):
        expected = leaf.grad.numpy()
        np.testing.assert_allclose(mine[found.names[name]], expected, atol=2e-5 * max(1.0, abs(expected).max()), rtol=0)
