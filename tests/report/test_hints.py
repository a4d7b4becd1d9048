"""The tool says itself what surprises people: nothing removed, not smaller, not faster, other answers."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from small_models import chain

import onnxcop
from onnxcop.analysis.summary import Totals
from onnxcop.reconstruction.divergence import Reference
from onnxcop.report.hints import hints
from onnxcop.report.summary import Report

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a run that nothing has to be said about."""
    found = onnxcop.prune(chain(), macs=0.7, criterion="l2", recover="none", options=CPU).report
    return replace(found, before=Totals(1000, 1000, 1000), after=Totals(700, 700, 700))


def test_silence_if_nothing_is_odd(report: Report) -> None:
    assert list(hints(report, {"macs": 0.7})) == []
    same = np.eye(4)[np.arange(40) % 4] * 9
    figures = Reference([{"y": same}]).figures([{"y": same}])
    assert list(hints(replace(report, figures=figures), {"macs": 0.7})) == []


def test_nothing_removed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="onnxcop"):
        result = onnxcop.prune(chain(), macs=1.0, criterion="l2", recover="none", options=CPU)
    (line,) = (line for line in result.report.warnings if line.startswith("nothing was removed"))
    assert "within the budget already" in line
    assert f"hint: {line}" in caplog.messages


def test_not_smaller(report: Report) -> None:
    large = replace(report, after=Totals(700, 950, 950))
    (line,) = hints(large, {"macs": 0.7})
    assert line.startswith("95% of the file are left with 70% of the arithmetic")
    assert "--size" in line
    assert list(hints(large, {"macs": 0.7, "size": 950})) == []


def test_not_faster(report: Report) -> None:
    slow = replace(report, after=Totals(980, 700, 700))
    for budget in ({"params": 0.7}, {"size": 700.0}):
        (line,) = hints(slow, budget)
        assert line.startswith("98% of the arithmetic are left with 70% of the parameters")
        assert "--macs" in line
    assert list(hints(slow, {"macs": 0.98, "params": 0.7})) == []


def test_few_samples(report: Report) -> None:
    (line,) = hints(report, {"macs": 0.7}, samples=12)
    assert line.startswith("12 samples are few")
    assert list(hints(report, {"macs": 0.7}, samples=500)) == []


def test_a_quantized_model_is_better_pruned_before(report: Report) -> None:
    (line,) = hints(report, {"macs": 0.7}, quantized=True)
    assert "prune the model that it was made from, and quantize the result" in line


def test_other_answers(report: Report) -> None:
    scores = np.eye(4)[np.arange(40) % 4] * 9
    figures = Reference([{"y": scores}]).figures([{"y": np.roll(scores, [0, 1], axis=[0, 1])}])
    assert figures.warnings == ("output y: 100% of the samples are classified differently than by the original",)
    far = replace(report, figures=figures)
    (line,) = hints(far, {"macs": 0.7})
    assert "give more samples" in line


def test_a_bound_that_does_not_hold_elsewhere(report: Report) -> None:
    numbers = np.random.default_rng(0).standard_normal((40, 3))
    figures = Reference([{"y": numbers}]).figures([{"y": 1.1 * numbers}])
    (line,) = hints(replace(report, figures=figures), {"divergence": 0.05})
    assert line.startswith("the divergence is 0.1 (95 % interval 0.1 to 0.1, n = 40), above the bound of 0.05")
    assert list(hints(replace(report, figures=figures), {"divergence": 0.11})) == []
