"""Devices that are not at hand, by name: the widths that each asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPO_ROOT
from small_models import chain, shapes, written

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import BudgetError
from onnxcop.pipeline import finish, widths
from onnxcop.runtime.staircase import TARGETS, target_named

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


@pytest.fixture(autouse=True)
def nothing_is_timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("this machine was timed")

    monkeypatch.setattr(widths, "staircase_of", fail)
    monkeypatch.setattr(finish, "timed", fail)


@pytest.mark.parametrize("target", [one.name for one in TARGETS])
def test_widths_are_those_that_the_target_asks_for(target: str) -> None:
    stairs = target_named(target).staircase
    result = onnxcop.prune(
        chain(widths=(256, 512)), macs=0.5, criterion="l2", recover="none", options=CPU, target=target,
        latency_seconds=1.0,
    )  # fmt: skip
    kept = [shapes(result.model)[name][0] for name in ("w1", "w2")]
    assert [width % stairs.block for width in kept] == [0, 0]
    assert kept != [256, 512]
    assert result.report.latency is None
    (choice,) = result.report.choices
    assert choice.startswith(f"widths: multiples of {stairs.block}")
    assert choice.endswith(f"as {target} asks for; nothing was timed, as it is another device")


def test_a_sweep_takes_a_target() -> None:
    (point,) = onnxcop.sweep(
        chain(widths=(256, 512)), [0.5], criterion="l2", recover="none", options=CPU, target="cuda-fp16"
    )
    assert [shapes(point.result.model)[name][0] % 64 for name in ("w1", "w2")] == [0, 0]


def test_a_target_that_nobody_knows_is_answered_with_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BudgetError) as caught:
        onnxcop.prune(chain(), target="abacus", options=CPU)
    model = written(chain(), tmp_path / "net.onnx")
    assert cli.run([str(model), "--target", "abacus"]) == 2
    for told in (str(caught.value), capsys.readouterr().err):
        assert "abacus" in told
        assert [one.name for one in TARGETS if one.name not in told] == []


def test_what_contradicts_a_target_is_said() -> None:
    with pytest.raises(BudgetError, match="--target and --multiple-of exclude each other"):
        onnxcop.prune(chain(), target="arm64", limits=onnxcop.Limits(multiple_of=4), options=CPU)
    with pytest.raises(BudgetError, match="--latency measures this machine, and --target names another"):
        onnxcop.prune(chain(), target="arm64", latency=0.7, options=CPU)


def test_the_guide_lists_every_target_with_its_widths() -> None:
    text = (REPO_ROOT / "docs" / "howto" / "speed.md").read_text(encoding="utf-8")
    for one in TARGETS:
        assert f"| `{one.name}` | {one.staircase.block} | {one.staircase.fine} |" in text
