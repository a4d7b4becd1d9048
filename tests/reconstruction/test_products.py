"""Losses of sums without a layer's weights: products of activations, and recurrent sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper
from ops.oracle import CPU
from small_models import weights
from transformer_models import bert

import onnxcop
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.sensitivity import choose_ridges, measure_curves
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.data.open import input_specs, open_source
from onnxcop.data.synthetic import synthetic_data
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.products import Product, ProductLoss, losses_for, products
from onnxcop.recovery.rounds import Recovery, RecoverySettings

HIDDEN, INPUTS, STEPS = 6, 4, 5


def lstm() -> onnx.ModelProto:
    """An LSTM of 6 units and a layer that reads its states."""
    stored = [
        weights("w", (1, 4 * HIDDEN, INPUTS)), weights("r", (1, 4 * HIDDEN, HIDDEN)), weights("v", (HIDDEN, 3)),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "direction"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["states"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["states", "direction"], ["flat"]),
        helper.make_node("MatMul", ["flat", "v"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, "n", INPUTS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [STEPS, "n", 3])
    graph = helper.make_graph(nodes, "lstm", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def recovering(model: onnx.ModelProto) -> Recovery:
    analysis = onnxcop.analyze(model, options=CPU, biases=True)
    fit, held_out = synthetic_data(analysis, 24, 8, 0).split(0.5, 0)
    return Recovery(analysis, fit, held_out, CPU, RecoverySettings())


def test_a_product_loses_what_the_moments_of_both_sides_say() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((4000, 5)), rng.standard_normal((4000, 5)) * np.arange(1, 6)
    second = q.T @ q / len(q) * (k.T @ k / len(k))
    loss = ProductLoss(np.arange(5), second, np.ones(5, dtype=np.bool_))
    loss.remove(np.array([1]))
    whole = float(((q @ k.T) ** 2).mean())
    for channel in (0, 2, 3, 4):
        before, after = (
            ((q[:, [1]] @ k[:, [1]].T) ** 2).mean(),
            ((q[:, [1, channel]] @ k[:, [1, channel]].T) ** 2).mean(),
        )
        np.testing.assert_allclose(loss.costs()[channel], (after - before) / whole, rtol=0.02)
    assert np.isinf(loss.costs()[1])


def test_recurrent_units_cost_what_their_own_weights_make_of_them() -> None:
    recovery = recovering(lstm())
    (group,) = recovery.analysis.structure.groups
    (loss,) = losses_for(recovery.working, recovery.statistics().fit, group)
    own = recovery.working.read("r")[0].astype(np.float64)
    assert (loss.units == group.units).all()
    ratio = np.diagonal(loss.shares) / (own**2).sum(axis=0)  # second moments of the states, all below 1
    assert ((ratio > 0) & (ratio < 1)).all()


def test_what_no_stored_weight_reads_is_not_free() -> None:
    for recovery in (recovering(bert()), recovering(lstm())):
        structure, samples = recovery.analysis.structure, recovery.statistics()
        requests = {group.index: group.width // 2 for group in structure.groups if group.consumers}
        curves = measure_curves(
            recovery.working, samples, Limits(), np.ones(len(structure.unit_class)), CPU,
            choose_ridges(recovery.working, samples), requests=requests,
        )  # fmt: skip
        assert curves.keys() == requests.keys()
        assert all(curve.values[0] > 1e-4 for curve in curves.values()), {g: c.values for g, c in curves.items()}


def products_of(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> tuple[Product, ProductLoss, Any]:
    """The only product of a network whose only input is `x`, its loss, and how to read weights."""
    working = MaskedNetwork.of(onnxcop.analyze(model, options=CPU, input_shapes=shapes))
    (product,) = products(working)
    data = open_source({"x": SAMPLES}, input_specs(working.analysis), samples=12, batch_size=4, seed=0)
    taps, sha = list(product.watched), working.analysis.sha256
    seen = PatchStatistics(calibrate(working.model, taps, data, CPU, sha=sha, positions=None), {})
    (group,) = working.analysis.structure.groups
    (loss,) = losses_for(working, seen, group)
    return product, loss, working.read


def second(*factors: Any) -> Any:
    """The product of second moments, element by element."""
    return np.prod([one.T @ one / len(one) for one in factors], axis=0)


def parsed(body: str, outputs: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,T,6] x) => (float[{outputs}] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(weights(name, shape) for name, shape in shapes.items())
    return model


SAMPLES = np.random.default_rng(0).standard_normal((12, 5, 6)).astype(np.float32) + 1
ROWS = SAMPLES.reshape(-1, 6).astype(np.float64)


@pytest.mark.parametrize(("between", "centred"), [("Tanh (s)", False), ("Softmax (s)", True)])
def test_both_factors_of_a_product_of_activations_are_observed(between: str, centred: bool) -> None:
    """The mean of the keys cancels in a softmax over them."""
    body = "q = MatMul (x, a) k = MatMul (x, b) t = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, t) y = "
    model = parsed(body + between, "N,T,T", a=(6, 8), b=(6, 8))
    product, loss, read = products_of(model, x=(2, 5, 6))
    assert product.centred == (False, centred)
    q, k = ROWS @ read("a").astype(np.float64), ROWS @ read("b").astype(np.float64)
    expected = second(q, k - k.mean(axis=0) if centred else k)
    np.testing.assert_allclose(loss.shares, expected, rtol=1e-3, atol=1e-4)


def test_of_three_factors_the_first_two_are_observed() -> None:
    body = """q = MatMul (x, a) k = MatMul (x, b) v = MatMul (x, c)
      y = Einsum <equation = "nti,nsi,nri->ntsr"> (q, k, v)"""
    model = parsed(body, "N,T,T,T", a=(6, 8), b=(6, 8), c=(6, 8))
    product, loss, read = products_of(model, x=(2, 5, 6))
    assert [layer.tensor for layer in product.watched] == ["q", "k"]
    assert product.centred == (False, False)
    expected = second(*(ROWS @ read(name).astype(np.float64) for name in "ab"))
    np.testing.assert_allclose(loss.shares, expected, rtol=1e-3, atol=1e-4)


def test_channels_that_are_added_up_lose_their_own_squares() -> None:
    model = parsed("q = MatMul (x, a) y = ReduceL2 <axes = [2], keepdims = 1> (q)", "N,T,1", a=(6, 8))
    product, loss, read = products_of(model, x=(2, 5, 6))
    assert len(product.watched) == len(product.centred) == 1
    expected = np.diag(np.diag(second(ROWS @ read("a").astype(np.float64))))
    np.testing.assert_allclose(loss.shares, expected, rtol=1e-3, atol=1e-4)


def test_products_inside_bodies_are_not_observed() -> None:
    body = """
      q = MatMul (x, a) k = MatMul (x, b) t = Transpose <perm = [0, 2, 1]> (k)
      last = ReduceSum <keepdims = 0> (x) some = Greater (last, zero)
      y = If (some) <
        then_branch = one () => (float[N,T,T] m) { m = MatMul (q, t) },
        else_branch = two () => (float[N,T,T] n) { r = MatMul (q, t) n = Neg (r) }
      >"""
    model = parsed(body, "N,T,T", a=(6, 8), b=(6, 8))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    working = MaskedNetwork.of(onnxcop.analyze(model, options=CPU, input_shapes={"x": (2, 5, 6)}))
    assert [group.width for group in working.analysis.structure.groups] == [8]
    assert not list(products(working))
