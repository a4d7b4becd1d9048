"""docs/comparison.md says of onnxsim what onnxsim offers, and its figures are those of the committed results."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPO_ROOT
from onnx import numpy_helper
from small_models import chain, linear, shapes

PAGE = (REPO_ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
RESULTS = REPO_ROOT / "docs" / "onnxsim_recovery.csv"
MODELS = {"ResNet-20, CIFAR-10": "cifar_resnet20", "MobileNetV2, ImageNet": "imagenet_mobilenet_v2"}

# In a process of its own, which ends without asking onnxsim, whose native code may hang.
ASK = """
import inspect, json, os, sys
import numpy as np, onnx, onnxsim
from importlib.metadata import version

conv, dense, samples = onnx.load(sys.argv[1]), onnx.load(sys.argv[2]), np.load(sys.argv[3])["x"]
made = {
    "equal": onnxsim.apply_structured_pruning(conv, sparsity=0.5),
    "ranked": onnxsim.apply_structured_pruning(conv, sparsity=0.5, global_sparsity=True),
    "dense": onnxsim.apply_structured_pruning(dense, sparsity=0.5),
}
made["ridge"] = onnxsim.apply_pruning_finetune(dense, made["dense"], calibration_data=[{"x": samples}])
pictures = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
made["conv_ridge"] = onnxsim.apply_pruning_finetune(conv, made["equal"], calibration_data=[{"x": pictures}])
for name, model in made.items():
    onnx.save(model, os.path.join(os.path.dirname(sys.argv[1]), name + ".made.onnx"))
names = ("apply_structured_pruning", "apply_structured_wanda_pruning", "apply_pruning_finetune",
         "apply_block_finetune_all_blocks", "recover_batch_norm")
signatures = {name: list(inspect.signature(getattr(onnxsim, name)).parameters) for name in names}
print(json.dumps({"version": version("onnxsim"), "signatures": signatures}), flush=True)
os._exit(0)
"""


def _rows() -> list[dict[str, str]]:
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _recorded(model: str, macs: float, recovery: str) -> dict[str, str]:
    (row,) = (
        row for row in _rows()
        if (row["model"], float(row["macs"]), row["tool"], row["recovery"]) == (model, macs, "wanda", recovery)
    )  # fmt: skip
    return row


def _table(header: str) -> list[list[str]]:
    """The cells of a table, row by row."""
    lines = PAGE.split(header, 1)[1].splitlines()[2:]
    cells = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def test_accuracies_after_recovery_are_those_of_the_results() -> None:
    model, checked = "", 0
    for first, *found in _table("| model, MACs kept | pruned | ridge | blocks | normalization |"):
        *named, share = first.rsplit(", ", 1)
        model = MODELS[named[0].split(" (")[0]] if named else model
        for recovery, cell in zip(("none", "ridge", "blocks", "normalization"), found, strict=True):
            if re.fullmatch(r"[\d.]+", cell):
                assert float(cell) == round(float(_recorded(model, _share(share), recovery)["score"]), 1)
                checked += 1
    assert checked == 4 * 4 + 2


def test_cosines_after_recovery_are_those_of_the_results() -> None:
    rows = _table("| MiniLM, MACs kept | pruned | with ridge regression |")
    assert [row[0] for row in rows] == ["90 %", "80 %", "70 %", "50 %"]
    for share, *cells in rows:
        for recovery, cell in zip(("none", "ridge"), cells, strict=True):
            row = _recorded("nlp_minilm", _share(share), recovery)
            assert cell == f"{float(row['score']):.3f}, {float(row['neighbours']):.0f} %".removeprefix("0")


def test_what_one_ranking_keeps_is_that_of_the_results() -> None:
    at_80 = [
        row for row in _rows() if (row["model"], row["macs"], row["recovery"]) == ("cifar_resnet20", "0.8", "none")
    ]
    scores = {row["tool"]: row["score"] for row in at_80}
    said = re.search(r"`global_sparsity`\) keeps ([\d.]+) % at 80 % .* and equal ratios keep ([\d.]+) %", _joined())
    assert said is not None
    assert said.groups() == (scores["wanda-global"], scores["wanda"])


def _share(text: str) -> float:
    return float(text.removesuffix(" %")) / 100


def _joined() -> str:
    return " ".join(PAGE.split())


# What onnxsim offers


@pytest.fixture(scope="module")
def onnxsim(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, onnx.ModelProto]]:
    """The signatures of onnxsim's functions, and what they make of small models."""
    folder = os.environ.get("ONNXCOP_ONNXSIM", "")
    if not folder and importlib.util.find_spec("onnxsim") is None:
        pytest.skip("onnxsim is not installed; ONNXCOP_ONNXSIM may name the folder that holds it")
    place = tmp_path_factory.mktemp("onnxsim")
    onnx.save(_unequal(), place / "conv.onnx")
    onnx.save(linear(), place / "dense.onnx")
    x = np.random.default_rng(0).standard_normal((64, 8))
    np.savez(place / "x.npz", x=x.astype(np.float32))
    paths = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
    asked = [sys.executable, "-c", ASK, *(str(place / name) for name in ("conv.onnx", "dense.onnx", "x.npz"))]
    done = subprocess.run(
        asked, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=240, check=True
    )
    made = {path.name.removesuffix(".made.onnx"): onnx.load(path) for path in place.glob("*.made.onnx")}
    return json.loads(done.stdout.splitlines()[-1]), made


def _unequal() -> onnx.ModelProto:
    """`chain` whose first convolution has filters ten times as large as they are."""
    model = chain()
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    first.CopyFrom(numpy_helper.from_array(10 * numpy_helper.to_array(first), first.name))
    return model


def test_the_functions_that_the_page_names_are_there(
    onnxsim: tuple[dict[str, Any], dict[str, onnx.ModelProto]],
) -> None:
    said, _ = onnxsim
    assert f"onnxsim {said['version']}" in PAGE
    named = said["signatures"]
    assert all(f"`{name}`" in PAGE for name in list(named)[2:])
    assert "`global_sparsity`" in PAGE
    assert all("global_sparsity" in named[name] for name in list(named)[:2])
    assert all("calibration_data" in named[name] for name in list(named)[1:])


def test_its_ratios_are_equal_or_one_ranking(onnxsim: tuple[dict[str, Any], dict[str, onnx.ModelProto]]) -> None:
    _, made = onnxsim
    widths = {name: (shapes(model)["w1"][0], shapes(model)["w2"][0]) for name, model in made.items()}
    assert widths["equal"] == (4, 8)
    assert widths["ranked"] == (8, 4)


def test_its_ridge_regression_reaches_dense_layers_alone(
    onnxsim: tuple[dict[str, Any], dict[str, onnx.ModelProto]],
) -> None:
    _, made = onnxsim

    def fitted(before: str, after: str) -> set[str]:
        old, new = (
            {tensor.name: numpy_helper.to_array(tensor) for tensor in made[name].graph.initializer}
            for name in (before, after)
        )
        return {name for name, values in new.items() if not np.array_equal(values, old[name])}

    assert fitted("dense", "ridge") == {"w3"}
    assert fitted("equal", "conv_ridge") == {"w3", "b3"}
