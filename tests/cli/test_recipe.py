"""Recipes: options of a run in a file, limits of single layers, and plans turned into recipes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_runs import BARE, CPU

import onnxcop
from onnxcop.allocation.limits import LayerLimit
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError
from onnxcop.rewrite.plan import PruningPlan

RECIPE = """
budget: {macs: 60%}
method: {criterion: l2, recover: none}
limits:
  min-filters: 2
  multiple_of: 1
layers:
  - {match: "NODE", max_cut: 0.25, min_filters: 3}
machine: {provider: cpu, threads: 1, latency-seconds: 0}
"""


def _layer(model: Path) -> str:
    return next(node.name for node in onnx.load(model).graph.node if node.op_type == "Conv")


def _widths(report: Path) -> dict[str, tuple[int, int]]:
    found = json.loads(report.read_text())["summary"]["groups"]
    return {name: (group["width"], group["kept"]) for group in found for name in group["layers"]}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_recipe_gives_options_and_limits_of_layers(suffix: str, model: Path, tmp_path: Path) -> None:
    import yaml

    recipe, report, plan = tmp_path / f"r{suffix}", tmp_path / "r.report.json", tmp_path / "p.json"
    text = RECIPE.replace("NODE", _layer(model))
    recipe.write_text(text if suffix == ".yaml" else json.dumps(yaml.safe_load(text)))
    arguments = [str(model), "--recipe", str(recipe), "--report", str(report), "--plan-out", str(plan), "-q"]
    assert cli.run(arguments) == 0
    made = PruningPlan.load(plan)
    assert (made.budget, made.criterion["name"], made.settings["recover"]) == ({"macs": 0.6}, "l2", "none")
    width, kept = _widths(report)[_layer(model)]
    assert kept >= 0.75 * width
    assert sum(kept < width for width, kept in _widths(report).values()) > 1
    assert cli.run([*arguments, "--macs", "0.9"]) == 0  # the command line outranks it
    assert PruningPlan.load(plan).budget == {"macs": 0.9}


def test_limits_of_layers_on_the_command_line(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    arguments = [str(model), "--macs", "0.6", "--criterion", "l2", "--report", str(report), "-q", *BARE]
    assert cli.run([*arguments, "--layer", f"{_layer(model)}:max_cut=0"]) == 0
    width, kept = _widths(report)[_layer(model)]
    assert width == kept
    for wrong in ("conv", "conv:", "conv:max_cut", "conv:max_cut=2", "conv:width=3", ":max_cut=.1"):
        assert cli.run([*arguments, "--layer", wrong]) == 2
    with pytest.raises(BudgetError, match="--layer x: max_cut is a fraction"):
        LayerLimit("x", max_cut=1.5)
    with pytest.raises(BudgetError, match="no node and no tensor is named 'nonesuch'"):
        onnxcop.prune(str(model), limits=onnxcop.Limits(layers=(LayerLimit("nonesuch"),)), recover="none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mcas: 0.5", "names an unknown option: mcas; did you mean macs?"),
        ("- 1", "holds no table of options"),
        ("a: [", "cannot be read"),
        ("layers: [{max_cut: 0.5}]", "an entry of 'layers' has 'match'"),
        ("macs: much", "'much' is not a fraction"),
    ],
)
def test_recipes_that_cannot_be_followed(
    text: str, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    assert cli.run([str(model), "--recipe", str(recipe)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert cli.run([str(model), "--recipe", str(tmp_path / "none.yaml")]) == 2


def test_a_plan_becomes_a_recipe_that_makes_it_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, again, recipe = (tmp_path / name for name in ("a.json", "b.json", "r.yaml"))
    limits = ["--keep", _layer(model), "--min-filters", "3", "--layer", "*:max_cut=0.9"]
    assert (
        cli.run([str(model), "--criterion", "l1", "--params", "0.8", *limits, "--plan-out", str(plan), "-q", *BARE])
        == 0
    )
    assert cli.run(["recipe", str(plan), "-o", str(recipe)]) == 0
    machine = [*CPU, "--latency-seconds", "0", "-q"]
    assert cli.run([str(model), "--recipe", str(recipe), "--plan-out", str(again), *machine]) == 0
    assert PruningPlan.load(again).cuts == PruningPlan.load(plan).cuts
    assert cli.run(["recipe", str(plan)]) == 0
    assert capsys.readouterr().out == recipe.read_text()
    assert "params: 0.8" in recipe.read_text()


@pytest.mark.zoo
def test_a_recipe_for_a_detector(zoo: Path, tmp_path: Path) -> None:
    recipe, report = tmp_path / "yolo.yaml", tmp_path / "r.json"
    recipe.write_text(
        "budget: {macs: 0.8}\nmethod: {criterion: cop, recover: none}\nmachine: {latency-seconds: 0, provider: cpu}\n"
        "layers:\n  - {match: '/model.22/*', keep: true}\n  - {match: '/model.2/*', max_cut: 0.25}\n"
    )
    model, out = zoo / "trained" / "yolov8n_320.onnx", tmp_path / "small.onnx"
    assert cli.run([str(model), "-o", str(out), "--recipe", str(recipe), "--report", str(report), "-q"]) == 0
    widths = _widths(report)
    head = [(width, kept) for name, (width, kept) in widths.items() if name.startswith("/model.22/")]
    assert head and all(width == kept for width, kept in head)
    early = [kept / width for name, (width, kept) in widths.items() if name.startswith("/model.2/")]
    assert early and min(early) >= 0.75
    assert np.mean([kept < width for width, kept in widths.values()]) > 0.3
