"""Extensions of other packages: criteria and operator rules as entry points, and entry points that do not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import chain

PLUGIN = '''
from onnxcop.criteria.base import StaticRanking
from onnxcop.criteria.filters import per_filter
from onnxcop.coupling.ops import Op

import numpy as np


class Largest:
    """The largest weight of a filter."""

    name, needs_stats = "largest", False

    def rank(self, context):
        return StaticRanking(per_filter(context, lambda rows: np.abs(rows).max(axis=1)))

    def parameters(self):
        return {}


def squash(op: Op) -> None:
    """Squash: every element alone."""
    op.emit(op.label(0))


RULES = {("my.domain", "Squash"): squash}
NO_RULES = ["Squash"]
'''

ENTRY_POINTS = """
[onnxcop.criteria]
largest = my_plugin:Largest
gone = my_plugin_that_is_gone:Criterion
hollow = my_plugin:RULES

[onnxcop.operators]
squash = my_plugin:RULES
gone = my_plugin_that_is_gone:RULES
list = my_plugin:NO_RULES
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds an installed plug-in."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "my_plugin.py").write_text(PLUGIN)
    info = folder / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)]), "COLUMNS": "200"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnxcop", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_help_lists_what_is_registered_without_loading_it(environment: dict[str, str]) -> None:
    shown = run(environment, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    text = " ".join(shown.stdout.split())
    assert "wanda, gone, hollow, largest. [default: measured sensitivity]" in text
    assert "squash (my_plugin:RULES)" in text
    script = "import onnxcop.cli.main, sys; onnxcop.cli.main.run(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert not any(f"'{name}'" in loaded.stdout for name in ("my_plugin", "numpy", "onnx", "onnxruntime"))


def test_a_registered_criterion_ranks(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(chain().SerializeToString())
    common = [str(path), "-o", str(tmp_path / "out.onnx"), "--provider", "cpu", "--latency-seconds", "0"]
    done = run(environment, *common, "--criterion", "largest", "--recover", "none")
    assert done.returncode == 0, done.stderr
    assert "largest" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "skipped" in line]
    assert "skipped 'gone' of onnxcop.operators, an entry point of my-plugin: ModuleNotFoundError" in "\n".join(lines)
    assert "skipped 'gone' of onnxcop.criteria" in "\n".join(lines)
    assert "skipped 'hollow' of onnxcop.criteria" in "\n".join(lines)
    assert "skipped 'list' of onnxcop.operators" in "\n".join(lines)
    failed = run(environment, *common, "--criterion", "gone")
    assert failed.returncode == 1
    assert "error: unknown criterion 'gone'; choose one of cop, " in failed.stderr


def test_a_registered_rule_is_followed(environment: dict[str, str]) -> None:
    script = (
        "from onnxcop.coupling.ops import known_rules, DEFAULT_RULES\n"
        "assert {*known_rules()} - {*DEFAULT_RULES} == {('my.domain', 'Squash')}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
