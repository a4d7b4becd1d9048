"""Pruning as a pass of the real Olive, in an environment of its own.

Olive brings PyTorch along, so it is not among what the tests install. Where it is installed, or where
ONNXCOP_OLIVE_PYTHON names the interpreter of an environment that has it, these tests run
`tools/try_olive.py` there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ["--data", ROOT / "models" / "digits_calib.npz", "--test", ROOT / "models" / "digits_test.npz"]


@pytest.fixture(scope="module")
def olive_python() -> str:
    """An interpreter that has olive-ai."""
    named = os.environ.get("ONNXCOP_OLIVE_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("olive") is None:
        pytest.skip("olive-ai is not installed; set ONNXCOP_OLIVE_PYTHON to the Python of an environment that has it")
    return sys.executable


def _run(python: str, folder: Path, *arguments: str | Path) -> tuple[onnx.ModelProto, dict[str, list[float]]]:
    command = [python, ROOT / "tools" / "try_olive.py", ROOT / "models" / "digits_resnet.onnx", "-o", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return onnx.load(found["model"]), found


def test_a_workflow_prunes(olive_python: str, tmp_path: Path) -> None:
    model, found = _run(olive_python, tmp_path, "--macs", "0.7", *DATA)
    before, after = found["bytes"]
    assert after < 0.65 * before
    base, left = found["accuracy"]
    assert left > base - 0.02
    original = onnx.load(ROOT / "models" / "digits_resnet.onnx")
    assert [value.name for value in model.graph.input] == [value.name for value in original.graph.input]
    packages = json.loads((tmp_path / "olive_packages.json").read_text())
    assert packages["passes"]["OnnxCop"]["module_path"] == "onnxcop.integrations.olive.OnnxCop"


def test_pruned_then_quantized_with_the_same_data(olive_python: str, tmp_path: Path) -> None:
    model, found = _run(olive_python, tmp_path, "--macs", "0.7", "--quantize", "--data-config", *DATA)
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    before, after = found["bytes"]
    assert after < 0.25 * before
    base, left = found["accuracy"]
    assert left > base - 0.03
