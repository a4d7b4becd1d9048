"""Exit codes, and the commands beside the main form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import BARE, CPU, lines
from onnx import numpy_helper
from small_models import chain, written

from onnxcop.calibration.statistics import CalibrationStats, Moments
from onnxcop.cli import main as cli
from onnxcop.pipeline import finish as conclusion

# Exit codes


def test_ctrl_c_exits_with_130_and_writes_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conclusion, "verify", interrupt)
    before = sorted(model.parent.iterdir())
    assert cli.run([str(model), *BARE]) == 130
    assert lines(capsys.readouterr().err) == ["stopped; no file is partly written"]
    assert sorted(model.parent.iterdir()) == before


def test_ctrl_c_while_writing_leaves_the_old_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    out = model.with_name("out.onnx")
    out.write_bytes(b"old")
    before = sorted(model.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("onnxcop._base.files.os.fsync", interrupt)
        assert cli.run([str(model), "-o", str(out), *BARE]) == 130
        assert cli.run([str(model), "-o", str(out), "--external-data", *BARE]) == 130
    assert out.read_bytes() == b"old"
    assert sorted(model.parent.iterdir()) == before


def test_a_bug_is_one_line_that_asks_for_a_report(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("what\nnow")

    monkeypatch.setattr(conclusion, "verify", fail)
    assert cli.run([str(model), *BARE]) == 1
    shown = lines(capsys.readouterr().err)
    assert len(shown) == 1
    assert "RuntimeError: what now" in shown[0]
    assert "--debug" in shown[0]
    assert cli.run([str(model), *BARE, "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unknown_provider_is_an_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(model), "--provider", "abacus"]) == 1
    shown = lines(capsys.readouterr().err)
    assert len(shown) == 1
    assert shown[0].startswith("error: provider 'abacus'")


# Commands


def test_inspect_lists_groups_and_what_is_frozen(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(model), *CPU]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in ("conv1", "conv2", "head", "5 of 5", "graph output", "MACs/filter"):
        assert text in shown.out


def test_inspect_says_what_a_filter_saves(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(model), "--json", *CPU]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["groups"]
    assert (one["layers"], one["readers"], one["width"]) == (["conv1"], ["conv2"], 8)
    assert (two["layers"], two["readers"], two["width"]) == (["conv2"], ["head"], 16)
    assert one["exact"]
    assert one["macs"] == 64 * 9 * (3 + 16)
    assert one["params"] == 3 * 9 + 1 + 16 * 9
    assert two["macs"] == 64 * 9 * 8 + 5
    assert two["params"] == 8 * 9 + 1 + 5
    assert found["filters"] == 8 + 16 + 5
    assert found["prunable"] == pytest.approx(24 / 29)
    (frozen,) = found["frozen_layers"]
    assert (frozen["name"], frozen["filters"], frozen["prunable"]) == ("head", 5, 0)
    assert found["cost"]["macs"] == 64 * 9 * (3 * 8 + 8 * 16) + 16 * 5
    assert one["half_macs"] == 64 * 9 * (3 * 4 + 4 * 16)
    assert one["half_params"] == 4 * (3 * 9 + 1 + 16 * 9)
    assert (two["half_macs"], two["half_params"]) == (8 * two["macs"], 8 * two["params"])
    assert found["halved"]["macs"] == 64 * 9 * (3 * 4 + 4 * 8) + 8 * 5
    assert found["halved"]["params"] == 4 * 3 * 9 + 4 + 8 * 4 * 9 + 8 + 8 * 5 + 2 * 5


def test_inspect_puts_first_what_saves_most(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    source = models_dir / "digits_resnet.onnx"
    assert cli.run(["inspect", str(source), "--json", *CPU]) == 0
    saved = [group["half_macs"] for group in json.loads(capsys.readouterr().out)["groups"]]
    assert saved == sorted(saved, reverse=True)
    assert cli.run(["inspect", str(source), *CPU]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in shown if line.endswith("%")]
    assert len(rows) == len(saved)
    assert max(map(len, shown)) <= 80


def test_long_names_keep_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = chain()
    model.graph.node[0].name = "/".join(f"block{number}" for number in range(20)) + "/the_first"
    path = written(model, tmp_path / "net.onnx")
    assert cli.run(["inspect", str(path), *CPU]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the_first" in line]
    assert "…" in line
    assert len(line.rstrip()) <= 80
    assert model.graph.node[0].name not in line
    assert cli.run(["inspect", str(path), "-v", *CPU]) == 0
    column = "".join(line[:40].strip() for line in capsys.readouterr().out.splitlines())
    assert "block0/block1/" in column


def test_inspect_verbose_names_every_layer(models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = models_dir / "digits_resnet.onnx"
    convolutions = [node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    assert cli.run(["inspect", str(source), "-v", *CPU]) == 0
    shown = capsys.readouterr().out
    assert [name for name in convolutions if name not in shown] == []


def test_apply_repeats_a_run_to_the_byte(pruned: tuple[Path, Path, Path]) -> None:
    model, out, plan = pruned
    again = model.with_name("again.onnx")
    assert cli.run(["apply", str(model), str(plan), "-o", str(again), "-q", *CPU]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_apply_refuses_another_model(pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, _, plan = pruned
    other = written(chain(widths=(8, 12)), plan.with_name("other.onnx"))
    assert cli.run(["apply", str(other), str(plan), *CPU]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "made for another model" in line
    assert not plan.with_name("other.pruned.onnx").exists()


def test_verify_compares_with_the_masked_original(
    pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, plan = map(str, pruned)
    assert cli.run(["verify", model, out, "--plan", plan, "--json", *CPU]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verification"]["max_difference"] <= 1e-4
    assert found["verification"]["exact_units"] == found["removed"] > 0
    assert found["changed"] == []
    assert cli.run(["verify", model, out, "--plan", plan, *CPU]) == 0
    assert "masked original" in capsys.readouterr().out


def test_verify_refuses_changed_weights_by_default(
    pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    original, out, plan = pruned
    changed = onnx.load(out)
    tensor = next(t for t in changed.graph.initializer if t.name == "w3")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, "w3"))
    written(changed, out)
    command = ["verify", str(original), str(out), "--plan", str(plan), *CPU]
    assert cli.run(command) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "'w3'" in line
    assert cli.run([*command, "--structure-only"]) == 0
    assert "structure only" in capsys.readouterr().out


def test_verify_knows_that_recovery_changes_weights(
    pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    original, out, plan = pruned
    document = json.loads(plan.read_text())
    document["settings"]["recover"] = "merge"
    plan.write_text(json.dumps(document))
    changed = onnx.load(out)
    tensor = next(t for t in changed.graph.initializer if t.name == "b3")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, "b3"))
    written(changed, out)
    assert cli.run(["verify", str(original), str(out), "--plan", str(plan), *CPU]) == 0
    assert "structure only" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--structure-only"]])
def test_verify_refuses_other_shapes(
    pruned: tuple[Path, Path, Path], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    original, _, plan = pruned
    other = written(chain(), plan.with_name("other.onnx"))
    assert cli.run(["verify", str(original), str(other), "--plan", str(plan), *CPU, *flags]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "the plan makes it" in line


def test_merge_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((30, 4)) + 7
    paths = []
    for number, part in enumerate(np.split(data, [5, 17])):
        mean = part.mean(axis=0)
        moments = Moments(len(part), mean, (part - mean).T @ (part - mean))
        paths.append(tmp_path / f"{number}.npz")
        CalibrationStats("a" * 64, len(part), {"t|1|1|1": moments}).save(paths[-1])
    out = tmp_path / "all.npz"
    assert cli.run(["merge-stats", str(out), *map(str, paths)]) == 0
    assert "30 samples" in capsys.readouterr().out
    merged = CalibrationStats.load(out)
    assert merged.samples == 30
    moments = merged.taps["t|1|1|1"]
    np.testing.assert_allclose(moments.mean, data.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(data.T, ddof=0), rtol=1e-9)


def test_merge_stats_counts_no_sample_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.npz" for name in ("a", "b", "copy of a", "out")}
    for name, mean in (("a", 0.0), ("b", 1.0), ("copy of a", 0.0)):
        CalibrationStats("a" * 64, 3, {"t": Moments(3, np.full(2, mean), np.eye(2))}).save(files[name])
    for first, second in (("a", "a"), ("a", "copy of a")):
        assert cli.run(["merge-stats", str(files["out"]), str(files[first]), str(files["b"]), str(files[second])]) == 1
        (line,) = lines(capsys.readouterr().err)
        assert f"{files[second]} holds the same statistics as {files[first]}" in line
        assert not files["out"].exists()


def test_merge_stats_refuses_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = Moments(1, np.zeros(1), np.zeros((1, 1)))
    for name in "ab":
        CalibrationStats(name * 64, 1, {"t": moments}).save(tmp_path / f"{name}.npz")
    out = tmp_path / "out.npz"
    assert cli.run(["merge-stats", str(out), str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "different models" in line
    assert not out.exists()
