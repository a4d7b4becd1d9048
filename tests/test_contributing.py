"""The worked example in CONTRIBUTING.md is a rule that works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcop

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the Python block of the document defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


def _model(batched: bool) -> onnx.ModelProto:
    """Gemm, then a FusedMatMul by transposed weights, then a Gemm."""
    rng = np.random.default_rng(0)
    shapes = {"first": (6, 16), "fused": (12, 16), "last": (12, 3)}
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    nodes = [helper.make_node("MatMul", ["x", "first"], ["a"], "first")]
    fused = {"domain": "com.microsoft", "transB": 1}
    if batched:
        nodes.append(helper.make_node("Unsqueeze", ["a", "axes"], ["wide"], "unsqueeze"))
        nodes.append(helper.make_node("FusedMatMul", ["wide", "fused"], ["b3"], "fused", **fused))
        nodes.append(helper.make_node("Squeeze", ["b3", "axes"], ["b"], "squeeze"))
    else:
        nodes.append(helper.make_node("FusedMatMul", ["a", "fused"], ["b"], "fused", **fused))
    nodes.append(helper.make_node("MatMul", ["b", "last"], ["y"], "last"))
    graph = helper.make_graph(
        nodes, "example",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 3])],
        [*weights, axes],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_the_rule_prunes_what_was_frozen_without_it(example: dict[str, Any]) -> None:
    key = ("com.microsoft", "FusedMatMul")
    others = {name: rule for name, rule in onnxcop.DEFAULT_RULES.items() if name != key}
    without = onnxcop.analyze(_model(batched=False), rules=others)
    assert len(without.structure.unit_class) == 0
    assert "no rule for operator com.microsoft.FusedMatMul" in str(without.structure.coupling.declined)
    result = onnxcop.prune(_model(batched=False), macs=0.5, rules=example["RULES"])
    assert {(group.width, group.exact) for group in result.report.groups} == {
        (16, True),
        (12, True),
    }
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert result.report.verification is not None
    assert result.report.verification.max_difference is not None
    assert result.report.verification.max_difference < 1e-5


def test_the_rule_counts_its_arithmetic(example: dict[str, Any]) -> None:
    analysis = onnxcop.analyze(_model(batched=False), rules=example["RULES"])
    assert analysis.cost.original()[0] == 5 * (6 * 16 + 16 * 12 + 12 * 3)


def test_the_rule_declines_batches(example: dict[str, Any]) -> None:
    analysis = onnxcop.analyze(_model(batched=True), rules=example["RULES"])
    assert len(analysis.structure.unit_class) == 0
    reasons = [reason.text for _, reason in analysis.structure.coupling.declined]
    assert reasons == ["FusedMatMul with batch axes"]
