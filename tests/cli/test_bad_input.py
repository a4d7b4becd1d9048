"""Errors of any kind: one line that names the cause, exit code 1, nothing written, old files unchanged."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import chain, nothing_to_prune, weights, written, written_with_data

from onnxcop.cli import main as cli

CPU = ["--provider", "cpu", "--threads", "1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], model: Path, *options: str, out: Path | None = None) -> str:
    """Run the main form over an old result, which must survive; return the message."""
    target = out or model.parent / "old.onnx"
    options = ("--recover", "none", "--latency-seconds", "0", *options)
    if target.parent.is_dir() and not target.exists():
        target.write_bytes(b"an old result")
    before = contents(model.parent)
    assert cli.run([str(model), "-o", str(target), *CPU, *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    *others, line = shown.err.splitlines()
    assert line.startswith("error: ")
    assert all(other.startswith("warning: no calibration data: ") for other in others)
    assert contents(model.parent) == before
    return line


# The model


def test_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path / "no.onnx")
    assert "no.onnx does not exist" in line


def test_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net").mkdir()
    assert "is a folder" in refused(capsys, tmp_path / "net")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        b"hello, this is text and no model\n" * 9,
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"PK\x03\x04" + b"\x00" * 400,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        json.dumps({"graph": {}}).encode(),
    ],
    ids=["empty", "zeros", "text", "picture", "archive", "pointer", "json"],
)
def test_not_onnx(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    line = refused(capsys, path)
    assert str(path) in line
    assert "not an ONNX model" in line


def test_an_empty_file_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.onnx").touch()
    assert "an empty file; export or download it again" in refused(capsys, tmp_path / "net.onnx")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    whole = chain().SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(whole[: int(len(whole) * share)])
    line = refused(capsys, path)
    assert str(path) in line
    assert "truncated" in line


def test_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(chain(), tmp_path / "net.onnx")
    original = Path.read_bytes

    def read(self: Path) -> bytes:
        if self == path and not permitted:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(self)

    permitted = True
    (tmp_path / "old.onnx").write_bytes(b"old")
    monkeypatch.setattr(Path, "read_bytes", read)
    permitted = False
    assert cli.run([str(path), "-o", str(tmp_path / "old.onnx")]) == 1
    permitted = True
    assert "Permission denied" in capsys.readouterr().err
    assert (tmp_path / "old.onnx").read_bytes() == b"old"


def broken(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = chain()
    change(model)
    return model


def _unknown_input(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[0] = "nowhere"


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Relux"


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "r2"


def _twice_the_same_output(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "c1"


def _unfit_weights(model: onnx.ModelProto) -> None:
    index = next(i for i, t in enumerate(model.graph.initializer) if t.name == "w2")
    model.graph.initializer[index].CopyFrom(weights("w2", (16, 7, 3, 3)))


def _no_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "z"


def _short_weights(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = tensor.raw_data[:-8]


def _no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_unknown_input, "'nowhere', which no node produces"),
        (_unknown_operator, "Relux"),
        (_cycle, "'r2', which only a later node produces"),
        (_twice_the_same_output, "'c1', which another node produces"),
        (_unfit_weights, "conv2"),
        (_no_output, "'z'"),
        (_short_weights, "w1"),
        (_no_opset, "no version of the ONNX operators"),
    ],
)
def test_invalid_graph(
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    names: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(broken(change), tmp_path / "net.onnx")
    line = refused(capsys, path)
    assert names in line
    assert "bug" not in line


def test_empty_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    assert "no nodes" in refused(capsys, written(model, tmp_path / "net.onnx"))


def test_input_that_is_no_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["x"], ["y"])],
        "g",
        [helper.make_value_info("x", kind)],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert "'x' is not a tensor" in refused(capsys, written(model, tmp_path / "net.onnx"))


def test_nothing_to_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, written(nothing_to_prune(), tmp_path / "net.onnx"))
    assert "nothing to prune" in line
    assert "graph output" in line


def test_no_layers_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    line = refused(capsys, written(model, tmp_path / "net.onnx"))
    assert "nothing to prune" in line
    assert "no layer" in line


# External data


@pytest.fixture
def spread(tmp_path: Path) -> Path:
    """A model with its weights beside it."""
    folder = tmp_path / "spread"
    folder.mkdir()
    return written_with_data(chain(), folder / "net.onnx", "net.data")


def test_external_data_missing(spread: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spread.parent / "net.data").unlink()
    line = refused(capsys, spread)
    assert "'net.data'" in line
    assert "missing" in line


def test_external_data_truncated(spread: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = spread.parent / "net.data"
    data.write_bytes(data.read_bytes()[:-600])
    line = refused(capsys, spread)
    assert "'net.data'" in line
    assert "truncated" in line


@pytest.mark.parametrize("location", ["../net.data", "{}/net.data", "a/../../net.data"])
def test_external_data_outside_the_folder(spread: Path, location: str, capsys: pytest.CaptureFixture[str]) -> None:
    outside = spread.parent.parent / "net.data"
    (spread.parent / "net.data").rename(outside)
    model = onnx.load(spread, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(outside.parent)
    written(model, spread)
    line = refused(capsys, spread)
    assert "outside the model's folder" in line


def test_external_data_without_a_place(spread: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(spread, load_external_data=False)
    del model.graph.initializer[0].external_data[:]
    written(model, spread)
    assert "'w1'" in refused(capsys, spread)


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("length", "many"), ("offset", "1e3")])
def test_external_data_at_no_place(spread: Path, key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(spread, load_external_data=False)
    for entry in model.graph.initializer[2].external_data:
        if entry.key == key:
            entry.value = value
    written(model, spread)
    line = refused(capsys, spread)
    assert "'net.data'" in line
    assert "bug" not in line


# Where the result goes


def test_output_folder_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    line = refused(capsys, model, out=tmp_path / "no" / "out.onnx")
    assert f"{tmp_path / 'no'} does not exist" in line
    assert not (tmp_path / "no").exists()


def test_output_folder_is_checked_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path / "missing.onnx", out=tmp_path / "no" / "out.onnx")
    assert f"{tmp_path / 'no'} does not exist" in line


def test_output_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    (tmp_path / "results").mkdir()
    assert "is a folder" in refused(capsys, model, out=tmp_path / "results")


def test_output_is_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    model = written(chain(), tmp_path / "net.onnx")
    assert "not a regular file" in refused(capsys, model, out=pipe)
    assert pipe.is_fifo()


def test_output_folder_not_writable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "out.onnx").write_bytes(b"old")
    temporary_file = tempfile.TemporaryFile

    def guarded(**arguments: Any) -> Any:
        if arguments["dir"] == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return temporary_file(**arguments)

    monkeypatch.setattr(tempfile, "TemporaryFile", guarded)
    line = refused(capsys, model, out=closed / "out.onnx")
    assert "not writable (Permission denied); choose another" in line
    assert str(closed) in line


def test_read_only_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    model = written(chain(), tmp_path / "net.onnx")
    monkeypatch.setattr("onnxcop._base.files.tempfile.mkstemp", fail)
    assert "Read-only file system" in refused(capsys, model)


def test_plan_folder_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    line = refused(capsys, model, "--plan-out", str(tmp_path / "no" / "plan.json"))
    assert "does not exist" in line


def test_plan_over_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    assert "input model itself" in refused(capsys, model, "--plan-out", str(model))


@pytest.mark.parametrize("options", [(), ("--external-data",)], ids=["single", "external"])
@pytest.mark.parametrize("survived", [0, 1, 2])
def test_disk_full(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    survived: int,
) -> None:
    """The disk fills up after some files have been written whole."""
    files = 1 + len(options) + 1
    if survived >= files:
        pytest.skip("no file is left to fail")
    model = written(chain(), tmp_path / "net.onnx")
    plan = tmp_path / "plan.json"
    plan.write_bytes(b"an old plan")
    original, synced = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal synced
        if synced == survived:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced += 1
        original(handle)

    monkeypatch.setattr("onnxcop._base.files.os.fsync", fsync)
    line = refused(capsys, model, *options, "--plan-out", str(plan))
    assert "No space left on device" in line


# What is asked for


def test_unknown_input_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    line = refused(capsys, model, "--input-shape", "z:1,3,8,8")
    assert "'z'" in line
    assert "x" in line
    assert "1,4,8,8" in refused(capsys, model, "--input-shape", "x:1,4,8,8")


@pytest.mark.parametrize("option", ["--keep", "--only"])
def test_pattern_that_matches_nothing(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    line = refused(capsys, model, option, "layer9*")
    assert "'layer9*'" in line
    assert "onnxcop inspect" in line


@pytest.mark.parametrize("criterion", ["cop-activation", "wanda"])
def test_criterion_that_needs_data(tmp_path: Path, criterion: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    assert "--data" in refused(capsys, model, "--criterion", criterion)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file"),
        ("", "no valid JSON"),
        ("[1, 2]", "not a pruning plan"),
        ('{"format": "onnxcop-plan", "version": 99}', "version 99"),
        ('{"format": "onnxcop-plan", "version": 1}', "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["apply", "verify"])
def test_bad_plan(
    tmp_path: Path,
    command: str,
    content: str | None,
    cause: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    before = contents(tmp_path)
    rest = [str(plan)] if command == "apply" else [str(model), "--plan", str(plan)]
    assert cli.run([command, str(model), *rest, *CPU]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert cause in line
    assert str(plan) in line
    assert contents(tmp_path) == before


def test_bad_plan_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(chain(), tmp_path / "net.onnx")
    assert cli.run(["apply", str(model), str(model), *CPU]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not a pruning plan" in line


@pytest.mark.parametrize("content", [b"", b"no archive", np.arange(9).tobytes()])
def test_bad_statistics(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    bad, out = tmp_path / "a.npz", tmp_path / "out.npz"
    bad.write_bytes(content)
    assert cli.run(["merge-stats", str(out), str(bad), str(bad)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line
    assert not out.exists()


def test_bad_models_are_refused_by_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    good = written(chain(), tmp_path / "net.onnx")
    plan = tmp_path / "plan.json"
    out = tmp_path / "out.onnx"
    assert cli.run([str(good), "-q", "-o", str(out), "--plan-out", str(plan), *CPU]) == 0
    capsys.readouterr()
    for command in (
        ["inspect", str(bad)],
        ["verify", str(bad), str(out), "--plan", str(plan)],
        ["verify", str(good), str(bad), "--plan", str(plan)],
    ):
        assert cli.run(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "bad.onnx is not an ONNX model" in line
