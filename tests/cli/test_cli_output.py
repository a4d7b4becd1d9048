"""The output of the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import BARE, CPU, lines
from small_models import chain, shapes, written

from onnxcop._base import progress, whole_run
from onnxcop._base.progress import ProgressBars
from onnxcop._base.whole_run import WholeRun
from onnxcop._version import __version__
from onnxcop.cli import console
from onnxcop.cli import main as cli
from onnxcop.pipeline import prune as pipeline


def test_json_is_one_object(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(model), "--json", *BARE]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    out = model.with_name("net.pruned.onnx")
    assert document["output"] == str(out)
    assert document["after"]["bytes"] == out.stat().st_size
    assert document["before"]["bytes"] == model.stat().st_size
    assert document["kept"]["macs"] <= 0.7
    assert document["verification"]["exact_units"] > 0


def test_json_holds_what_json_can_hold(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_json("test", {"path": Path("a"), "far": float("inf"), "deep": [{"not": float("nan")}]})
    found = json.loads(capsys.readouterr().out)
    assert found == {"path": "a", "far": None, "deep": [{"not": None}]} | {key: found[key] for key in list(found)[:3]}
    assert (found["format"], found["version"], found["onnxcop"]) == ("onnxcop-test", 1, __version__)


def test_the_summary_describes_the_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = model.with_name("x.npz")
    np.savez(data, x=np.random.default_rng(0).random((24, 3, 8, 8), np.float32))
    assert cli.run([str(model), *CPU, "--data", str(data), "--allocate", "cop", "--recover", "merge"]) == 0
    shown = lines(capsys.readouterr().out)
    starts = (f"{model}: 29 filters, 82.8% prunable, in 2 groups", "frozen: 5 of 29 filters",
              "calibrated on 24 of 24 samples", "  x [3, 8, 8] from ", "cut ", "verified: ", "wrote ")  # fmt: skip
    places = [next(place for place, line in enumerate(shown) if line.startswith(start)) for start in starts]
    assert places == sorted(places)
    assert any(line.split()[0] == "divergence" for line in shown)
    assert len(shown) < 24


def test_long_names_are_shortened_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = chain()
    for node in net.graph.node:
        node.name = f"{'a_scope/of_a_scope;' * 20}{node.name}"
    assert cli.run([str(written(net, tmp_path / "net.onnx")), *BARE]) == 0
    (line,) = (line for line in lines(capsys.readouterr().out) if "→" in line)
    assert len(line) < 120


def test_quiet_says_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = model.with_name("x.npz")
    np.savez(data, x=np.random.default_rng(0).random((4, 3, 8, 8), np.float32))
    options = ["--data", str(data), "--macs", "1", "--criterion", "l1", "--recover", "none", "--latency-seconds", "0"]
    assert cli.run([str(model), "-q", *options]) == 0  # the provider auto says what it chose, else
    assert capsys.readouterr() == ("", "")


def test_the_summary_counts_what_the_file_holds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.onnx")
    assert cli.run([str(model), "-o", str(out), *BARE]) == 0
    rows = {line.split()[0]: line.split() for line in lines(capsys.readouterr().out)}
    before, after = shapes(onnx.load(model)), shapes(onnx.load(out))
    assert rows["filters"][1:3] == [
        str(sum(found[name][0] for name in ("w1", "w2", "w3"))) for found in (before, after)
    ]
    assert rows["parameters"][1:3] == [
        str(sum(int(np.prod(shape)) for shape in found.values())) for found in (before, after)
    ]


def test_the_summary_fits_one_screen(models_dir: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    source = models_dir / "digits_resnet.onnx"
    assert cli.run([str(source), "-o", str(tmp_path / "o.onnx"), *BARE]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 20
    assert cli.run([str(source), "-o", str(tmp_path / "o.onnx"), "-v", *BARE]) == 0
    longer = capsys.readouterr().out
    assert "/blocks/blocks.0/conv1/Conv" in longer
    assert "verification" in longer


def test_colour_only_on_terminals(model: Path) -> None:
    command = [sys.executable, "-m", "onnxcop", str(model), "-o", str(model.parent / "o.onnx")]
    plain = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    assert "\x1b" not in done.stdout + done.stderr
    missing = [*command[:3], "missing.onnx"]
    assert terminal_output(missing, plain).count("\x1b[") >= 1
    assert "\x1b[" not in terminal_output(missing, {**plain, "NO_COLOR": "1"})


def terminal_output(command: list[str], environment: dict[str, str]) -> str:
    """What a program writes to a terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    main, child = pty.openpty()
    with subprocess.Popen(command, stdout=child, stderr=child, stdin=child, env=environment) as process:
        os.close(child)
        chunks = []
        while True:
            try:
                chunk = os.read(main, 4096)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        process.wait()
    os.close(main)
    return b"".join(chunks).decode()


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = chain()
    model.graph.node[0].name = "net[0]/[red]a:smile:b"
    path = written(model, tmp_path / "net.onnx")
    assert cli.run(["inspect", str(path), *CPU]) == 0
    assert "net[0]/[red]a:smile:b" in capsys.readouterr().out


def test_any_encoding_will_do(tmp_path: Path) -> None:
    model = chain()
    model.graph.node[0].name = "convé→"
    path = written(model, tmp_path / "net.onnx")
    done = subprocess.run(
        [sys.executable, "-m", "onnxcop", "inspect", str(path)], capture_output=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert b"conv" in done.stdout


def test_log_lines_are_on_standard_error(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline.prune_with

    def prune(*arguments: Any, **settings: Any) -> pipeline.PruneResult:
        console.log.info("a line")
        console.log.debug("a detail")
        console.log.warning("a warning")
        return original(*arguments, **settings)

    monkeypatch.setattr(pipeline, "prune_with", prune)
    for flags, expected in (
        ([], ["a line", "warning: a warning"]),
        (["-q"], ["warning: a warning"]),
        (["--json"], ["a line", "warning: a warning"]),
    ):
        assert cli.run([str(model), *BARE, *flags]) == 0
        shown = capsys.readouterr()
        assert lines(shown.err) == expected
        assert "a line" not in shown.out
    assert cli.run([str(model), *BARE, "--debug"]) == 0
    assert "a detail" in lines(capsys.readouterr().err)


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as told:
        for done in range(3):
            told("a step", done, 3)
    assert capsys.readouterr() == ("", "")


def test_long_steps_leave_a_line_off_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 3.0, 70.0, 80.0, 140.0, 141.0, 142.0, 203.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", logger="onnxcop"), ProgressBars() as told:
        for done in range(1, 5):
            told("curves", done, 4)  # at 3, 70, 80 and 140 s
        told("short", 1, 2)
        told("short", 2, 2)
        told("endless", 9)  # at 203 s
    assert caplog.messages == ["curves: 50% after 70 s", "curves: done in 140 s", "endless: 9 after 61 s"]


@pytest.mark.parametrize("asked", ["", "--quiet", "--json"])
def test_a_run_without_a_terminal_says_what_took_its_time(
    asked: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_WORTH", 0.0)
    assert (
        cli.run([str(model), "-o", str(model.parent / "o.onnx"), *CPU, "--latency-seconds", "0", *asked.split()]) == 0
    )
    shown = capsys.readouterr()
    assert "done in" not in shown.out
    assert ("statistics (fit): done in 0 s" in shown.err) == (not asked)


def test_progress_appears_on_a_terminal() -> None:
    script = (
        "import time; from onnxcop._base.progress import ProgressBars\n"
        "with ProgressBars() as progress:\n"
        "    progress('short', 1, 2)\n"
        "    progress('long', 1, 4)\n"
        "    time.sleep(1.1)\n"
        "    progress('long', 2, 4)\n"
        "    time.sleep(0.3)\n"
    )
    shown = terminal_output([sys.executable, "-c", script], {**os.environ, "TERM": "xterm"})
    assert "long" in shown
    assert "50%" in shown
    assert "short" not in shown


def test_log_lines_are_above_the_bar_which_disappears_when_finished() -> None:
    script = (
        "import logging, time\n"
        "from onnxcop.cli.console import logging_to_stderr\n"
        "from onnxcop._base.progress import ProgressBars\n"
        "with logging_to_stderr(), ProgressBars() as progress:\n"
        "    progress('first', 1, 4)\n"
        "    time.sleep(1.1)\n"
        "    progress('first', 2, 4)\n"
        "    logging.getLogger('onnxcop').info('a line of its own')\n"
        "    progress('first', 4, 4)\n"
        "    progress('second', 1, 2)\n"
        "    time.sleep(1.1)\n"
        "    progress('second', 1, 2)\n"
        "    time.sleep(0.3)\n"
    )
    shown = terminal_output([sys.executable, "-c", script], {**os.environ, "TERM": "xterm"})
    assert any(line.endswith("\x1b[2Ka line of its own") for line in shown.replace("\r", "\n").split("\n"))
    assert "first" not in shown[shown.index("second") :]


def test_the_summary_fits_a_narrow_terminal(model: Path) -> None:
    command = [sys.executable, "-m", "onnxcop", str(model), "-o", str(model.parent / "o.onnx"), *CPU]
    command += ["--recover", "none", "--latency-seconds", "0.05"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "60"})
    table = [line for line in done.stdout.splitlines() if line.startswith(" ")]
    assert all(len(line) <= 60 for line in table)
    assert "…" not in done.stdout
    for word in ("filters", "parameters", "file size", "latency"):
        assert any(line.split()[0] == word.split()[0] for line in table if line.strip())


def test_signs_are_spelled_out_if_an_encoding_lacks_them(model: Path) -> None:
    command = [sys.executable, "-m", "onnxcop", str(model), "-o", str(model.parent / "o.onnx"), *BARE]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    text = done.stdout.decode("ascii")
    assert re.search(r"conv[12] \d+->", text)
    assert "?" not in text


def test_a_run_of_rounds_has_one_bar_with_the_time_left() -> None:
    script = (
        "import time; from onnxcop._base.progress import ProgressBars\n"
        "with ProgressBars() as progress:\n"
        "    progress('rounds', 0, 4)\n"
        "    for number in range(1, 5):\n"
        "        progress(f'curves, round {number} of 4', 1, 2)\n"
        "        time.sleep(0.4)\n"
        "        progress('refinement', 1, 1)\n"
        "        progress('rounds', number, 4)\n"
        "        time.sleep(0.2)\n"
    )
    shown = terminal_output([sys.executable, "-c", script], {**os.environ, "TERM": "xterm"})
    assert "round 1 of 4" in shown and "round 3 of 4" in shown and "finishing" in shown
    assert re.search(r"\d s left", shown)
    assert not re.search(r"round 5 of 4", shown)


def test_the_share_of_a_run_never_falls_and_measures_later_rounds_by_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(whole_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = WholeRun()
    assert not run.known
    run.round(0, 2)
    run.step("curves, round 1 of 2", 4, 4)
    assert (run.label, run.left) == ("round 1 of 2, curves", "0 s left")
    first = run.share
    now[0] = 100.0
    run.round(1, 2)
    assert first < run.share == pytest.approx(1 / 2.3)
    now[0] = 150.0
    assert run.share == pytest.approx(1.5 / 2.3)
    assert run.left == "80 s left"
    run.round(2, 2)
    assert run.label == "finishing"
    before = run.share
    run.round(0, 3)  # another search begins
    assert run.label == "round 3 of 5" and run.share == before
