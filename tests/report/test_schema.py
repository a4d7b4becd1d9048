"""The JSON output is what its schema says: results, reports, comparisons and errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from cli_runs import BARE, CPU

from onnxcop.analysis.analyze import analyze
from onnxcop.analysis.inspect import inspect
from onnxcop.analysis.reason_codes import CODES, OTHER, code_of
from onnxcop.cli import main as cli
from onnxcop.errors import OnnxcopError
from onnxcop.report.schema import json_schema
from onnxcop.runtime.session import EngineOptions

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def _valid(text: str, kind: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    assert document["format"] == f"onnxcop-{kind}"
    jsonschema.validate(document, {**json_schema(), "oneOf": [{"$ref": f"#/$defs/{kind}"}]})
    VALIDATOR.validate(document)
    return document


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({"format": "onnxcop-result", "version": 1})


def test_a_result_and_its_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, report = tmp_path / "d.npz", tmp_path / "r.json"
    np.savez(data, x=np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32))
    arguments = [str(model), "--data", str(data), "--criterion", "l2", "--recover", "merge", "--report", str(report)]
    assert cli.run([*arguments, *CPU, "--latency-seconds", "0.1", "--json", "-q"]) == 0
    found = _valid(capsys.readouterr().out, "result")
    assert set(found["files"]) == {"model", "data", "output"}
    assert found["calibration"]["source"] == str(data) and found["calibration"]["available"] == 24
    (fed,) = found["inputs"]
    assert (fed["name"], fed["shape"], fed["dtype"]) == ("x", [3, 8, 8], "float32")
    assert {entry["code"] for entry in found["frozen"]} == {"output"}
    _valid(report.read_text(), "report")


def test_a_result_without_data(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(model), *BARE, "--json", "-q"]) == 0
    found = _valid(capsys.readouterr().out, "result")
    assert set(found["files"]) == {"model", "output"}
    assert (found["calibration"], found["inputs"]) == ({"description": ""}, [])


def test_a_folder_is_identified_by_its_listing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.ones((4, 3, 8, 8), np.float32) * number)
    assert cli.run([str(model), "--data", str(folder), *BARE, "--criterion", "l2", "--json", "-q"]) == 0
    found = _valid(capsys.readouterr().out, "result")["files"]["data"]
    assert found["files"] == 3 and "sha256" not in found


def test_a_comparison(pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, out, _ = pruned
    assert (
        cli.run(["compare", str(model), str(out), *CPU, "--latency-seconds", "0.1", "--json", "--gate", "macs<1"]) == 0
    )
    assert _valid(capsys.readouterr().out, "comparison")["gate"][0]["holds"]


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["nowhere.onnx"], "ModelError", 1),
        (["MODEL", "--macs", "0.0001"], "BudgetError", 1),
        (["MODEL", "--data", "nowhere"], "CalibrationError", 1),
        (["MODEL", "--provider", "nonesuch"], "EngineError", 1),
        (["MODEL", "--maks", "1"], "UsageError", 2),
        (["compare", "MODEL", "nowhere.onnx"], "ModelError", 1),
    ],
)
def test_failures(arguments: list[str], kind: str, code: int, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(model) if word == "MODEL" else word for word in arguments] + ["--json"]) == code
    shown = capsys.readouterr()
    found = _valid(shown.out, "error")
    assert (found["error"]["type"], found["exit_code"]) == (kind, code)
    assert found["error"]["message"] in " ".join(shown.err.split())
    assert ("nearest" in found["error"]) == (kind == "BudgetError")


def test_codes_of_reasons() -> None:
    assert code_of("reaches a graph output (y)") == "output"
    assert code_of("no rule for Foo (node)") == "no-rule"
    assert code_of("Dropout in training mode (n)") == OTHER
    assert len(set(CODES)) == len(CODES)


@pytest.mark.zoo
def test_reasons_of_the_zoo_have_codes(zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    seen: dict[str, str] = {}
    for name in ("yolov8n_320", "silero_vad_16k_op15", "ultraface_rfb_320", "crepe_tiny", "captcha_crnn"):
        try:
            found = inspect(analyze(zoo / "trained" / f"{name}.onnx", options=EngineOptions("cpu", 1)))
        except OnnxcopError:
            continue
        seen |= {reason: code_of(reason) for reason in found.frozen}
    assert len(seen) > 8
    unknown = {reason for reason, code in seen.items() if code == OTHER}
    assert len(unknown) <= 0.2 * len(seen), unknown
