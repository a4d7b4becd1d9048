"""Pruning among the passes of onnx_ir."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import chain, nothing_to_prune, outputs

ir = pytest.importorskip("onnx_ir", reason="the pass of onnx_ir needs the package onnx-ir")

import onnxcop  # noqa: E402
from onnxcop.integrations.onnx_ir import PrunePass  # noqa: E402

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
SETTINGS = {"macs": 0.6, "criterion": "l2", "recover": "none", "options": CPU}
PICTURE = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def test_the_pass_prunes_as_the_function_does() -> None:
    model = ir.from_proto(chain())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    step = PrunePass(**SETTINGS)
    result = step(model)
    assert isinstance(result, ir.passes.PassResult)
    assert result.modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    expected = onnxcop.prune(chain(), **SETTINGS)
    assert step.result is not None
    assert step.result.plan.cuts == expected.plan.cuts
    np.testing.assert_array_equal(outputs(ir.to_proto(result.model), PICTURE), outputs(expected.model, PICTURE))
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)


def test_nothing_removed_is_not_modified() -> None:
    result = PrunePass(**SETTINGS | {"macs": 1.0})(ir.from_proto(chain()))
    assert not result.modified
    np.testing.assert_array_equal(outputs(ir.to_proto(result.model), PICTURE), outputs(chain(), PICTURE))


def test_in_a_sequence_with_passes_of_onnx_ir() -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    steps = ir.passes.Sequential(PrunePass(**SETTINGS), RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass())
    result = steps(ir.from_proto(chain()))
    assert result.modified
    pruned = ir.to_proto(result.model)
    assert not any(node.doc_string for node in pruned.graph.node)
    np.testing.assert_allclose(
        outputs(pruned, PICTURE), outputs(onnxcop.prune(chain(), **SETTINGS).model, PICTURE), rtol=1e-5, atol=1e-6
    )


def test_external_data_are_read(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save_model(chain(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    model = ir.load(path)
    result = PrunePass(**SETTINGS)(model)
    expected = onnxcop.prune(chain(), **SETTINGS).model
    np.testing.assert_array_equal(outputs(ir.to_proto(result.model), PICTURE), outputs(expected, PICTURE))
    assert isinstance(model.graph.initializers["w1"].const_value, ir.ExternalTensor)


def test_errors_are_passed_on() -> None:
    with pytest.raises(onnxcop.OnnxcopError, match="nothing to prune"):
        PrunePass(options=CPU)(ir.from_proto(nothing_to_prune()))
