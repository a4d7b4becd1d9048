"""The gallery: every model has its command and report, and the commands give what the page says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onnxcop.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+) \| ([^|]+) \| (.+) \| \[report\]\((gallery/\w+\.html)\) \|$", PAGE, re.MULTILINE)
COMMANDS = {Path(line.split()[1]).stem: shlex.split(line) for line in re.findall(r"^onnxcop .+$", PAGE, re.MULTILINE)}
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_POINTS = 10.0  # by which a share of the time may differ, beyond the intervals, on a machine with other work


@dataclass(frozen=True)
class Row:
    """Figures of a row: MACs and bytes before and after, share of the time and agreement with their intervals."""

    macs: tuple[float, float]
    size: tuple[float, float]
    time: tuple[float, float]
    agreement: tuple[float, float]


def figures(cells: str) -> Row:
    macs, file, time, agreement, _ = cells.split(" | ")
    share, around = (float(number) for number in re.findall(r"[\d.]+(?:e[+-]\d+)?", time))
    low, high = re.search(r"\(([\d.e+-]+) to ([\d.e+-]+)\)$", agreement).groups()  # type: ignore[union-attr]
    return Row(_both(macs), _both(file), (share - around, share + around), (float(low), float(high)))


def _both(cell: str) -> tuple[float, float]:
    before, after = (float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+) ?([kMG]?B?)", cell))
    return before, after


def overlap(one: tuple[float, float], other: tuple[float, float], slack: float = 0.0) -> bool:
    """Whether two intervals have a number in common, or are this close."""
    return one[0] <= other[1] + slack and other[0] <= one[1] + slack


def test_there_are_twelve_models_each_with_task_figures_command_and_report() -> None:
    assert len(ROWS) == 12
    assert [name for name, *_ in ROWS] == list(COMMANDS)
    for name, task, cells, report in ROWS:
        found = figures(cells)
        assert task and found.macs[1] < found.macs[0] and found.size[1] < found.size[0]
        assert found.time[0] <= found.time[1] and found.agreement[0] <= found.agreement[1]
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
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gives_what_its_row_says(
    name: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MACs and bytes within 5 %, and intervals of agreement and time that meet those of the page.

    Results are kept in the folder that ONNXCOP_GALLERY_WORK names, from which `tools/gallery.py --work` makes the page.
    """
    monkeypatch.setenv("ONNXCOP_ZOO", str(zoo))
    gallery = importlib.import_module("gallery")
    exhibit = next(entry for entry in gallery.EXHIBITS if entry.name == name)
    assert exhibit.command == COMMANDS[name]
    work = Path(os.environ.get("ONNXCOP_GALLERY_WORK") or tmp_path)
    assert gallery.run(exhibit, work)
    document: dict[str, Any] = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    again = next(cells for row, _, cells, _ in ROWS if row == name)
    there, here = figures(again), figures(" | ".join(gallery.row(exhibit, document).split(" | ")[2:7]))
    assert (work / "small" / f"{name}.onnx").stat().st_size == document["after"]["bytes"]
    assert here.macs == pytest.approx(there.macs, rel=0.05) and here.size == pytest.approx(there.size, rel=0.05)
    assert overlap(here.time, there.time, _POINTS)
    assert overlap(here.agreement, there.agreement)
