"""Losses of sums without a layer's weights: products of activations, and recurrent sums."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from ops.oracle import CPU
from small_models import weights
from transformer_models import bert

import onnxcop
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.sensitivity import choose_ridges, measure_curves
from onnxcop.data.synthetic import synthetic_data
from onnxcop.reconstruction.products import ProductLoss, losses_for
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
