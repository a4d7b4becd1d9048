"""Weights that are listed as graph inputs: they are removed from the list, unless the user keeps them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from small_models import chain

import onnxcop
from onnxcop.graph.passes.unlist_initializers import unlist_initializers

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def listing(ir_version: int) -> onnx.ModelProto:
    model = chain(widths=(16, 32))
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = ir_version
    return model


def names(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.input]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_leave_the_inputs(ir_version: int) -> None:
    model = listing(ir_version)
    result = onnxcop.prune(model, macs=0.7, criterion="l2", recover="none", options=CPU)
    assert names(result.model) == ["x"]
    assert result.model.ir_version >= 4
    assert any("7 weights were inputs as well" in line for line in result.report.choices)
    onnx.checker.check_model(result.model, full_check=True)
    again = onnxcop.apply_plan(model, result.plan, options=CPU)
    assert names(again.model) == ["x"]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_they_stay_on_request(ir_version: int) -> None:
    model = listing(ir_version)
    result = onnxcop.prune(
        model, macs=0.7, criterion="l2", recover="none", options=CPU, keep_initializer_inputs=True
    )  # fmt: skip
    assert names(result.model) == names(model)
    assert result.model.ir_version == ir_version
    assert not any("inputs" in line for line in result.report.choices)


def test_the_model_computes_the_same() -> None:
    model, x = listing(8), np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    before = onnxcop.runtime.session.Session(model, CPU).run({"x": x})["y"]
    assert unlist_initializers(model) == 7
    assert unlist_initializers(model) == 0
    after = onnxcop.runtime.session.Session(model, CPU).run({"x": x})["y"]
    np.testing.assert_allclose(after, before, rtol=1e-4)
