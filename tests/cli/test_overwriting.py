"""No result is written over a file that the run reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runs import BARE, CPU
from small_models import chain, written, written_with_data

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import ModelError

SAMPLES = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
SCRIPT = """
import numpy
def load_data():
    return [{"x": value[None]} for value in numpy.load(__file__.replace("feed.py", "cal.npy"))]
def score(model):
    return 1.0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its weights beside it, and every kind of input."""
    written_with_data(chain(), tmp_path / "net.onnx", "ext.data")
    np.savez(tmp_path / "cal.npz", x=SAMPLES)
    np.save(tmp_path / "cal.npy", SAMPLES)
    (tmp_path / "pics").mkdir()
    np.save(tmp_path / "pics" / "one.npy", SAMPLES)
    (tmp_path / "feed.py").write_text(SCRIPT)
    (tmp_path / "recipe.yaml").write_text("macs: 0.8\n")
    (tmp_path / "table.json").write_text("{}")
    written(chain(), tmp_path / "loss.onnx")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    model = str(tmp_path / "net.onnx")
    made = [model, "-o", str(tmp_path / "s.onnx"), "--plan-out", str(tmp_path / "plan.json"), *BARE, "-q"]
    data = ["--data", str(tmp_path / "cal.npz"), "--criterion", "wanda"]
    assert cli.run([*made, *data, "--stats-out", str(tmp_path / "stats.npz")]) == 0
    (tmp_path / "s.onnx").unlink()
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "net.onnx -o ext.data",
        "net.onnx -o link.data",
        "net.onnx -o s.onnx --plan-out ext.data",
        "net.onnx -o s.onnx --report report.json --plan-out net.onnx",
        "net.onnx -o cal.npz --data cal.npz --criterion wanda",
        "net.onnx -o s.onnx --data cal.npy --criterion wanda --stats-out cal.npy",
        "net.onnx -o pics/one.npy --data pics --criterion wanda",
        "net.onnx -o feed.py --data feed.py --criterion wanda",
        "net.onnx -o s.onnx --plan-out feed.py --metric feed.py:score",
        "net.onnx -o stats.npz --stats stats.npz --criterion wanda",
        "net.onnx -o s.onnx --data cal.npz --stats-out ext.data --criterion wanda",
        "apply net.onnx plan.json -o plan.json",
        "apply net.onnx plan.json -o ext.data",
        "inspect net.onnx --scores --criterion wanda --data cal.npz --stats-out cal.npz",
        "inspect net.onnx --scores --criterion wanda --data cal.npz --stats-out ext.data",
        "sweep net.onnx --macs 0.8 -o ext.data",
        "sweep net.onnx --macs 0.8 -o table.csv --data cal.npz --plot ext.data",
        "merge-stats stats.npz stats.npz stats.npz",
        "net.onnx -o s.onnx --recipe recipe.yaml --plan-out recipe.yaml",
        "net.onnx -o recipe.yaml --recipe recipe.yaml",
        "sweep net.onnx --recipe recipe.yaml -o recipe.yaml",
        "finetune net.onnx -o cal.npy --data cal.npz --labels cal.npy",
        "finetune net.onnx -o s.onnx --data cal.npz --labels feed.py:load_data --history feed.py",
        "finetune net.onnx -o loss.onnx --data cal.npz --loss loss.onnx",
        "net.onnx -o s.onnx --data cal.npz --distill 1s --checkpoint ext.data",
        "net.onnx -o s.onnx --data cal.npz --distill 1s --checkpoint cal.npz",
        "net.onnx -o s.onnx --latency-table table.json --plan-out table.json",
        "net.onnx -o s.onnx --data cal.npz --tokenizer words --plan-out words/tokenizer.json",
    ],
)
def test_inputs_are_refused_as_outputs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "link.data").symlink_to("ext.data")
    before = contents(folder)
    words = command.split()
    options = (
        CPU if words[0] in ("apply", "finetune", "inspect", "sweep") else BARE if words[0] != "merge-stats" else []
    )
    assert cli.run([*words, *options]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "choose another output" in line
    assert contents(folder) == before


def test_results_of_earlier_runs_are_no_inputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command = ["net.onnx", "-o", "s.onnx", "--plan-out", "p.json", "--data", "pics", "--criterion", "wanda", *BARE]
    assert cli.run([*command, "-q"]) == 0
    assert cli.run([*command, "-q"]) == 0


def test_results_in_python_spare_the_original(folder: Path) -> None:
    options = onnxcop.EngineOptions(provider="cpu", threads=1)
    before = contents(folder)
    with pytest.raises(ModelError, match="calibration data"):
        onnxcop.prune(
            folder / "net.onnx", data=folder / "cal.npz", stats_out=folder / "cal.npz", criterion="wanda",
            recover="none", options=options,
        )  # fmt: skip
    result = onnxcop.prune(folder / "net.onnx", recover="none", options=options)
    for write in (result.save, result.save_report):
        with pytest.raises(ModelError, match="its weights"):
            write(folder / "ext.data")
    assert contents(folder) == before


def test_a_data_file_that_could_not_be_referred_to_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = written(chain(), tmp_path / "net.onnx"), tmp_path / "small.onnx"
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target == out:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    assert cli.run([str(source), "-o", str(out), "--external-data", "-q", *BARE]) == 1
    assert list(tmp_path.iterdir()) == [source]


def test_runs_beside_each_other_name_the_weights_that_are_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other run writes its files between the moment when this one stages its own and puts them in place."""
    source, out = written(chain(), tmp_path / "net.onnx"), tmp_path / "small.onnx"
    other = tmp_path / "small.onnx.0123abcd.data"
    replace = Path.replace

    def interleaved(self: Path, target: Path) -> Path:
        if target == out:
            other.write_bytes(b"weights of the other run")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interleaved)
    assert cli.run([str(source), "-o", str(out), "--external-data", *BARE]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "weights of earlier results are left" in line)
    assert line.endswith(str(other))
