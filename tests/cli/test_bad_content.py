"""Files of the right kind whose content is wrong: one line that says so, never "this is a bug"."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import BARE, CPU
from small_models import chain, written, written_with_data

import onnxcop
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.cli import main as cli
from onnxcop.rewrite.plan import PruningPlan

WANDA = ["--criterion", "wanda", *BARE]


def refused(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    """Run a command that must fail, and return what it says."""
    assert cli.run([str(word) for word in command]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    *_, line = shown.err.splitlines()
    assert line.startswith("error: ")
    assert "this is a bug" not in line
    assert "not enough memory" not in line
    return line


# The model


@pytest.mark.parametrize(
    ("good", "bad", "word"),
    [
        (b"Relu", b"Re\xffu", "op type"),
        (b"relu1", b"relu\xe9", "name"),
        (b"\x0a\x02c1", b"\x0a\x02\xe91", "input"),
        (b"\x12\x01N", b"\x12\x01\xff", "dim param"),
        (b"a small graph", b"a small gr\xe9ph", "doc string"),
        (b"a trainer", b"a train\xe9r", "producer name"),
    ],
)
def test_text_that_is_no_utf8(
    good: bytes, bad: bytes, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = chain().SerializeToString()
    assert good in content
    path = tmp_path / "net.onnx"
    path.write_bytes(content.replace(good, bad))
    line = refused(capsys, path, *BARE)
    assert f"the {word} b'" in line
    assert "is not UTF-8 text; export the model again" in line


@pytest.mark.parametrize("named", [True, False])
def test_an_operator_without_its_type(named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = chain()
    model.graph.node[1].op_type = ""
    if not named:
        model.graph.node[1].name = ""
    line = refused(capsys, written(model, tmp_path / "net.onnx"), *BARE)
    assert f"node '{'relu1' if named else 'r1'}' has no operator type" in line


def test_weights_behind_a_link_in_the_folder_are_read(tmp_path: Path) -> None:
    """Caches of downloads keep the files elsewhere, and links to them in the model's folder."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "model").mkdir()
    source = written_with_data(chain(), tmp_path / "cache" / "0a1b", "net.data")
    (tmp_path / "cache" / "net.data").rename(tmp_path / "cache" / "2c3d")
    (tmp_path / "model" / "net.onnx").symlink_to(source)
    (tmp_path / "model" / "net.data").symlink_to(tmp_path / "cache" / "2c3d")
    out = tmp_path / "small.onnx"
    assert cli.run([str(tmp_path / "model" / "net.onnx"), "-o", str(out), "-q", *BARE]) == 0
    onnx.checker.check_model(str(out), full_check=True)


# Plans and statistics


@pytest.mark.parametrize(
    "change",
    [
        {"removed": [{"tensor": "w1", "axis": -7, "indices": [0]}]},
        {"removed": [{"tensor": "w1", "axis": 0, "indices": [1.5]}]},
        {"removed": [{"tensor": "w1", "axis": 0, "indices": [True]}]},
        {"removed": [{"tensor": "w1", "axis": 0, "indices": ["1"]}]},
        {"removed": [{"tensor": "w1", "axis": 0, "indices": [-1]}]},
        {"removed": [{"tensor": 1, "axis": 0, "indices": [1]}]},
        {"removed": {"w1": 1}},
        {"settings": "x"},
        {"budget": ["macs"]},
        {"criterion": None},
        {"policy": "best"},
        {"input_shapes": {"x": [1, 3, 8.5, 8]}},
        {"input_shapes": [1]},
        {"model_sha256": 7},
    ],
    ids=str,
)
def test_plans_whose_values_are_of_other_kinds(
    change: dict[str, Any], pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, plan = pruned
    plan.write_text(json.dumps(json.loads(plan.read_text()) | change))
    before = out.read_bytes()
    line = refused(capsys, "apply", model, plan, "-o", out, *CPU)
    assert f"{plan} is a damaged pruning plan" in line
    assert out.read_bytes() == before


def test_plans_and_statistics_take_paths_as_text(pruned: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stats = CalibrationStats("abc", 0, {})
    stats.save(str(tmp_path / "x.npz"))
    assert CalibrationStats.load(str(tmp_path / "x.npz")).equals(stats)
    plan = PruningPlan.load(str(pruned[2]))
    plan.save(str(tmp_path / "again.json"))
    assert PruningPlan.load(tmp_path / "again.json") == plan


@pytest.mark.parametrize(
    "change",
    [
        {"1.mean": np.zeros(3)},
        {"1.mean": np.zeros((2, 2))},
        {"1.scatter": np.full((2, 2), np.nan)},
        {"1.scatter": np.zeros((2, 2), np.int64)},
        {"1.count": np.array(-1.0)},
        {"1.count": np.zeros(2)},
        {"header": np.frombuffer(b"[]", np.uint8)},
        {"header": np.frombuffer(b'{"version": 1, "taps": 3}', np.uint8)},
        {"header": np.frombuffer(b'{"version": 1, "taps": [], "model": "m", "samples": null}', np.uint8)},
        {"header": np.zeros((2, 2))},
    ],
    ids=str,
)
def test_statistics_whose_arrays_do_not_fit(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"version": 1, "model": "m", "samples": 4, "taps": ["a", "b"]}
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(head).encode(), np.uint8)}
    for number in range(2):
        arrays |= {f"{number}.count": np.array(4.0), f"{number}.mean": np.zeros(2), f"{number}.scatter": np.eye(2)}
    np.savez(tmp_path / "good.npz", **arrays)
    assert CalibrationStats.load(tmp_path / "good.npz").samples == 4
    np.savez(tmp_path / "bad.npz", **arrays | change)
    line = refused(capsys, "merge-stats", tmp_path / "out.npz", tmp_path / "good.npz", tmp_path / "bad.npz")
    assert "bad.npz holds no calibration statistics" in line


# Data


def test_an_archive_that_unpacks_to_a_thousand_times_its_size(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcop.data.arrays.LARGEST_IN_MEMORY", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((20_000, 3, 8, 8), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    line = refused(capsys, model, "--data", tmp_path / "bomb.npz", *WANDA)
    assert "'x.npy' unpacks from 0.0" in line
    assert "MB to 0.0154 GB; save the samples that count" in line


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_header_that_claims_more_rows_than_follow(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 3, 8, 8), }\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 768
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        path.write_bytes(array)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", array)
    line = refused(capsys, model, "--data", path, *WANDA)
    assert "its header claims 7680000000" in line
    assert "it is damaged or cut short" in line


def test_samples_of_a_very_long_file_are_chosen_without_listing_all() -> None:
    from onnxcop.data.open import _chosen

    chosen = _chosen(10**12, 512, seed=0)
    assert len(set(chosen.tolist())) == 512
    assert chosen.max() < 10**12
    assert (chosen == _chosen(10**12, 512, seed=0)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_sample_that_is_not_finite_is_numbered(
    value: float, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    samples[5, 0, 0, 0] = value
    np.save(tmp_path / "x.npy", samples)
    assert "sample 6" in refused(capsys, model, "--data", tmp_path / "x.npy", *WANDA)


def test_numbers_that_the_input_cannot_hold_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = np.ones((8, 3, 8, 8))
    samples[2] = 1e300
    np.save(tmp_path / "x.npy", samples)
    line = refused(capsys, model, "--data", tmp_path / "x.npy", *WANDA)
    assert "sample 3: a sample of the model's input" in line
    assert "holds 1e+300, more than float32 can hold; scale it" in line


# Scripts


@pytest.mark.parametrize("option", ["--data", "--metric"])
@pytest.mark.parametrize("place", ["import sys; sys.exit(3)\n", "def run(*_):\n    import sys\n    sys.exit(3)\n"])
def test_a_script_that_exits(
    option: str, place: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(place)
    rest = WANDA if option == "--data" else BARE
    line = refused(capsys, model, option, f"{tmp_path / 'own.py'}:run", *rest)
    assert "it called sys.exit(3)" in line


def test_scripts_import_their_neighbours(model: Path, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_own.py").write_text("def value():\n    return 0.5\n")
    (tmp_path / "later_of_own.py").write_text("value = 0.25\n")
    (tmp_path / "own.py").write_text(
        "from neighbour_of_own import value\n"
        "def score(model):\n    import later_of_own\n    return value() + later_of_own.value\n"
    )
    options = onnxcop.EngineOptions(provider="cpu", threads=1)
    result = onnxcop.prune(model, metric=f"{tmp_path / 'own.py'}:score", recover="none", options=options)
    assert result.report.quality["score after"] == 0.75


def test_more_threads_than_any_machine_has(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, model, "--provider", "cpu", "--threads", "100000")
    assert "threads is 100000, but this machine has" in line
