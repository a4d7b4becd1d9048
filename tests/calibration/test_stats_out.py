"""Statistics that a run writes: together with its other results, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import chain, written

import onnxcop
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.cli import main as cli
from onnxcop.errors import CalibrationError, VerificationError
from onnxcop.pipeline.sweep import sweep

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
QUIET = ["--provider", "cpu", "--threads", "1", "--latency-seconds", "0", "-q"]
CALIBRATED_ON = 24  # all of them, since so few samples are never set aside
ON_A_CURVE = 18  # a quarter is set aside, as points of a curve share their samples
SAMPLES = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
BARE: dict[str, Any] = {"options": CPU, "criterion": "wanda", "recover": "none"}


def _refuse(*_: object) -> None:
    raise VerificationError("wrong")


@pytest.mark.parametrize("way", ["--criterion=wanda", "--allocate=measured"])
def test_the_command_writes_them_with_the_model(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out, stats = (tmp_path / name for name in ("net.onnx", "x.npz", "out.onnx", "stats.npz"))
    written(chain(), model)
    np.savez(data, x=SAMPLES)
    command = [str(model), "-o", str(out), "--data", str(data), "--stats-out", str(stats), way, *QUIET]
    with monkeypatch.context() as patched:
        patched.setattr("onnxcop.pipeline.finish.verify", _refuse)
        assert cli.run(command) == 1
    assert "error: wrong" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([model, data])
    assert cli.run(command) == 0
    assert CalibrationStats.load(stats).samples == CALIBRATED_ON
    assert out.exists()


def test_python_writes_or_hands_them_over(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    result = onnxcop.prune(chain(), data=SAMPLES, stats_out=path, **BARE)
    assert result.stats is not None and result.stats.samples == CalibrationStats.load(path).samples == CALIBRATED_ON
    measured: dict[str, Any] = {"options": CPU, "allocate": "measured", "recover": "none", "data": SAMPLES}
    assert onnxcop.prune(chain(), stats_out=True, **measured).stats is not None
    assert onnxcop.prune(chain(), stats_out=False, **measured).stats is None
    assert list(tmp_path.iterdir()) == [path]


def test_a_sweep_writes_them_after_its_first_point(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    points = sweep(chain(), [0.9, 0.7], data=SAMPLES, stats_out=path, **BARE)
    assert next(points).macs == 0.9
    assert CalibrationStats.load(path).samples == ON_A_CURVE
    first = path.stat().st_mtime_ns
    assert [point.macs for point in points] == [0.7]
    assert path.stat().st_mtime_ns == first


def test_without_data_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="give --data"):
        onnxcop.prune(chain(), stats_out=tmp_path / "stats.npz", **BARE)
