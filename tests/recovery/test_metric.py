"""The user's own score of a model."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from small_models import chain

from onnxcop.errors import CalibrationError
from onnxcop.recovery.metric import Metric

SCRIPT = """
calls = []
threshold = 0.5

def score(model):
    calls.append(model)
    return len(model.graph.node) * threshold

def broken(model):
    raise RuntimeError("no\\nluck")

def words(model):
    return "many"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "score.py"
    path.write_text(SCRIPT)
    return path


def test_a_callable_scores_the_original_first() -> None:
    seen: list[onnx.ModelProto] = []

    def nodes(model: onnx.ModelProto) -> int:
        seen.append(model)
        return len(model.graph.node)

    model = chain()
    metric = Metric.of(nodes, model)
    assert (metric.name, metric.base) == ("nodes", 8.0)
    assert seen == [model]
    del model.graph.node[-1]
    assert metric(model) == 7.0


def test_a_function_in_a_script(script: Path) -> None:
    metric = Metric.of(f"{script}:score", chain())
    assert (metric.name, metric.base) == ("score", 4.0)
    assert metric(chain()) == 4.0


def test_callables_without_a_name() -> None:
    class Score:
        def __call__(self, model: onnx.ModelProto) -> float:
            return 0.25

    assert Metric.of(Score(), chain()).name == "metric"
    assert Metric.of(Score(), chain()).base == 0.25


@pytest.mark.parametrize(("function", "message"), [
    ("broken", "the metric 'broken' failed: RuntimeError: no luck"),
    ("words", "the metric 'words' failed: ValueError"),
    ("missing", "has no function 'missing'"),
    ("threshold", "has no function 'threshold'"),
])  # fmt: skip
def test_functions_that_give_no_number(script: Path, function: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        Metric.of(f"{script}:{function}", chain())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("source", "message"), [
    ("score.py", "is not of the form script.py:function"),
    ("score.py:", "is not of the form script.py:function"),
    ("absent.py:score", "does not exist"),
    (".:score", "does not exist"),
])  # fmt: skip
def test_sources_that_are_none(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=message):
        Metric.of(source, chain())


def test_scripts_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import absent_module_of_nobody")
    with pytest.raises(CalibrationError, match=r"bad\.py cannot be loaded: ModuleNotFoundError"):
        Metric.of(f"{tmp_path / 'bad.py'}:score", chain())
    (tmp_path / "text.txt").write_text("not code")
    with pytest.raises(CalibrationError, match="is not a Python file"):
        Metric.of(f"{tmp_path / 'text.txt'}:score", chain())
