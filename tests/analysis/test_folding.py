"""Weights that the graph computes from constants are stored, so that they can be cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import finished, outputs, weights, written

import onnxcop
from onnxcop.analysis.analyze import analyze
from onnxcop.cli import main as cli

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def standardized(*, batch_norm: bool = True, shared: bool = False) -> onnx.ModelProto:
    """Two convolutions whose weights are standardized filter by filter, in one of the ways exporters write it."""
    nodes, extra = [], []
    for name, filters in (("w1", 8), ("w2", 12)):
        if batch_norm:
            flat = ["gain1", "zero1", "mean1", "var1"] if name == "w1" else ["gain2", "zero2", "mean2", "var2"]
            nodes += [
                helper.make_node("Reshape", [name, f"{name}_flat_shape"], [f"{name}_flat"]),
                helper.make_node(
                    "BatchNormalization", [f"{name}_flat", *flat], [f"{name}_n", f"{name}_mean", f"{name}_var"],
                    training_mode=1, momentum=0.0,
                ),
                helper.make_node("Shape", [name], [f"{name}_shape"]),
                helper.make_node("Reshape", [f"{name}_n", f"{name}_shape"], [f"{name}_std"]),
            ]  # fmt: skip
            extra += [numpy_helper.from_array(np.array([1, filters, -1]), f"{name}_flat_shape")]
            for kind, value in (("gain", 0.5), ("zero", 0.0), ("mean", 0.0), ("var", 1.0)):
                extra.append(numpy_helper.from_array(np.full(filters, value, np.float32), f"{kind}{name[1]}"))
        else:
            nodes += [
                helper.make_node("ReduceMean", [name], [f"{name}_mean"], axes=[1, 2, 3]),
                helper.make_node("Sub", [name, f"{name}_mean"], [f"{name}_gap"]),
                helper.make_node("ReduceL2", [f"{name}_gap"], [f"{name}_norm"], axes=[1, 2, 3]),
                helper.make_node("Div", [f"{name}_gap", f"{name}_norm"], [f"{name}_std"]),
            ]
    nodes += [
        helper.make_node("Conv", ["x", "w1_std"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2_std"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "head"], ["y"], "head"),
    ]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])]
    if shared:
        nodes.append(helper.make_node("ReduceSum", ["w2"], ["total"], keepdims=0))
        results.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, []))
    shapes = {"w1": (8, 3, 3, 3), "w2": (12, 8, 3, 3), "head": (12, 5)}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    stored = [weights(name, shape) for name, shape in shapes.items()] + extra
    return finished(helper.make_graph(nodes, "standardized", inputs, results, stored))


@pytest.mark.parametrize("batch_norm", [True, False], ids=["training mode", "written out"])
def test_standardized_weights_are_cut(batch_norm: bool, tmp_path: Path) -> None:
    model = standardized(batch_norm=batch_norm)
    found = analyze(model, options=CPU)
    assert [node.op_type for node in found.model.graph.node[:2]] == ["Conv", "Relu"]
    assert {tensor.name for tensor in found.model.graph.initializer} == {"w1_std", "w2_std", "head"}
    assert all(group.exact for group in found.structure.groups)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(outputs(found.model, x), outputs(model, x), atol=1e-6)
    path = written(model, tmp_path / "net.onnx")
    result = onnxcop.prune(path, macs=0.6, recover="none", criterion="l2", options=CPU)
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    replayed = onnxcop.apply_plan(path, result.plan, options=CPU)
    assert replayed.model == result.model


def test_a_weight_that_is_read_otherwise_too_stays_computed() -> None:
    found = analyze(standardized(shared=True), options=CPU)
    names = {tensor.name for tensor in found.model.graph.initializer}
    assert "w1_std" in names
    assert "w2" in names
    assert "w2_std" not in names


def test_what_only_converts_stays_as_it_is() -> None:
    """A half-precision weight is not stored in single precision, nor a quantized one without its quantization."""
    nodes = [
        helper.make_node("Cast", ["w1"], ["w1_single"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w1_single"], ["m1"]),
        helper.make_node("Relu", ["m1"], ["r1"]),
        helper.make_node("DequantizeLinear", ["w2", "scale"], ["w2_single"]),
        helper.make_node("MatMul", ["r1", "w2_single"], ["y"]),
    ]
    stored = [
        weights("w1", (8, 16), np.float16),
        numpy_helper.from_array(np.arange(64, dtype=np.int8).reshape(16, 4), "w2"),
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    model = finished(helper.make_graph(nodes, "halves", border[:1], border[1:], stored))
    assert analyze(model, options=CPU).model.graph == model.graph


def test_a_weight_that_is_larger_than_what_makes_it_stays_computed() -> None:
    """The filters of a spectrogram take a few bytes as an exponential and many as a matrix."""
    nodes = [
        helper.make_node("Mul", ["times", "rates"], ["slopes"]),
        helper.make_node("Exp", ["slopes"], ["filters"]),
        helper.make_node("MatMul", ["x", "filters"], ["bands"]),
        helper.make_node("MatMul", ["bands", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "head"], ["y"]),
    ]
    stored = [weights("times", (64, 1)), weights("rates", (1, 32)), weights("w", (32, 16)), weights("head", (16, 4))]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 64), ("y", 4))]
    model = finished(helper.make_graph(nodes, "bands", border[:1], border[1:], stored))
    assert analyze(model, options=CPU).model.graph == model.graph
    result = onnxcop.prune(model, macs=0.9, recover="none", criterion="l2", options=CPU, latency_seconds=0.0)
    assert result.model.ByteSize() < model.ByteSize() + len(result.model.metadata_props[0].value)


def test_half_precision_weights_that_recovery_rewrites_are_not_kept_beside_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["w1"], ["w1_single"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w1_single"], ["m1"]),
        helper.make_node("Relu", ["m1"], ["r1"]),
        helper.make_node("Gemm", ["r1", "w2"], ["y"]),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 8), ("y", 4))]
    stored = [weights("w1", (8, 16), np.float16), weights("w2", (16, 4))]
    model = finished(helper.make_graph(nodes, "halves", border[:1], border[1:], stored))
    result = onnxcop.prune(model, macs=0.7, options=CPU)
    assert "w1" not in {tensor.name for tensor in result.model.graph.initializer}
    assert result.report.after.params < result.report.before.params


def test_a_file_that_onnxruntime_optimized_for_one_machine_says_so(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "fast.onnx")
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 4
    source = str(models_dir / "digits_resnet.onnx")
    onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    if not any(node.domain == "com.microsoft.nchwc" for node in onnx.load(tmp_path / "fast.onnx").graph.node):
        pytest.skip("this processor has no layout of its own")
    assert cli.run([str(tmp_path / "fast.onnx"), "--provider", "cpu"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "optimized this file for one machine; prune the file from before, optimize after pruning" in line


def test_a_budget_without_removable_filters_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nearly all of the arithmetic lies in a layer from the input to the output."""
    nodes = [
        helper.make_node("Gemm", ["x", "big"], ["y"], "large"),
        helper.make_node("Gemm", ["s", "w1"], ["a"], "small1"),
        helper.make_node("Gemm", ["a", "w2"], ["z"], "small2"),
    ]
    sizes = {"x": 512, "s": 1, "y": 512, "z": 1}
    x, s, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in sizes.items())
    stored = [weights("big", (512, 512)), weights("w1", (1, 2)), weights("w2", (2, 1))]
    path = written(finished(helper.make_graph(nodes, "lopsided", [x, s], [y, z], stored)), tmp_path / "net.onnx")
    assert cli.run([str(path), "--provider", "cpu", "--criterion", "l2", "--recover", "none"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the prunable filters hold almost none of the multiply-accumulates" in line and "onnxcop inspect" in line
