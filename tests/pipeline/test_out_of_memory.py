"""Batches that do not fit in memory are halved, whatever phase of a run they are met in."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from small_models import chain

import onnxcop
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


def test_a_sample_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OutOfMemory("the model could not be run: out of memory")

    request = onnxcop.PruneOptions(data=IMAGES, batch_size=2, **RUN)
    monkeypatch.setattr("onnxcop.pipeline.prune.prune_faster", refused)
    with pytest.raises(OutOfMemory, match="a single sample does not fit"):
        onnxcop.pipeline.prune.prune_with(chain(), request)
