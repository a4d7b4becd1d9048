"""The gallery: every model has its command and report, and the command of the one that ships with the project runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from onnxcop.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+) \| ([^|]+) \| (.+) \| \[report\]\((gallery/\w+\.html)\) \|$", PAGE, re.MULTILINE)
COMMANDS = {Path(line.split()[1]).stem: shlex.split(line) for line in re.findall(r"^onnxcop .+$", PAGE, re.MULTILINE)}


def test_there_are_twelve_models_each_with_task_figures_command_and_report() -> None:
    assert len(ROWS) == 12
    assert [name for name, *_ in ROWS] == list(COMMANDS)
    for name, task, figures, report in ROWS:
        macs, file, time, agreement, took = figures.split(" | ")
        assert task and "→" in macs and "→" in file and "±" in time and re.search(r"\d", agreement) and took
        assert name in (ROOT / "docs" / report).read_text(encoding="utf-8"), report


def test_the_command_of_the_model_that_comes_with_the_project_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("digits_resnet.onnx", "digits_calib.npz"):
        (tmp_path / name).symlink_to(ROOT / "models" / name)
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.run([*COMMANDS["digits_resnet"][1:], "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    assert found["figures"]["outputs"][0]["agreement"]["value"] > 0.95
    assert (tmp_path / "small" / "digits_resnet.onnx").stat().st_size < 150_000


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "digits_resnet"])
def test_the_other_models_are_those_of_the_zoo(name: str, zoo: Path) -> None:
    assert (zoo / "trained" / f"{name}.onnx").exists()
