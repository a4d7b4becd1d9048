"""int8 after pruning, through ONNX Runtime's quantization."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_runs import BARE
from small_models import chain

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import CalibrationError, ModelError
from onnxcop.pipeline.quantize import quantize
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
    assert "int8 (static): file size" in capsys.readouterr().out
    assert {node.op_type for node in onnx.load(tmp_path / "small.int8.onnx").graph.node} >= {"QuantizeLinear"}
    assert "onnxcop.version" in {entry.key for entry in onnx.load(tmp_path / "small.int8.onnx").metadata_props}
    assert cli.run([*arguments, "--data", str(data), "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)["quantized"]
    assert record["mode"] == "static" and record["comparison"]["agreement"]["figures"]["divergence"]["value"] >= 0


@pytest.mark.zoo
def test_a_pruned_classifier_in_int8(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(zoo / "data" / "mnist_calib.npz"), "--preprocess", "mnist", "--samples", "256"]
    model, out = zoo / "trained" / "digit_cnn.onnx", tmp_path / "small.onnx"
    command = [str(model), "-o", str(out), "--macs", "0.9", "--criterion", "l2", *BARE, *data]
    assert cli.run([*command, "--then-quantize", "static", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)["quantized"]["comparison"]
    assert found["b"]["cost"]["bytes"] < 0.35 * found["a"]["cost"]["bytes"]
    assert found["agreement"]["figures"]["outputs"][0]["agreement"]["value"] > 0.9
