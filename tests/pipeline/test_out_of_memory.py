"""Batches that do not fit in memory are halved, whatever phase of a run they are met in."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from small_models import chain

import onnxcop
from onnxcop._base.timing import Clock
from onnxcop.allocation.budget import Budget
from onnxcop.pipeline.decide import Decision
from onnxcop.pipeline.incremental import IncrementalPruner
from onnxcop.runtime.providers import OutOfMemory
from onnxcop.runtime.session import Session

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
ONCE = onnxcop.RecoverySettings(rounds=1)
RUN: dict[str, Any] = {"macs": 0.6, "options": CPU, "settings": ONCE, "latency_seconds": 0.0}
IMAGES = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that takes four samples at a time; the list fills with the sizes of refused batches."""
    run, refused = Session.run, list[int]()

    def limited(session: Session, feeds: Any, outputs: Any = None) -> Any:
        most = max((value.shape[0] for value in feeds.values() if value.ndim == 4), default=0)
        if most > 4:
            refused.append(most)
            raise OutOfMemory("the model could not be run: out of memory")
        return run(session, feeds, outputs)

    monkeypatch.setattr(Session, "run", limited)
    return refused


def test_a_run_with_data_starts_again_in_smaller_batches(
    small_device: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "onnxcop"):
        result = onnxcop.prune(chain(), data=IMAGES, batch_size=16, **RUN)
    assert {16, 8} <= set(small_device)
    assert sum("batches of half the size" in message for message in caplog.messages) == 2
    assert result.report.figures is not None
    small_device.clear()
    same = onnxcop.prune(chain(), data=IMAGES, batch_size=4, **RUN)
    assert not small_device
    assert same.model.graph == result.model.graph


def test_synthetic_inputs_do_so_too(small_device: list[int]) -> None:
    assert onnxcop.prune(chain(), **RUN).report.after.macs
    assert small_device


@pytest.mark.parametrize("how", [{}, {"criterion": "cop", "allocate": "cop"}])
def test_a_sweep_goes_on_in_smaller_batches(small_device: list[int], how: dict[str, Any]) -> None:
    options = {**RUN, "data": IMAGES, **how}
    del options["macs"]
    points = [point.result.model for point in onnxcop.sweep(chain(), [0.8, 0.6], batch_size=16, **options)]
    assert {16, 8} <= set(small_device)
    small_device.clear()
    same = [point.result.model for point in onnxcop.sweep(chain(), [0.8, 0.6], batch_size=4, **options)]
    assert not small_device
    assert [one.graph for one in points] == [one.graph for one in same]


def test_a_sweep_whose_second_point_does_not_fit_repeats_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**RUN, "data": IMAGES}
    del options["macs"]
    whole = [point.result.model for point in onnxcop.sweep(chain(), [0.8, 0.6], batch_size=8, **options)]
    decide, budgets = IncrementalPruner.decide, list[float | None]()

    def limited(course: IncrementalPruner, budget: Budget, clock: Clock) -> Decision:
        assert course.request.source is not None
        budgets.append(budget.macs)
        if budget.macs == 0.6 and course.request.source.batch_size > 8:
            raise OutOfMemory("the model could not be run: out of memory")
        return decide(course, budget, clock)

    monkeypatch.setattr(IncrementalPruner, "decide", limited)
    halved = [point.result.model for point in onnxcop.sweep(chain(), [0.8, 0.6], batch_size=16, **options)]
    assert budgets == [0.8, 0.6, 0.8, 0.6]
    assert halved[1].graph == whole[1].graph


def test_a_plan_is_replayed_in_smaller_batches(small_device: list[int]) -> None:
    plan = onnxcop.prune(chain(), data=IMAGES, batch_size=4, **RUN).plan
    assert not small_device
    options: dict[str, Any] = {"data": IMAGES, "options": CPU, "latency_seconds": 0.0}
    result = onnxcop.apply_plan(chain(), plan, batch_size=16, **options)
    assert {16, 8} <= set(small_device)
    assert result.model.graph == onnxcop.apply_plan(chain(), plan, batch_size=4, **options).model.graph
    assert result.report.figures is not None


def test_a_sample_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OutOfMemory("the model could not be run: out of memory")

    request = onnxcop.PruneOptions(data=IMAGES, batch_size=2, **RUN)
    monkeypatch.setattr("onnxcop.pipeline.prune.prune_faster", refused)
    with pytest.raises(OutOfMemory, match="a single sample does not fit"):
        onnxcop.pipeline.prune.prune_with(chain(), request)
