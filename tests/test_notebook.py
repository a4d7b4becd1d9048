"""The notebook of the documentation: its cells run one after the other, in its own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO_ROOT

NOTEBOOK = REPO_ROOT / "docs" / "notebook.ipynb"


def cells() -> list[str]:
    """The cells of code; lines for IPython and the shell are left out."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    lines = ["".join(cell["source"]).splitlines() for cell in found if cell["cell_type"] == "code"]
    return ["\n".join(line for line in cell if not line.startswith(("%", "!"))) for cell in lines]


def test_the_cells_run_and_give_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").symlink_to(REPO_ROOT / "models", target_is_directory=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names: dict[str, Any] = {}
    for cell in cells():
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert names["before"] > 0.98 and names["after"] > 0.95
    assert names["result"].report.after.macs <= 0.5 * names["result"].report.before.macs
    assert Path("small.onnx").stat().st_size < 0.7 * Path("../models/digits_resnet.onnx").stat().st_size
    assert "<html" in Path("report.html").read_text(encoding="utf-8")
    assert "% before" in capsys.readouterr().out


def test_the_notebook_installs_and_calls_what_there_is() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "%pip install --quiet .." in text
    assert "!onnxcop inspect ../models/digits_resnet.onnx" in text
