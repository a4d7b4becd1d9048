"""The neighbours in a toolchain: simplifiers before, quantization after."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import onnxcop

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def calibration(models_dir: Path) -> Arrays:
    return dict(np.load(models_dir / "digits_calib.npz"))


@pytest.fixture(scope="module")
def pruned(models_dir: Path, calibration: Arrays) -> onnxcop.PruneResult:
    return onnxcop.prune(models_dir / "digits_resnet.onnx", macs=0.7, data=calibration, samples=256, options=CPU)


def accuracy(model: onnx.ModelProto | Path, models_dir: Path) -> float:
    """The share of the test pictures that are named rightly."""
    test = np.load(models_dir / "digits_test.npz")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"input": test["input"]})
    return float((np.asarray(scores).argmax(axis=1) == test["labels"]).mean())


class Reader(CalibrationDataReader):
    """Batches of the calibration pictures, in the form that ONNX Runtime's quantization reads."""

    def __init__(self, pictures: np.ndarray[Any, Any]) -> None:
        self._batches = iter(np.array_split(pictures[:128], 4))

    def get_next(self) -> Arrays | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch}


@pytest.mark.parametrize("per_channel", [False, True])
def test_prune_then_quantize(
    pruned: onnxcop.PruneResult, calibration: Arrays, models_dir: Path, tmp_path: Path, per_channel: bool
) -> None:
    small, quantized = tmp_path / "small.onnx", tmp_path / "int8.onnx"
    pruned.save(small)
    quantize_static(
        small, quantized, Reader(calibration["input"]), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=per_channel,
    )  # fmt: skip
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(quantized).graph.node)
    base = accuracy(models_dir / "digits_resnet.onnx", models_dir)
    assert base > 0.99
    assert accuracy(small, models_dir) > base - 0.01
    assert accuracy(quantized, models_dir) > base - 0.03
    assert quantized.stat().st_size < 0.6 * small.stat().st_size


def test_quantize_then_prune(models_dir: Path, calibration: Arrays, tmp_path: Path) -> None:
    """The other order works too: scales and zero points lose the channels that the weights lose."""
    quantized = tmp_path / "int8.onnx"
    quantize_static(
        models_dir / "digits_resnet.onnx", quantized, Reader(calibration["input"]),
        quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    result = onnxcop.prune(quantized, macs=0.8, criterion="l2", recover="none", options=CPU)
    assert result.report.after.macs <= 0.8 * result.report.before.macs
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None
    assert result.report.verification.max_difference <= 1e-4


def _slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    onnxslim = pytest.importorskip("onnxslim", reason="onnxslim is not installed")
    slim: onnx.ModelProto = onnxslim.slim(model)
    return slim


# onnxsim 0.8.1 simplifies in a second, but a process that has imported it hangs in native code when it ends, so that
# it runs in a process of its own, which ends without asking it.
SIMPLIFY = """
import os, sys
import onnx, onnxsim
simple, same = onnxsim.simplify(onnx.load(sys.argv[1]))
onnx.save(simple, sys.argv[2])
sys.stdout.flush()
os._exit(0 if same else 1)
"""
PATIENCE = 120  # seconds for a model that takes one


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    folder = os.environ.get("ONNXCOP_ONNXSIM", "")
    if not folder and importlib.util.find_spec("onnxsim") is None:
        pytest.skip("onnxsim is not installed; ONNXCOP_ONNXSIM may name the folder that holds it")
    with tempfile.TemporaryDirectory() as place:
        paths = [str(Path(place, name)) for name in ("model.onnx", "simple.onnx")]
        onnx.save(model, paths[0])
        paths_of_python = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
        try:
            subprocess.run(
                [sys.executable, "-c", SIMPLIFY, *paths], env={**os.environ, "PYTHONPATH": paths_of_python},
                check=True, timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.skip(f"onnxsim was not done in {PATIENCE} s")
        return onnx.load(paths[1])


@pytest.mark.parametrize("simplify", [_slimmed, _simplified])
def test_after_a_simplifier(simplify: Any, models_dir: Path, calibration: Arrays) -> None:
    """The same budget, the same groups, and as good a result."""
    original = onnx.load(models_dir / "digits_resnet.onnx")
    simple = simplify(original)
    result = onnxcop.prune(simple, macs=0.7, data=calibration, samples=256, options=CPU)
    assert result.report.after.macs <= 0.7 * result.report.before.macs
    widths = sorted(group.width for group in result.report.groups)
    assert widths == sorted(group.width for group in onnxcop.prune(
        original, macs=0.9, criterion="l2", recover="none", options=CPU
    ).report.groups)  # fmt: skip
    assert accuracy(result.model, models_dir) > 0.98


@pytest.mark.parametrize("simplify", [_slimmed, _simplified])
def test_before_a_simplifier(simplify: Any, pruned: onnxcop.PruneResult, models_dir: Path) -> None:
    """What a simplifier makes of a pruned model computes the same."""
    simple = simplify(pruned.model)
    assert accuracy(simple, models_dir) == accuracy(pruned.model, models_dir)
