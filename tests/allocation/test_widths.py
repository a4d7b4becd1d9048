"""Widths that pay: what is tried, what is chosen, and that it is kept to. Machines are made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_models import chain, shapes, written

import onnxcop
from onnxcop.allocation import width_multiple as widths
from onnxcop.allocation.budget import AUTO, Budget, Limits
from onnxcop.allocation.width_multiple import Tried, best, suitable_widths
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError, EngineError
from onnxcop.runtime.latency import Measurement

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)
WIDE = (80, 96)


def machine(block: int, penalty: float = 1.0) -> Callable[..., Measurement]:
    """A machine that computes channels in blocks, and is slower by a factor where a width is no multiple."""

    def cost(model: onnx.ModelProto) -> float:
        total = 0.0
        for name, (out, inner, *_) in ((n, d) for n, d in shapes(model).items() if len(d) == 4):
            odd = out % block or (inner % block and name != "w1")
            total += np.prod(np.ceil(np.array([out, inner]) / block) * block) * (penalty if odd else 1.0)
        return total

    def measure(models: Sequence[onnx.ModelProto], *_: Any, **__: Any) -> Measurement:
        return Measurement(np.array([[cost(model) for model in models]] * 5), "made up")

    return measure


@pytest.mark.parametrize(("block", "penalty"), [(1, 1.0), (4, 1.5), (8, 2.0), (16, 2.0)])
def test_the_granularity_of_the_machine_is_found(monkeypatch: pytest.MonkeyPatch, block: int, penalty: float) -> None:
    monkeypatch.setattr(widths, "measure", machine(block, penalty))
    analysis = onnxcop.analyze(chain(widths=WIDE), options=CPU)
    found = suitable_widths(analysis, Budget(macs=0.5), Limits(), CPU)
    assert found.multiple == block
    assert [entry.multiple for entry in found.tried] == [1, 2, 4, 8, 16, 32]
    assert all(entry.macs == pytest.approx(0.5, abs=0.2) for entry in found.tried)
    assert f"multiples of {block}," in str(found)


def test_a_finer_width_is_taken_where_it_costs_little() -> None:
    tried = [Tried(1, 0.5, 0.9, 0), Tried(4, 0.5, 0.54, 0), Tried(8, 0.5, 0.5, 0), Tried(16, 0.4, 0.42, 0)]
    assert best(tried) == 4
    assert best(tried[:1]) == 1


def test_granularities_that_cannot_meet_the_budget_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "measure", machine(16))
    analysis = onnxcop.analyze(chain(), options=CPU)
    found = suitable_widths(analysis, Budget(macs=0.45), Limits(), CPU)
    assert [entry.multiple for entry in found.tried] == [1, 2, 4]
    assert suitable_widths(analysis, Budget(macs=0.5), Limits(max_cut=0.0), CPU) == widths.Widths(1, ())


def test_the_limits_hold_while_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[onnx.ModelProto] = []
    original = machine(8)

    def measure(models: Sequence[onnx.ModelProto], *arguments: Any, **settings: Any) -> Measurement:
        seen.extend(models)
        return original(models)

    monkeypatch.setattr(widths, "measure", measure)
    model = chain(widths=WIDE)
    suitable_widths(onnxcop.analyze(model, options=CPU), Budget(macs=0.8), Limits(keep=("conv1",)), CPU)
    assert len(seen) > 3
    assert {shapes(cut)["w1"][0] for cut in seen} == {80}
    for multiple, cut in zip(widths.CANDIDATES, seen[1:], strict=False):
        assert shapes(cut)["w2"][0] % multiple == 0


def test_where_nothing_can_be_measured_a_usual_multiple_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Measurement:
        raise EngineError("no such kernel")

    monkeypatch.setattr(widths, "measure", fail)
    with caplog.at_level(logging.WARNING, "onnxcop"):
        found = suitable_widths(onnxcop.analyze(chain(widths=WIDE), options=CPU), Budget(macs=0.5), Limits(), CPU)
    assert found.multiple == 8
    assert "no such kernel" in caplog.text
    assert "untested" in str(found)


@pytest.mark.parametrize("data", [False, True])
def test_the_result_keeps_to_what_was_found(monkeypatch: pytest.MonkeyPatch, data: bool) -> None:
    monkeypatch.setattr(widths, "measure", machine(16, 3.0))
    x = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32) if data else None
    result = onnxcop.prune(chain(widths=WIDE), macs=0.5, limits=Limits(multiple_of=AUTO), data=x, options=CPU)
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert {shapes(result.model)[name][0] % 16 for name in ("w1", "w2")} == {0}
    assert result.plan.settings["limits"]["multiple_of"] == 16
    (choice,) = result.report.choices
    assert choice.startswith("widths: multiples of 16, by measurement")
    assert choice in str(result)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(widths, "measure", machine(8, 2.0))
    path = written(chain(widths=WIDE), tmp_path / "net.onnx")
    quick = ["--multiple-of", "auto", "--provider", "cpu", "--recover", "none", "--latency-seconds", "0"]
    assert cli.run([str(path), *quick]) == 0
    assert "widths: multiples of 8, by measurement" in capsys.readouterr().out
    assert cli.run([str(path), *quick, "--json"]) == 0
    assert "multiples of 8" in json.loads(capsys.readouterr().out)["choices"][0]
    assert cli.run(["sweep", str(path), "--macs", "0.8", *quick]) == 0
    assert capsys.readouterr().out.startswith("widths: multiples of 8")
    assert cli.run([str(path), "--multiple-of", "any"]) == 2
    assert "auto" in capsys.readouterr().err


def test_a_stage_alone_wants_a_number() -> None:
    analysis = onnxcop.analyze(chain(), options=CPU)
    context = onnxcop.PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    ranking = onnxcop.criterion_named("l2").rank(context)
    with pytest.raises(BudgetError, match="suitable_widths"):
        onnxcop.choose(context, ranking, Budget(macs=0.5), Limits(multiple_of=AUTO))
    with pytest.raises(BudgetError, match="at least 1"):
        Limits(multiple_of=-1)
