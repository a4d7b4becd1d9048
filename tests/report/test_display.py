"""A result shows itself, and a run says how far it has come, on a terminal and in a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from small_models import chain

import onnxcop
from onnxcop._base.progress import NotebookBars, in_notebook, shown, silent

CPU = onnxcop.EngineOptions(provider="cpu", threads=1)


@pytest.fixture(scope="module")
def result() -> onnxcop.PruneResult:
    model = chain()
    model.graph.node[0].name = "stem<1>&"  # a name that HTML and rich would trip over
    model.graph.node[2].name = "[bold]conv2[/bold]"
    return onnxcop.prune(model, macs=0.7, criterion="l2", recover="none", options=CPU)


class _Rows(HTMLParser):
    """The cells of all tables, row by row, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_line(result: onnxcop.PruneResult) -> None:
    kept = result.report.after.macs / result.report.before.macs
    assert repr(result).startswith("<PruneResult of the model: keeps MACs ")
    assert f"MACs {kept:.1%}" in repr(result)
    assert "\n" not in repr(result)


def test_text_is_the_table_and_the_remarks(result: onnxcop.PruneResult) -> None:
    lines = str(result).splitlines()
    (macs,) = (line.split() for line in lines if line.lstrip().startswith("MACs"))
    assert macs[-1] == f"{result.report.after.macs / result.report.before.macs:.1%}"
    assert any(line.startswith("frozen: 5 of 29 filters") for line in lines)
    assert any(line.startswith("verified: ") for line in lines)
    assert any(line.startswith("warning: using the weights alone") for line in lines)


def test_rich_shows_it(result: onnxcop.PruneResult) -> None:
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=80).print(result)
    assert "MACs" in out.getvalue()
    assert "parameters" in out.getvalue()
    assert "frozen: 5 of 29 filters" in out.getvalue()


def test_a_notebook_shows_it(result: onnxcop.PruneResult) -> None:
    parser = _Rows()
    parser.feed(result._repr_html_())
    parser.close()
    assert parser.open == []
    assert [row[0] for row in parser.rows[:5]] == ["", "filters", "MACs", "parameters", "file size"]
    groups = {row[0]: row[1:3] for row in parser.rows[6:]}
    assert groups == {group.name: [str(group.width), str(group.kept)] for group in result.report.groups}
    assert "stem<1>&" in groups


def test_progress_reaches_a_plain_function() -> None:
    seen: list[tuple[str, float, float | None]] = []
    data = {"x": np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)}
    onnxcop.prune(
        chain(), macs=0.8, data=data, options=CPU, progress=lambda stage, done, total: seen.append((stage, done, total))
    )
    assert {stage.split(" ")[0] for stage, _, _ in seen} >= {"statistics", "refinement"}
    assert all(total is None or 0 <= done <= total for _, done, total in seen)


@pytest.mark.parametrize("asked", [None, False])
def test_silence(asked: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(asked) as report:
        assert report is silent
        report("calibration", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_true_is_bars_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not in_notebook()
    with shown(True) as report:
        assert report is not silent
        report("calibration", 1, 2)
    assert capsys.readouterr() == ("", "")  # nothing is drawn where there is no terminal


_NOTEBOOK = """
from traitlets.config import Config
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
shell.kernel = object()  # what a notebook's shell has, and a terminal's has not

from onnxcop._base.progress import shown

with capture_output() as captured:
    with shown(True) as report:
        for done in range(1, 4):
            report("curves <a>", done, 3)
        report("unknown", 5, None)
pictures = [(output.data["text/html"], output.update) for output in captured.outputs]
assert pictures[0][1] is False and all(update for _, update in pictures[1:]), pictures
assert any('<progress value="3" max="3"></progress> 100% curves &lt;a&gt;' in html for html, _ in pictures), pictures
assert pictures[-1][0] == "", pictures
assert captured.stdout == captured.stderr == "", captured.stdout + captured.stderr
"""


def test_bars_in_a_notebook(tmp_path: Path) -> None:
    pytest.importorskip("IPython", reason="bars in a notebook need IPython")
    script = tmp_path / "notebook.py"
    script.write_text(_NOTEBOOK)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_bars_are_drawn_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred calls in a moment are not a hundred pictures."""
    drawn: list[str] = []
    monkeypatch.setattr(NotebookBars, "_show", lambda _, html: drawn.append(html))
    bars = NotebookBars()
    for done in range(1, 101):
        bars("calibration", done, 100)
    assert 2 <= len(drawn) < 20
    assert "100%" in drawn[-1]
