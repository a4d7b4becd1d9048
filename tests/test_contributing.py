"""The worked example and the walks in CONTRIBUTING.md work as they are written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
    """Names defined by the Python block of the document."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?<!-->\n)```python\n(.*?)```", text, flags=re.DOTALL)
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


# The walks


WALKS = {
    "A criterion": (2, ["tests/criteria/test_spread.py", "tests/criteria/test_criteria.py", "-k", "spread"]),
    "An operator rule": (3, ["tests/coupling/ops/test_rules.py", "-k", "Trilu or every_table_entry"]),
    "A recovery method": (2, ["tests/recovery/test_shift.py", "tests/recovery/test_methods.py"]),
    "A resource": (2, ["tests/allocation/test_layer_widths.py", "tests/allocation/test_resources.py"]),
}


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_adds_what_it_says(title: str, tmp_path: Path) -> None:
    for name in ("onnxcop", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "exports", "*.npz")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("models", "pyproject.toml", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    files, tests = WALKS[title]
    assert len(edited(title, tmp_path)) == files
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def edited(title: str, root: Path) -> set[str]:
    """Carry out the blocks of a section, and return the files that they touch."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^##+ ", text.split(f"\n### {title}\n")[1], flags=re.MULTILINE)[0]
    touched = set()
    for name, where, anchor, block in re.findall(
        r"<!-- (\S+?)(?: (above|below|end)(?: (\S+))?)? -->\n```(?:python|text)\n(.*?)```", section, re.DOTALL
    ):
        path = root / name
        assert path.exists() == bool(where), name
        touched.add(name)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if where else []
        place = len(lines) if where in ("", "end") else [line.startswith(anchor) for line in lines].index(True)
        place += where == "below"
        spaced = {"end": "\n\n" + block, "above": block + "\n\n"}.get(where, block)
        path.write_text("".join([*lines[:place], spaced, *lines[place:]]), encoding="utf-8")
    return touched
