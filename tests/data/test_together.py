"""Models that declare a batch of any size and take one sample only."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, finished, weights

import onnxcop
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
ONE_SAMPLE = "runs with one sample only"


def traced_with_one(target: tuple[int, ...]) -> onnx.ModelProto:
    """A convolution and a classifier, and between them a Reshape to sizes that were written into the graph."""
    shape = onnx.numpy_helper.from_array(np.array(target, np.int64), "shape")
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Reshape", ["c", "shape"], ["d"], "reshape"),
        helper.make_node("ReduceMean", ["d"], ["e"], "mean", axes=[1], keepdims=0),
        helper.make_node("Gemm", ["e", "w2"], ["y"], "gemm", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", 5])
    stored = [weights("w1", (8, 3, 3, 3)), weights("w2", (5, 8)), shape]
    return finished(helper.make_graph(nodes, "traced", [x], [y], stored))


@pytest.mark.parametrize("target", [(1, 1, 8), (1, -1, 8)], ids=["refuses two", "mixes two"])
def test_calibrated_one_by_one(target: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    model = traced_with_one(target)
    x = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
    with caplog.at_level(logging.INFO, logger="onnxcop"):
        result = onnxcop.prune(model, filters=0.8, data=x, options=CPU)
    assert any(ONE_SAMPLE in line for line in caplog.messages)
    assert result.report.quality["divergence"] >= 0
    assert "24 of 24 samples" in result.report.calibration


def test_without_data(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="onnxcop"):
        onnxcop.prune(traced_with_one((1, 1, 8)), filters=0.8, options=CPU)
    assert sum(ONE_SAMPLE in line for line in caplog.messages) == 1


def test_batches_with_which_a_model_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    source = open_data(onnxcop.analyze(chain(), options=CPU), DataOptions(data=x, samples=8, batch_size=4))
    assert source is not None
    assert [len(batch["x"]) for batch in source.batches()] == [4, 4]
    assert not caplog.messages
