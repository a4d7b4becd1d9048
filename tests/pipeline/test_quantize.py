"""int8 after pruning, through ONNX Runtime's quantization."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from cli_runs import BARE
from onnx import helper, numpy_helper
from small_models import chain

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.outputs.intervals import Estimate
from onnxcop.pipeline.quantize import Int8Choice, prepared, quantize
from onnxcop.reconstruction.divergence import Figures, OutputFigures
from onnxcop.recovery.int8 import with_fitted_layers
from onnxcop.report.schema import json_schema
from onnxcop.runtime.session import Session

CPU = onnxcop.EngineOptions("cpu", 1)
DATA = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)


def test_a_static_model_has_pairs_with_ranges_of_the_data_and_a_dynamic_one_integers() -> None:
    model = chain()
    static, dynamic = quantize(model, "static", data=DATA, options=CPU), quantize(model, "dynamic", options=CPU)
    onnx.checker.check_model(static)
    kinds = Counter(node.op_type for node in static.graph.node)
    assert kinds["QuantizeLinear"] >= 2 and kinds["DequantizeLinear"] > kinds["QuantizeLinear"]
    assert any("Integer" in node.op_type for node in dynamic.graph.node)
    with Session(model, CPU) as one, Session(static, CPU) as other:
        (wanted,), (found,) = one.run({"x": DATA}).values(), other.run({"x": DATA}).values()
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
    assert np.abs(found - wanted).max() > 0


def test_what_cannot_be_quantized_says_why() -> None:
    with pytest.raises(CalibrationError, match="static quantization takes ranges from calibration data"):
        quantize(chain(), "static", options=CPU)
    with pytest.raises(ModelError, match="is already quantized"):
        quantize(quantize(chain(), "static", data=DATA, options=CPU), "static", data=DATA, options=CPU)


def test_the_command_writes_and_compares_an_int8_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "small.onnx", tmp_path / "d.npz"
    np.savez(data, x=DATA)
    arguments = [str(model), "-o", str(out), "--criterion", "l2", *BARE, "--then-quantize", "static"]
    assert cli.run(arguments) == 2
    assert "give --data" in capsys.readouterr().err
    assert not out.exists()
    assert cli.run([*arguments, "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "int8: static quantization by ONNX Runtime; ranges are " in shown
    assert re.search(r"kept +int8", shown) and re.search(r"file size .* kB, [\d.]+%", shown)
    assert f"wrote {out}, {tmp_path / 'small.int8.onnx'} in" in shown
    assert {node.op_type for node in onnx.load(tmp_path / "small.int8.onnx").graph.node} >= {"QuantizeLinear"}
    assert "onnxcop.version" in {entry.key for entry in onnx.load(tmp_path / "small.int8.onnx").metadata_props}
    assert cli.run([*arguments, "--data", str(data), "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)
    jsonschema.validate(record, json_schema())
    assert record["int8_output"] == str(tmp_path / "small.int8.onnx")
    assert record["int8"]["mode"] == "static" and record["int8"]["figures"]["divergence"]["value"] >= 0


def test_a_result_shows_its_int8_model_everywhere(tmp_path: Path) -> None:
    result = onnxcop.prune(chain(), then_quantize="static", data=DATA, options=CPU, criterion="l2", recover="none")
    assert result.int8 is not None and result.report.int8 is not None
    assert result.report.int8.bytes == result.int8.ByteSize()
    assert re.search(r"kept +int8\n", str(result))
    for suffix in (".html", ".md"):
        result.save_report(tmp_path / f"run{suffix}")
        assert "int8: static quantization" in (tmp_path / f"run{suffix}").read_text().replace("Int8", "int8")


def test_fitted_layers_compute_what_they_computed_before(tmp_path: Path) -> None:
    model = onnx.load(prepared(chain(), tmp_path))
    rounded = quantize(model, "static", data=DATA, options=CPU)
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(rounded)
    for tensor in spoiled.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.INT32 and np.any(values):
            tensor.CopyFrom(numpy_helper.from_array((values + 5000).astype(np.int32), tensor.name))
        elif tensor.data_type == onnx.TensorProto.INT8 and values.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=1), tensor.name))
    fitted = with_fitted_layers(model, spoiled, [{"x": part} for part in np.split(DATA, 8)], CPU)
    assert distance(model, fitted) < 0.1 < distance(model, spoiled)
    assert distance(model, fitted) < 1.5 * distance(model, rounded)


def distance(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    """How far the outputs of two models are apart, relative to those of the first."""
    with Session(model, CPU) as one, Session(other, CPU) as two:
        (wanted,), (found,) = one.run({"x": DATA}).values(), two.run({"x": DATA}).values()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.zoo
def test_a_pruned_classifier_in_int8(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(zoo / "data" / "mnist_calib.npz"), "--preprocess", "mnist", "--samples", "256"]
    model, out = zoo / "trained" / "digit_cnn.onnx", tmp_path / "small.onnx"
    command = [str(model), "-o", str(out), "--macs", "0.9", "--criterion", "l2", *BARE, *data]
    assert cli.run([*command, "--then-quantize", "static", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["int8"]["bytes"] < 0.35 * found["before"]["bytes"]
    assert found["int8"]["figures"]["outputs"][0]["agreement"]["value"] > 0.9


def detector() -> onnx.ModelProto:
    """Boxes in pixels and scores below one, joined in one output."""
    rng = np.random.default_rng(0)
    shapes = {"body": (8, 3, 3, 3), "boxes": (4, 8, 1, 1), "scores": (3, 8, 1, 1)}
    stored = [numpy_helper.from_array((rng.standard_normal(s) * 0.2).astype(np.float32), n) for n, s in shapes.items()]
    stored.append(numpy_helper.from_array(np.full((1, 1, 1, 1), 1000, np.float32), "pixels"))
    nodes = [
        helper.make_node("Conv", ["x", "body"], ["b"], "body_conv", pads=[1] * 4),
        helper.make_node("Relu", ["b"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "boxes"], ["c"], "boxes_conv"),
        helper.make_node("Mul", ["c", "pixels"], ["m"], "in_pixels"),
        helper.make_node("Conv", ["r", "scores"], ["s"], "scores_conv"),
        helper.make_node("Sigmoid", ["s"], ["p"], "sigmoid"),
        helper.make_node("Concat", ["m", "p"], ["y"], "join", axis=1),
    ]
    ends = [[helper.make_tensor_value_info(n, 1, ["N", c, 8, 8])] for n, c in (("x", 3), ("y", 7))]
    graph = helper.make_graph(nodes, "detector", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def error_of_scores(model: onnx.ModelProto, int8: onnx.ModelProto) -> float:
    """Relative error of the scores of a detector in int8."""
    with Session(model, CPU) as one, Session(int8, CPU) as two:
        (wanted,), (found,) = one.run({"x": DATA}).values(), two.run({"x": DATA}).values()
    return float(np.linalg.norm(found[:, 4:] - wanted[:, 4:]) / np.linalg.norm(wanted[:, 4:]))


def test_what_joins_small_numbers_with_large_ones_stays_in_floating_point() -> None:
    """One scale for boxes in pixels and scores below one would round the scores to zero."""
    model = detector()
    assert error_of_scores(model, quantize(model, "static", data=DATA, options=CPU)) < 0.05


def test_what_pruning_changed_does_not_hide_what_int8_costs() -> None:
    """A detector that lost half of its filters, without recovery, is as close to its int8 model as a whole one."""
    result = onnxcop.prune(
        detector(), then_quantize="static", data=DATA, options=CPU, criterion="l2", recover="none",
        limits=onnxcop.Limits(multiple_of=1), macs=0.5, latency_seconds=0,
    )  # fmt: skip
    assert result.int8 is not None
    assert error_of_scores(result.model, result.int8) < 0.05


@pytest.mark.parametrize(
    ("one", "more"),
    [((0.8, 0.9), True), ((0.4, 0.9), False), ((None, None), False), (None, False)],
)  # fmt: skip
def test_predictions_agree_more_often_beyond_both_intervals(one: tuple[float, float] | None, more: bool) -> None:
    """Two choices of ranges whose divergences are of one size may still find other boxes."""

    def choice(ends: tuple[float, float] | None) -> Int8Choice:
        divergence = Estimate(0.5, 0.4, 0.6, 40)
        agreement = None if ends is None else Estimate(0.5, *ends, 40)
        output = OutputFigures(("y",), "detections", "", divergence, "relative error", agreement, "boxes matched")
        return Int8Choice(Figures(divergence, (output,)), chain(), chain(), "")

    assert choice(one).agrees_more(choice((0.2, 0.5))) == more
    assert not choice((0.2, 0.5)).agrees_more(choice(one))
