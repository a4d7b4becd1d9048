"""`onnxcop inspect --scores`: the importance of every filter, and its terms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paper_models import resnet32
from small_models import chain, nothing_to_prune, written

import onnxcop
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import choose
from onnxcop.allocation.limits import Limits
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.cli import main as cli
from onnxcop.criteria.registry import CRITERIA
from onnxcop.criteria.scores import score

CPU = ["--provider", "cpu", "--threads", "1"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return written(chain(), tmp_path / "net.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32))
    return path


def shown(capsys: Captured, *arguments: object) -> dict[str, Any]:
    """The JSON of a run."""
    assert cli.run(["inspect", *map(str, arguments), "--scores", "--json", *CPU]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def table(capsys: Captured, *arguments: object) -> list[list[str]]:
    """The rows of the table of a run, its head first."""
    assert cli.run(["inspect", *map(str, arguments), "--scores", *CPU]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = next(i for i, line in enumerate(lines) if line[:2] == ["group", "filter"])
    return [line for line in lines[head:] if len(line) > 2]


def test_json_holds_every_filter_and_the_three_terms(model: Path, capsys: Captured) -> None:
    document = shown(capsys, model)
    scores = document["scores"]
    assert {group["name"] for group in document["groups"]} == {"conv1", "conv2"}
    assert scores["criterion"]["name"] == "cop"
    assert scores["terms"][:3] == ["correlation", "flops", "params"]
    units = scores["units"]
    places = {(unit["layer"], unit["filter"]) for unit in units}
    assert places == {("conv1", i) for i in range(8)} | {("conv2", i) for i in range(16)}
    assert all(unit["group"] == unit["layer"] for unit in units)
    assert [unit["rank"] for unit in units] == list(range(24))
    importance = [unit["importance"] for unit in units]
    assert importance == sorted(importance)
    for unit in units:
        assert unit["importance"] == pytest.approx(unit["correlation"] + unit["flops"] + unit["params"])


def test_scores_are_those_that_decide(model: Path, capsys: Captured) -> None:
    units = shown(capsys, model, "--prefer", "2,0.5", "--alpha", "3")["scores"]["units"]
    for unit in units:
        expected = 3 * unit["correlation"] + 2 * unit["flops"] + 0.5 * unit["params"]
        assert unit["importance"] == pytest.approx(expected)
    analysis = onnxcop.analyze(chain(), options=onnxcop.EngineOptions(provider="cpu", threads=1))
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ranking = CRITERIA["cop"].rank(context)
    (first,) = choose(context, ranking, Budget(filters=23 / 24), Limits(multiple_of=1)).removed.tolist()
    assert score(analysis).units[0].unit == first


def test_prefer_moves_the_terms_that_count(model: Path, capsys: Captured) -> None:
    found = {how: shown(capsys, model, "--prefer", how)["scores"] for how in ("faster", "smaller", "balanced")}
    settings = {how: (s["criterion"]["beta"], s["criterion"]["gamma"]) for how, s in found.items()}
    assert settings == {"faster": (3, 0), "smaller": (0, 3), "balanced": (1, 1)}
    for unit in found["faster"]["units"]:
        assert unit["importance"] == pytest.approx(unit["correlation"] + 3 * unit["flops"])


def test_coupled_filters_are_named_by_their_first_layer(tmp_path: Path, capsys: Captured) -> None:
    path = written(resnet32(), tmp_path / "resnet.onnx")
    units = shown(capsys, path)["scores"]["units"]
    stem = [unit for unit in units if unit["layer"] == "stem"]
    assert {unit["group"] for unit in stem} == {"stem (+5)"}
    assert sorted(unit["filter"] for unit in stem) == list(range(16))
    assert len(units) == (16 + 32 + 64) * 6


def test_the_table_shows_the_lowest_or_all_scores(model: Path, capsys: Captured) -> None:
    units = shown(capsys, model)["scores"]["units"]
    head, *rows = table(capsys, model)
    assert head == ["group", "filter", "importance", "correlation", "flops", "params", "dead"]
    assert len(rows) == 20
    assert [row[:2] for row in rows] == [[unit["group"], str(unit["filter"])] for unit in units[:20]]
    assert [float(row[2]) for row in rows] == pytest.approx([unit["importance"] for unit in units[:20]], rel=1e-4)
    assert len(table(capsys, model, "--verbose")) == 1 + 24


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_can_be_shown(name: str, model: Path, data: Path, capsys: Captured) -> None:
    given = ["--data", data] if CRITERIA[name].needs_stats else []
    scores = shown(capsys, model, "--criterion", name, *given)["scores"]
    assert scores["criterion"]["name"] == name
    assert len(scores["units"]) == 24
    assert all(np.isfinite(unit["importance"]) for unit in scores["units"])
    assert all(term in unit for unit in scores["units"] for term in scores["terms"])


def test_statistics_are_written_and_read_again(model: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    kept = tmp_path / "net.stats"
    multiple = ["--criterion", "cop-multiple"]
    first = shown(capsys, model, *multiple, "--data", data, "--stats-out", kept)
    assert CalibrationStats.load(kept).samples == 16
    assert shown(capsys, model, *multiple, "--stats", kept) == first
    other = written(chain(widths=(4, 4)), tmp_path / "other.onnx")
    assert cli.run(["inspect", str(other), "--scores", *multiple, "--stats", str(kept), *CPU]) == 1
    assert "another model" in capsys.readouterr().err


def test_data_that_is_needed(model: Path, capsys: Captured) -> None:
    assert cli.run(["inspect", str(model), "--scores", "--criterion", "wanda", *CPU]) == 1
    assert "criterion wanda needs calibration data; give --data or --stats" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "l1"], "--criterion: only with --scores"),
        (["--data", "x.npz"], "--data: only with --scores"),
        (["--scores", "--criterion", "l1", "--beta", "2"], "--beta apply to the cop criteria, not to l1"),
        (["--scores", "--data", "x.npz"], "criterion cop uses only the weights"),
        (["--scores", "--stats-out", "x"], "--stats-out writes statistics of calibration data; give --data"),
        (["--scores", "--stats", "a", "--data", "b"], "--stats and --data exclude each other"),
    ],
)
def test_misuse(arguments: list[str], message: str, model: Path, capsys: Captured) -> None:
    assert cli.run(["inspect", str(model), *arguments, *CPU]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_nothing_to_prune(tmp_path: Path, capsys: Captured) -> None:
    path = written(nothing_to_prune(), tmp_path / "fixed.onnx")
    assert shown(capsys, path)["scores"]["units"] == []
    assert cli.run(["inspect", str(path), "--scores", *CPU]) == 0
    assert "no filter may be removed" in capsys.readouterr().out


def test_without_scores_nothing_changes(model: Path, capsys: Captured) -> None:
    assert cli.run(["inspect", str(model), "--json", *CPU]) == 0
    assert "scores" not in json.loads(capsys.readouterr().out)
