"""The table of recovery methods, and one of your own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import onnxcop
from onnxcop._base.types import IntArray
from onnxcop.allocation.sensitivity import Samples
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError
from onnxcop.recovery.methods import FULL, RECOVERIES, RecoveryMethod, recovery_named
from onnxcop.recovery.rounds import Recovery, RecoverySettings

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


def shift_means(recovery: Recovery, units: IntArray, samples: Samples, ridges: Mapping[int, float], name: str) -> None:
    """Put the mean of what is removed into the biases of its readers, and nothing else."""
    recovery.cut(units, samples, {})
    recovery.note(f"{name}: {len(units)} units cut", recovery.divergence())


SHIFT = RecoveryMethod("shift", "move the means of removed channels into biases", shift_means)


def test_methods_are_found_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert [recovery_named(method.name) for method in RECOVERIES] == [*RECOVERIES]
    assert recovery_named(SHIFT) is SHIFT
    with pytest.raises(BudgetError, match=r"unknown recovery method 'best'; choose one of .*none, "):
        recovery_named("best")
    assert RecoverySettings(refine=2).by(recovery_named("merge")).refine == 0
    assert RecoverySettings(refine=2).by(FULL).refine == 2
    assert cli.run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{method.name}: {method.help}" in shown for method in RECOVERIES)


def test_a_method_of_your_own_compensates(models_dir: Path) -> None:
    model, data = models_dir / "digits_resnet.onnx", models_dir / "digits_calib.npz"

    def divergence(recover: str | RecoveryMethod) -> float:
        result = onnxcop.prune(
            model, macs=0.6, criterion="l2", recover=recover, data=data, samples=64, options=CPU, latency_seconds=0
        )
        assert result.plan.settings["recover"] == recovery_named(recover).name
        way = result.evidence.way if result.evidence else ()
        assert np.isfinite(way[-1].divergence)
        return float(way[-1].divergence)

    found = {name: divergence(name) for name in (SHIFT, "merge", "full")}
    assert found["full"] < found["merge"] <= found[SHIFT] * (1 + 1e-6)
