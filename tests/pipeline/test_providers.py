"""Which provider does what in a run: TensorRT times the results, and CUDA computes what changes all the time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from small_models import chain

import onnxcop
from onnxcop.pipeline import widths
from onnxcop.runtime import providers, session
from onnxcop.runtime.staircase import Staircase


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Sessions by the requested provider; all run on the CPU of this machine."""
    found: dict[str, int] = defaultdict(int)
    started = session.Session.__init__

    def counted(self: Any, model: Any, options: Any = session.EngineOptions(), **others: Any) -> None:
        found[options.provider] += 1
        started(self, model, options, **others)

    monkeypatch.setattr(session.Session, "__init__", counted)
    here = session.create_session
    monkeypatch.setattr(session, "create_session", lambda source, _, **others: here(source, [providers.CPU], **others))
    monkeypatch.setattr(providers, "_available", lambda: [providers.TENSORRT, providers.CUDA, providers.CPU])
    monkeypatch.setattr(providers, "_probe", lambda _: None)
    monkeypatch.setattr(widths, "staircase_of", lambda options: Staircase(1, 1))
    return found


def test_tensorrt_times_and_cuda_recovers(opened: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(
        "onnxcop.pipeline.finish.beside_original", lambda _, model, engine, seconds: timed.append(engine.provider)
    )
    monkeypatch.setattr("onnxcop.runtime.segments.device_of", lambda options: None)  # the stand-in is the CPU
    images = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
    engine = onnxcop.EngineOptions(provider="tensorrt")
    onnxcop.prune(
        chain(), macs=0.6, data=images, options=engine, settings=onnxcop.RecoverySettings(rounds=1), latency_seconds=0.1
    )
    assert timed == ["tensorrt"]
    assert opened["cuda"] > 20
    assert opened["tensorrt"] <= 2  # that the original runs at all is checked as it was asked for


def test_other_providers_do_both() -> None:
    for provider in ("auto", "cpu", "cuda", "dml"):
        options = onnxcop.EngineOptions(provider=provider, threads=2)
        assert options.for_computing() is options
    engine = onnxcop.EngineOptions(provider="TensorrtExecutionProvider", provider_options=(("a", "1"),))
    assert engine.for_computing() == onnxcop.EngineOptions(provider="cuda")
