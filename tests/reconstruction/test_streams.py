"""Linear streams: which channels may be mixed, and what that is good for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_models import ELEMENT, finished, outputs, weights

import onnxcop
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.calibration.calibrate import calibrate
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.data.open import input_specs, open_source
from onnxcop.errors import PlanMismatchError
from onnxcop.reconstruction.linear_streams import Stream, linear_streams
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.principal import in_principal_channels
from onnxcop.recovery.rounds import RecoverySettings
from onnxcop.runtime.session import EngineOptions

CPU = EngineOptions(provider="cpu", threads=1)
QUICK = RecoverySettings(rounds=1, held_out_samples=40, refine_samples=80, curve_passes=2)
WIDTH, INNER = 12, 20


def bottlenecks(between: str = "", norm: bool = True, dtype: type = np.float32, seed: int = 0) -> onnx.ModelProto:
    """A stream of 12 channels, written by two layers and read by two; `between` may be on it."""
    nodes = [helper.make_node("Conv", ["x", "w0", "b0"], ["s0"], "stem", pads=[1] * 4)]
    stream = "s0"
    if norm:
        nodes.append(helper.make_node("BatchNormalization", ["s0", *(f"n_{p}" for p in "gbmv")], ["s1"], "norm"))
        stream = "s1"
    nodes += [
        helper.make_node("Conv", [stream, "w1", "b1"], ["e"], "expand"),
        helper.make_node("Relu", ["e"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2", "b2"], ["p"], "project", pads=[1] * 4),
        helper.make_node("Add", [stream, "p"], ["sum"], "shortcut"),
    ]
    last = "sum"
    if between:
        last = "between"
        operands = {
            "Mul": ["sum", "factors"], "Relu": ["sum"], "Scale": ["sum", "two"],
            "BatchNormalization": ["sum", *(f"m_{p}" for p in "gbmv")],
        }[between]  # fmt: skip
        nodes.append(helper.make_node({"Scale": "Mul"}.get(between, between), operands, [last], "between"))
    nodes += [
        helper.make_node("AveragePool", [last], ["a"], "halve", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["a", "w3", "b3"], ["h"], "head"),
        helper.make_node("Relu", ["h"], ["hr"], "head_relu"),
        helper.make_node("GlobalAveragePool", ["hr"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classes", transB=1),
    ]
    shapes = {
        "w0": (WIDTH, 3, 3, 3), "b0": (WIDTH,), "w1": (INNER, WIDTH, 1, 1), "b1": (INNER,),
        "w2": (WIDTH, INNER, 3, 3), "b2": (WIDTH,), "w3": (INNER, WIDTH, 1, 1), "b3": (INNER,),
        "w4": (5, INNER), "b4": (5,),
    }  # fmt: skip
    stored = [weights(name, shape, dtype) for name, shape in shapes.items()]
    rng = np.random.default_rng(seed)
    if norm:
        given_ = {"g": rng.uniform(0.5, 2, WIDTH), "b": rng.normal(size=WIDTH), "m": rng.normal(size=WIDTH)}
        given_["v"] = rng.uniform(0.5, 2, WIDTH)
        stored += [numpy_helper.from_array(v.astype(dtype), f"n_{p}") for p, v in given_.items()]
    if between == "BatchNormalization":
        stored += [numpy_helper.from_array(rng.uniform(0.5, 2, WIDTH).astype(dtype), f"m_{p}") for p in "gbmv"]
    if between == "Mul":
        stored.append(numpy_helper.from_array(rng.uniform(0.5, 2, (WIDTH, 1, 1)).astype(dtype), "factors"))
    if between == "Scale":
        stored.append(numpy_helper.from_array(np.array(2, dtype), "two"))
    x = helper.make_tensor_value_info("x", ELEMENT[dtype], ["N", 3, 8, 8])
    y = helper.make_tensor_value_info("y", ELEMENT[dtype], ["N", 5])
    return finished(helper.make_graph(nodes, "bottlenecks", [x], [y], stored))


def samples(count: int = 160, seed: int = 0) -> np.ndarray:
    """Pictures whose neighbouring points are alike, float32 [count, 3, 8, 8]."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 4, 4)).repeat(2, axis=2).repeat(2, axis=3)
    return (coarse + 0.3 * rng.standard_normal((count, 3, 8, 8))).astype(np.float32)


def network(model: onnx.ModelProto) -> MaskedNetwork:
    return MaskedNetwork.of(analyze(model, options=CPU, biases=True))


def seen(analysis: Analysis, working: MaskedNetwork) -> PatchStatistics:
    data = open_source({"x": samples()}, input_specs(analysis), samples=160, batch_size=32, seed=0)
    return PatchStatistics(calibrate(working.model, working.layers, data, CPU, sha=analysis.sha256), {})


def only_stream(working: MaskedNetwork) -> Stream:
    streams = linear_streams(working)
    assert [stream.group.width for stream in streams] == [WIDTH]
    return streams[0]


@pytest.mark.parametrize("norm", [False, True])
def test_a_shortcut_without_activation_is_a_linear_stream(norm: bool) -> None:
    stream = only_stream(network(bottlenecks(norm=norm)))
    assert {place.name for place in stream.read} == {"w1", "w3"}
    assert {place.name for place in stream.made} == {"w0", "b0", "w2", "b2"} | ({"n_b"} if norm else set())
    assert len(stream.norms) == norm


def test_one_factor_for_all_channels_leaves_it_linear() -> None:
    assert only_stream(network(bottlenecks("Scale"))).group.width == WIDTH


@pytest.mark.parametrize("between", ["Relu", "Mul", "BatchNormalization"])
def test_an_operator_that_distinguishes_channels_ends_a_stream(between: str) -> None:
    assert linear_streams(network(bottlenecks(between))) == []


def test_half_precision_numbers_are_not_rounded_again() -> None:
    assert linear_streams(network(bottlenecks(norm=False, dtype=np.float16))) == []


def test_shared_weights_are_not_mixed() -> None:
    model = bottlenecks(norm=False)
    head = next(node for node in model.graph.node if node.name == "head")
    head.input[1] = "w1"  # of the same shape
    assert linear_streams(network(model)) == []


def test_a_writer_with_shared_weights_ends_a_stream() -> None:
    """Its kernel is written once for two places."""
    model = bottlenecks(norm=False)
    again = [
        helper.make_node("Conv", ["sum", "w1", "b1x"], ["e2"], "expand2"),
        helper.make_node("Relu", ["e2"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "w2", "b2x"], ["p2"], "project2", pads=[1] * 4),
        helper.make_node("Add", ["sum", "p2"], ["sum2"], "shortcut2"),
    ]
    again[0].input[1] = "w1x"
    place = next(index for index, node in enumerate(model.graph.node) if node.name == "halve")
    model.graph.node[place].input[0] = "sum2"
    for node in reversed(again):
        model.graph.node.insert(place, node)
    model.graph.initializer.extend(
        weights(name, shape) for name, shape in (("w1x", (INNER, WIDTH, 1, 1)), ("b1x", (INNER,)), ("b2x", (WIDTH,)))
    )
    assert WIDTH not in [stream.group.width for stream in linear_streams(network(model))]
    again[2].input[1] = "w2x"
    model.graph.node[place + 2].input[1] = "w2x"
    model.graph.initializer.append(weights("w2x", (WIDTH, INNER, 3, 3)))
    assert only_stream(network(model)).group.width == WIDTH


@pytest.mark.parametrize("last", [True, False])
def test_channels_of_all_places_in_one_row_are_a_stream(last: bool) -> None:
    """Flattened maps: the channels outside the places, or inside them."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c"], "conv"),
        helper.make_node("AveragePool", ["c"], ["a"], "halve", kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Transpose", ["a"], ["t"], "turn", perm=[0, 2, 3, 1]),
        helper.make_node("Flatten", ["t" if last else "a"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w1"], ["y"], "head"),
    ]
    if not last:
        del nodes[2]
    stored = [weights("w0", (WIDTH, 3, 1, 1)), weights("w1", (4 * WIDTH, 5))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])
    working = network(finished(helper.make_graph(nodes, "rows", [x], [y], stored)))
    stream = only_stream(working)
    assert [(place.outer, place.inner) for place in stream.read] == [(4, 1) if last else (1, 4)]
    rotated, _ = in_principal_channels(working, [stream], seen(working.analysis, working))
    expected, found = outputs(working.model, samples(8)), outputs(rotated.model, samples(8))
    assert not np.array_equal(working.read("w1"), rotated.read("w1"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from(["", "Scale"]))
def test_the_network_computes_the_same_in_principal_channels(seed: int, norm: bool, between: str) -> None:
    model = bottlenecks(between, norm, seed=seed)
    working = network(model)
    rotated, streams = in_principal_channels(working, linear_streams(working), seen(working.analysis, working))
    assert len(streams) == 1
    x = samples(8, seed)
    expected, found = outputs(model, x), outputs(rotated.model, x)
    assert not np.array_equal(working.read("w1"), rotated.read("w1"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_principal_channels_are_uncorrelated_and_the_first_carry_most() -> None:
    working = network(bottlenecks())
    observed = seen(working.analysis, working)
    rotated, _ = in_principal_channels(working, linear_streams(working), observed)
    layer = next(layer for layer in rotated.layers if layer.tensor == "a")  # of the two, what both are made for
    moments = [
        seen(rotated.analysis, rotated).moments(found) for found in rotated.layers if found.tensor in ("s1", "a")
    ]
    scaled = sum(m.covariance / np.trace(observed_of.covariance) for m, observed_of in zip(
        moments, (observed.moments(found) for found in working.layers if found.tensor in ("s1", "a")), strict=True,
    ))  # fmt: skip
    assert layer.channels == WIDTH
    sizes = np.diag(scaled)
    assert (np.diff(sizes) <= 1e-6).all()
    assert np.abs(scaled - np.diag(sizes)).max() < 1e-3 * sizes[0]


def test_losing_principal_channels_costs_less_than_losing_stored_ones() -> None:
    model, x = bottlenecks(), samples()
    fresh = samples(64, seed=9)
    expected = outputs(model, fresh)

    def error(recover: str) -> float:
        result = onnxcop.prune(
            model, macs=0.6, data={"x": x}, options=CPU, recover=recover, settings=QUICK,
            limits=onnxcop.Limits(only=("stem",)), allocate="measured",
        )  # fmt: skip
        assert [dims for dims in result.report.groups if dims.kept < dims.width]
        return float(np.linalg.norm(outputs(result.model, fresh) - expected) / np.linalg.norm(expected))

    assert error("merge") < 0.5 * error("none")


def test_a_plan_of_principal_channels_is_replayed_with_data_only(tmp_path: Path) -> None:
    model, x = bottlenecks(), samples()
    result = onnxcop.prune(model, macs=0.6, data={"x": x}, options=CPU, settings=QUICK)
    assert any("principal channels" in line for line in result.report.choices)
    path = tmp_path / "plan.json"
    result.plan.save(path)
    plan = onnxcop.PruningPlan.load(path)
    assert plan.settings["channels"] == "principal"
    with pytest.raises(PlanMismatchError, match="give --data"):
        onnxcop.apply_plan(model, plan, options=CPU)
    again = onnxcop.apply_plan(model, plan, data={"x": x}, options=CPU)
    fresh = samples(64, seed=9)
    expected = outputs(model, fresh)
    errors = [np.linalg.norm(outputs(r.model, fresh) - expected) / np.linalg.norm(expected) for r in (result, again)]
    assert [t.dims for t in again.model.graph.initializer] == [t.dims for t in result.model.graph.initializer]
    assert errors[1] < 1.2 * errors[0] + 0.02


def test_the_same_command_gives_the_same_bytes() -> None:
    x = samples()
    results = [onnxcop.prune(bottlenecks(), macs=0.6, data={"x": x}, options=CPU, settings=QUICK) for _ in range(2)]
    first, second = (result.model.SerializeToString(deterministic=True) for result in results)
    assert first == second


def test_streams_that_may_not_be_cut_keep_their_channels() -> None:
    model = bottlenecks()
    result = onnxcop.prune(
        model, macs=0.8, data={"x": samples()}, options=CPU, settings=QUICK, limits=onnxcop.Limits(keep=("stem",))
    )
    assert result.plan.settings["channels"] == "stored"
    assert not any("principal" in line for line in result.report.choices)
    assert result.model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.zoo
def test_a_mobile_network_has_a_stream_in_every_stage(zoo: Path) -> None:
    streams = linear_streams(network(onnx.load(zoo / "trained" / "imagenet_mobilenet_v2.onnx")))
    assert [stream.group.width for stream in streams] == [16, 24, 32, 64, 96, 160, 320]
    assert [len(stream.read) for stream in streams] == [1, 2, 3, 4, 3, 3, 1]
    assert linear_streams(network(onnx.load(zoo / "trained" / "cifar_resnet20.onnx"))) == []
