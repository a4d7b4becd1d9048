"""`--distill` from the command line and from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_runs import CPU
from small_models import chain, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import CalibrationError


def test_a_run_with_distillation_says_what_it_gave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = written(chain(), tmp_path / "net.onnx"), tmp_path / "small.onnx"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32))
    arguments = [str(model), "-o", str(out), "--data", str(tmp_path / "x.npy"), *CPU, "--latency-seconds", "0"]
    assert cli.run([*arguments, "--macs", "0.6", "--distill", "3 epochs"]) == 0
    assert "distillation" in capsys.readouterr().err
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_distillation_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="give --data"):
        onnxcop.prune(chain(), distill="5m")
    with pytest.raises(CalibrationError, match="not a training length"):
        onnxcop.prune(chain(), distill="soon", data=np.zeros((16, 3, 8, 8), np.float32))
    with pytest.raises(CalibrationError, match="give --distill"):
        onnxcop.prune(chain(), checkpoint=tmp_path / "state.npz")
