"""A folder of Hugging Face pruned into another one, with the files beside the model and updated sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from cli_runs import BARE
from small_models import chain, shapes, written

from onnxcop.cli import main as cli

CONFIG = {
    "model_type": "toy", "hidden_sizes": [8, 16], "hidden_size": 16, "image_size": 8, "num_channels": 3,
    "id2label": {str(number): f"thing {number}" for number in range(5)}, "num_labels": 5,
    "label2id": {f"thing {number}": number for number in range(5)},
}  # fmt: skip


@pytest.fixture(params=["", "onnx"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The model of a folder with a configuration and a tokenizer, beside it or above it."""
    home = tmp_path / "toy"
    (home / request.param).mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(CONFIG))
    (home / "tokenizer.json").write_text("{}")
    (home / "1_Pooling").mkdir()
    (home / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16}))
    (home / "notes.txt").write_text("mine")
    return written(chain(), home / request.param / "model.onnx")


def _pruned(model: Path, folder: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    command = [str(model), "-o", f"{folder}/", "--criterion", "l2", "--multiple-of", "1", "-q", *BARE, *options]
    assert cli.run(command) == 0
    home = model.parent.parent if model.parent.name == "onnx" else model.parent
    return folder / model.relative_to(home), json.loads((folder / "config.json").read_text())


def test_the_folder_is_whole_and_its_sizes_are_true(repository: Path, tmp_path: Path) -> None:
    path, config = _pruned(repository, tmp_path / "small", "--classes", "0,3")
    widths = shapes(onnx.load(path))
    sizes = [widths["w1"][0], widths["w2"][0]]
    assert config["hidden_sizes"] == sizes and config["hidden_size"] == sizes[1] and sum(sizes) < 24
    assert (config["image_size"], config["num_channels"], config["model_type"]) == (8, 3, "toy")
    assert config["id2label"] == {"0": "thing 0", "1": "thing 3"} and config["num_labels"] == 2
    assert config["label2id"] == {"thing 0": 0, "thing 3": 1}
    found = {one.relative_to(tmp_path / "small").as_posix() for one in (tmp_path / "small").rglob("*") if one.is_file()}
    model = path.relative_to(tmp_path / "small").as_posix()
    assert found == {"config.json", "tokenizer.json", "1_Pooling/config.json", model}


def test_layers_of_different_widths_are_listed(repository: Path, tmp_path: Path) -> None:
    written(chain(widths=(16, 16)), repository)
    path, config = _pruned(repository, tmp_path / "small", "--macs", "0.5", "--layer", "conv2:max_cut=0")
    widths = shapes(onnx.load(path))
    assert widths["w1"][0] < widths["w2"][0] == 16
    assert config["hidden_size"] == 16
    assert config["onnxcop"]["hidden_size"] == [widths["w1"][0], 16]


def test_a_failed_run_makes_no_folder(repository: Path, tmp_path: Path) -> None:
    assert cli.run([str(repository), "-o", f"{tmp_path}/small/", "--classes", "9", *BARE]) == 1
    assert not (tmp_path / "small").exists()
    assert cli.run([str(repository), "-o", f"{repository.parent}/", "--classes", "9", *BARE]) == 1
