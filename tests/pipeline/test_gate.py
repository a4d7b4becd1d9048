"""Conditions on a comparison: read, held, and the exit code of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import BARE, CPU

from onnxcop.cli import main as cli
from onnxcop.errors import OnnxcopError
from onnxcop.pipeline.gate import QUANTITIES, Condition, read_gate


def test_conditions_are_read() -> None:
    assert read_gate("agreement>=.97, time<=80%") == (Condition("agreement", ">=", 0.97), Condition("time", "<=", 0.8))
    assert read_gate("divergence<1e-3")[0].bound == 1e-3
    for wrong in ("agreement", "speed<=1", "time==1", "time<=", "", "time<=1,"):
        with pytest.raises(OnnxcopError, match="is not a condition; write NAME<=NUMBER"):
            read_gate(wrong)


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        ("macs<=.75", 0),
        ("macs<=.75, size<.9, params<1, filters<1, error<5", 0),
        ("macs<=.1", 3),
        ("macs<=.75, divergence<0", 3),
        ("time<=99", 3),  # not measured: --latency-seconds 0
    ],
)
def test_the_command_exits_with_3_if_a_condition_fails(
    gate: str, code: int, pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, _ = pruned
    arguments = ["compare", str(model), str(out), *CPU, "--latency-seconds", "0", "--gate", gate]
    assert cli.run(arguments) == code
    shown = capsys.readouterr()
    assert ("does not hold" in shown.err) == (code == 3)
    assert ("fails" in shown.out) == (code == 3)
    assert cli.run([*arguments, "--json"]) == code
    verdicts = json.loads(capsys.readouterr().out)["gate"]
    assert [verdict["condition"].split("<")[0] for verdict in verdicts] == [
        p.split("<")[0].strip() for p in gate.split(",")
    ]
    assert all(verdict["holds"] for verdict in verdicts) == (code == 0)
    assert cli.run([*arguments, "--quiet"]) == code
    assert capsys.readouterr().out == ""


def test_a_model_equals_itself(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bounds = {"agreement": ">=1"} | {name: "<=0" for name in ("divergence", "error")} | {"macs": "<=1", "size": "<=1"}
    gate = ",".join(f"{name}{bound}" for name, bound in bounds.items() if name != "agreement")
    assert cli.run(["compare", str(model), str(model), *CPU, "--gate", f"{gate},time>.2"]) == 0
    assert set(bounds) <= set(QUANTITIES)


def test_a_gate_that_cannot_be_read_is_wrong_usage(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", str(model), str(model), "--gate", "fast"]) == 2
    assert "'fast' is not a condition" in " ".join(capsys.readouterr().err.split())


@pytest.mark.zoo
def test_a_gate_on_a_classifier(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = zoo / "trained" / "digit_cnn.onnx", tmp_path / "small.onnx"
    assert cli.run([str(model), "-o", str(out), "--criterion", "l2", "--macs", "0.9", *BARE, "-q"]) == 0
    gate = ["--data", str(zoo / "data" / "mnist_eval.npz"), "--preprocess", "mnist", "--samples", "256"]
    command = ["compare", str(model), str(out), *gate, *CPU, "--latency-seconds", "0", "--json", "-q", "--gate"]
    assert cli.run([*command, "agreement>=90%, macs<=.9"]) == 0
    verdicts: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["gate"]
    assert 0.9 <= verdicts[0]["value"] <= 1
    assert cli.run([*command, "agreement>=1.01"]) == 3
