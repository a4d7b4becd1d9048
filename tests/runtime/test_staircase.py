"""The staircase of a machine: derived from times, cached, and replaced by a default if nothing can be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain

import onnxcop
from onnxcop._base import cache
from onnxcop.errors import BudgetError, EngineError
from onnxcop.pipeline import widths
from onnxcop.runtime import staircase
from onnxcop.runtime.latency import Measurement
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.staircase import Staircase, staircase_of

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "kept"))
    return tmp_path / "kept"


def made_up(fine: int, block: int, asked: list[int] | None = None) -> Any:
    """A machine that computes in blocks, and takes twice as long if a width is not a multiple of a finer step."""

    def measure(models: Sequence[onnx.ModelProto], *_: Any, **__: Any) -> Measurement:
        if asked is not None:
            asked.append(len(models))
        widths = [model.graph.input[0].type.tensor_type.shape.dim[1].dim_value for model in models]
        seconds = [np.ceil(width / block) * block * (2.0 if width % fine else 1.0) for width in widths]
        return Measurement(np.array([seconds] * 5), "made up")

    return measure


@pytest.mark.parametrize(("fine", "block"), [(1, 1), (1, 8), (4, 8), (4, 16), (8, 8), (8, 16)])
def test_the_stairs_of_a_machine_are_found(monkeypatch: pytest.MonkeyPatch, fine: int, block: int) -> None:
    monkeypatch.setattr(staircase, "measure_times", made_up(fine, block))
    assert staircase_of(CPU) == Staircase(fine, block)


def test_they_are_measured_once(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(staircase, "measure_times", made_up(4, 16, asked))
    first, times = staircase_of(CPU), len(asked)
    assert times > 0
    assert staircase_of(CPU) == first
    assert len(asked) == times
    assert staircase_of(onnxcop.EngineOptions(provider="cpu", threads=2)) == first
    assert len(asked) == times  # any number of threads computes the same blocks
    for kept in empty_cache.iterdir():
        kept.write_text("{not json")
    assert staircase_of(CPU) == first
    assert len(asked) == 2 * times


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "file" / "below"))
    monkeypatch.setattr(staircase, "measure_times", made_up(4, 16))
    assert staircase_of(CPU) == Staircase(4, 16)
    assert cache.remembered("staircase", {}) is None


def test_this_machine_has_stairs() -> None:
    found = staircase_of(CPU)
    assert found is not None
    assert 1 <= found.fine <= found.block <= 16


def test_if_nothing_can_be_timed_default_widths_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Measurement:
        raise EngineError("no such kernel")

    monkeypatch.setattr(staircase, "measure_times", fail)
    result = onnxcop.prune(chain(widths=(40, 64)), macs=0.7, criterion="l2", recover="none", options=CPU)
    (choice,) = result.report.choices
    assert choice == "widths: multiples of 8, of 4 in narrow layers, untested, as no layer could be timed"


def test_no_machine_has_odd_stairs() -> None:
    for fine, block in ((3, 8), (8, 12), (0, 8), (16, 8)):
        with pytest.raises(BudgetError, match="steps"):
            Staircase(fine, block)


def test_machines_differ_by_their_threads() -> None:
    one = Machine.of(CPU)
    other = Machine.of(onnxcop.EngineOptions(provider="cpu", threads=3))
    assert replace(other, threads=1) == one != other
    assert one.processor


def test_a_result_that_is_slower_is_made_again_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcop.pipeline import finish
    from onnxcop.runtime.latency import Latency, Timing

    def timed(original: onnx.ModelProto, other: onnx.ModelProto, *_: Any) -> Latency:
        odd = any(len(t.dims) == 4 and t.dims[0] % 16 for t in other.graph.initializer)
        one = Timing(1.0, 1.0, 1.0)
        return Latency(one, one, 1.3 if odd else 0.8, 0.01, 9, "made up")

    monkeypatch.setattr(finish, "timed", timed)
    monkeypatch.setattr(widths, "staircase_of", lambda _: Staircase(4, 16))
    model = chain(widths=(48, 32))
    result = onnxcop.prune(
        model, macs=0.85, criterion="l2", recover="none", options=CPU, latency_seconds=0.1,
        limits=onnxcop.Limits(keep=("conv2",)),
    )  # fmt: skip
    assert result.report.latency is not None
    assert result.report.latency.ratio == 0.8
    assert "multiples of 16, as finer ones were slower" in result.report.choices[0]
    kept = onnxcop.prune(
        model, macs=0.85, criterion="l2", recover="none", options=CPU, latency_seconds=0.1,
        limits=onnxcop.Limits(multiple_of=1, keep=("conv2",)),
    )  # fmt: skip
    assert kept.report.latency is not None
    assert kept.report.latency.slower
