"""The command line: forms, options, what is shown, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import chain, shapes, written

from onnxcop import __version__, cli, cli_form, conclusion, console, pipeline
from onnxcop.catalogue import CRITERIA, PREFERENCES
from onnxcop.cli_arguments import default_output, preprocess_from
from onnxcop.cli_form import MAIN
from onnxcop.cli_types import Fraction, InputShape, Numbers, Preference, Size
from onnxcop.images import PREPROCESSES, Preprocess
from onnxcop.modes import ALLOCATE, RECOVER
from onnxcop.progress import Progress
from onnxcop.stats import CalibrationStats, Moments

CPU = ["--provider", "cpu", "--threads", "1"]
BARE = [*CPU, "--recover", "none", "--latency-seconds", "0"]  # the quickest run of the main form
WARNING = "warning: no calibration data: "


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return written(chain(), tmp_path / "net.onnx")


@pytest.fixture
def pruned(model: Path) -> tuple[Path, Path, Path]:
    """A model, what was made of it, and the plan."""
    out, plan = model.with_name("small.onnx"), model.with_name("plan.json")
    assert cli.run([str(model), "-o", str(out), "--plan-out", str(plan), "-q", *BARE]) == 0
    return model, out, plan


def lines(text: str) -> list[str]:
    """Lines that say something, but for the warning of every run without data."""
    found = [line for line in text.splitlines() if line.strip()]
    return [line for line in found if not line.startswith(WARNING)]


# Forms


def test_main_form_writes_a_smaller_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.onnx")
    assert cli.run([str(model), "-o", str(out), *BARE]) == 0
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert out.stat().st_size < model.stat().st_size
    shown = capsys.readouterr()
    assert lines(shown.err) == []
    assert shown.err.startswith(WARNING)
    for word in ("filters", "MACs", "parameters", "file size", "masked original", str(out)):
        assert word in shown.out


def test_options_may_come_before_the_model(model: Path) -> None:
    out = model.with_name("out.onnx")
    assert cli.run(["--macs", "90%", "-q", "-o", str(out), *BARE, str(model)]) == 0
    light = model.with_name("light.onnx")
    assert cli.run(["-q", *BARE, str(model), "--macs", "0.4", "-o", str(light)]) == 0
    assert light.stat().st_size < out.stat().st_size < model.stat().st_size


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.onnx", "net.pruned.onnx"),
        ("net", "net.pruned.onnx"),
        ("v1.2.onnx", "v1.2.pruned.onnx"),
        ("v1.2", "v1.2.pruned.onnx"),
        ("a/b/net.pruned.onnx", "a/b/net.pruned.pruned.onnx"),
    ],
)
def test_default_output_lies_beside_the_model(name: str, expected: str) -> None:
    assert default_output(Path(name)) == Path(expected)


def test_without_output_the_input_stays(model: Path) -> None:
    before = model.read_bytes()
    assert cli.run([str(model), "-q", *BARE]) == 0
    assert model.read_bytes() == before
    assert model.with_name("net.pruned.onnx").stat().st_size < len(before)


@pytest.mark.parametrize("spelling", ["net.onnx", "./net.onnx", "link.onnx", "../{}/net.onnx"])
def test_never_writes_over_the_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    monkeypatch.chdir(model.parent)
    Path("link.onnx").symlink_to("net.onnx")
    before = model.read_bytes()
    assert cli.run(["net.onnx", "-o", spelling.format(model.parent.name)]) == 1
    assert "input model itself" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_a_model_named_like_a_command(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    model.rename("inspect")
    assert cli.run(["./inspect", "-q", *BARE]) == 0
    assert Path("inspect.pruned.onnx").is_file()
    assert cli.run(["inspect", "inspect", "--json", *CPU]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "inspect"
    assert cli.run(["--macs", "0.5", "inspect"]) == 2
    assert "./inspect" in capsys.readouterr().err


def test_help_shows_the_main_form_and_lists_the_commands(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: onnxcop MODEL [-o OUT] [OPTIONS]\n")
    for option in cli.app.commands[""].params:
        if isinstance(option, click.Option):
            assert all(name in text for name in option.opts)
    for command in ("inspect", "apply", "compare", "sweep", "verify", "merge-stats"):
        assert f"\n  {command} " in text
    flat = " ".join(text.split())
    for name in (*CRITERIA, *PREFERENCES, *PREPROCESSES, *ALLOCATE, *RECOVER):
        assert name in flat
    assert cli.run([str(model), "--help"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", ["inspect", "apply", "compare", "sweep", "verify", "merge-stats"])
def test_commands_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: onnxcop {command} ")


def test_version_through_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "onnxcop", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"onnxcop {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from onnxcop.cli import run; run(['--help']);"
        "print(sorted({'numpy', 'onnx', 'scipy', 'rich', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


# Options


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (Fraction(), "0.7", 0.7),
        (Fraction(), "70%", 0.7),
        (Fraction(), "1", 1.0),
        (Fraction(), "0.5%", 0.005),
        (Fraction(zero=True), "0", 0.0),
        (Size(), "5MB", 5_000_000),
        (Size(), "5 mb", 5_000_000),
        (Size(), "5MiB", 5 * 2**20),
        (Size(), "1.5k", 1500),
        (Size(), "700", 700),
        (Size(), "2GB", 2_000_000_000),
        (InputShape(), "x:1,3,224,224", ("x", (1, 3, 224, 224))),
        (InputShape(), "x:1x3x8x8", ("x", (1, 3, 8, 8))),
        (InputShape(), "in:0:7", ("in:0", (7,))),
        (Numbers(), "0.485,0.456,0.406", (0.485, 0.456, 0.406)),
        (Numbers(), "127.5", (127.5,)),
        (Preference(), "faster", PREFERENCES["faster"]),
        (Preference(), "2,0.5", (2.0, 0.5)),
    ],
)
def test_values_are_read(type_: click.ParamType[Any], text: str, value: Any) -> None:
    assert type_.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (Fraction(), "0"),
        (Fraction(), "-0.5"),
        (Fraction(), "1.5"),
        (Fraction(), "nan"),
        (Fraction(), "half"),
        (Fraction(), "170%"),
        (Size(), "0"),
        (Size(), "-5MB"),
        (Size(), "5XB"),
        (Size(), "MB"),
        (InputShape(), "1,3,224,224"),
        (InputShape(), "x:"),
        (InputShape(), "x:1,-3"),
        (InputShape(), "x:N,3"),
        (Numbers(), "a,b"),
        (Preference(), "cheaper"),
        (Preference(), "1,2,3"),
    ],
)
def test_bad_values_are_refused(type_: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter):
        type_.convert(text, None, None)


def test_a_percentage_without_its_sign_is_explained() -> None:
    with pytest.raises(click.BadParameter, match="70%"):
        Fraction().convert("70", None, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--macs", "2"],
        ["--size", "much"],
        ["--criterion", "best"],
        ["--prefer", "cheaper"],
        ["--policy", "coarse"],
        ["--min-filters", "0"],
        ["--no-such-option"],
        ["a.onnx", "b.onnx"],
        ["a.onnx", "--criterion", "l1", "--alpha", "2"],
        ["a.onnx", "--criterion", "random", "--prefer", "faster"],
        ["a.onnx", "-q", "-v"],
        ["apply", "a.onnx"],
        ["verify", "a.onnx", "b.onnx"],
        ["inspect"],
        ["merge-stats", "out.npz"],
    ],
)
def test_misuse_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Error: " in shown.err
    assert "onnxcop  " not in shown.err  # the main form has no name


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["prune", "a.onnx"], "leave the word out: onnxcop MODEL"),
        (["inpect", "a.onnx"], "did you mean 'inspect'?"),
        (["a.onnx", "--flops", "0.5"], "give --macs 0.7"),
        (["a.onnx", "--ratio=0.5"], "budgets say what stays: --macs 0.7"),
        (["a.onnx", "--out", "b.onnx"], "give -o FILE"),
        (["sweep", "a.onnx", "--dataset", "x"], "give --data PATH"),
        (["inspect", "a.onnx", "--seeed", "1"], "'--seed'"),
    ],
)
def test_what_other_tools_call_it_is_answered(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    assert answer in capsys.readouterr().err


def test_a_file_may_be_called_as_nothing_else_is(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.rename(model.with_name("prune"))
    monkeypatch.chdir(model.parent)
    assert cli.run(["prune", *BARE]) == 0
    assert model.with_name("prune.pruned.onnx").exists()


def test_every_answer_names_an_option_that_is_there() -> None:
    main = cli.app.commands[MAIN]
    options = {name for param in main.params for name in param.opts}
    for theirs, (ours, how) in cli_form._ELSEWHERE.items():
        assert ours in options
        assert theirs not in options
        assert set(re.findall(r"--[\w-]+", how)) <= options


def recorded(arguments: list[str], model: Path) -> dict[str, Any]:
    plan = model.with_name("plan.json")
    out = model.with_name("out.onnx")
    code = cli.run([str(model), "-q", *BARE, "-o", str(out), "--plan-out", str(plan), *arguments])
    assert code == 0
    document = json.loads(plan.read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"name": "cop", "beta": 1.0, "gamma": 1.0}),
        (["--prefer", "faster"], {"beta": PREFERENCES["faster"][0], "gamma": 0.0}),
        (["--prefer", "smaller", "--beta", "0.25"], {"beta": 0.25, "gamma": 3.0}),
        (["--alpha", "2", "--top-k", "5", "--normalization", "l2"],
         {"alpha": 2.0, "top_k": 5, "normalization": "l2"}),
        (["--criterion", "l2"], {"name": "l2"}),
    ],
)  # fmt: skip
def test_criterion_and_its_parameters_are_used(model: Path, arguments: list[str], expected: dict[str, Any]) -> None:
    criterion = recorded(arguments, model)["criterion"]
    assert {key: criterion[key] for key in expected} == expected


def test_budgets_limits_shapes_and_seed_are_used(model: Path) -> None:
    document = recorded(
        ["--params", "80%", "--filters", "0.9", "--size", "9kB", "--seed", "3", "--max-cut", "60%",
         "--min-filters", "2", "--multiple-of", "2", "--exact-only", "--keep", "head", "--only",
         "w*", "--input-shape", "x:2,3,8,8", "--policy", "coarsest"],
        model,
    )  # fmt: skip
    assert document["budget"] == {"params": 0.8, "filters": 0.9, "size": 9000}
    assert document["input_shapes"] == {"x": [2, 3, 8, 8]}
    assert document["policy"] == "coarsest"
    assert document["settings"]["seed"] == 3
    assert document["settings"]["limits"] == {
        "min_filters": 2, "max_cut": 0.6, "multiple_of": 2, "keep": ["head"], "only": ["w*"],
        "exact_only": True,
    }  # fmt: skip


def test_preprocessing_from_options() -> None:
    names = ("preprocess", "mean", "std", "scale", "layout", "channels")
    nothing: dict[str, Any] = dict.fromkeys(names)
    assert preprocess_from(nothing) is None
    assert preprocess_from({**nothing, "preprocess": "imagenet"}) == Preprocess.named("imagenet")
    found = preprocess_from({**nothing, "preprocess": "imagenet", "mean": (0.5,), "layout": "nhwc"})
    assert found is not None
    assert (found.mean, found.layout) == ((0.5,), "nhwc")
    assert found.std == Preprocess.named("imagenet").std


def test_data_and_method_are_used(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, stats = model.with_name("x.npz"), model.with_name("stats.npz")
    np.savez(data, x=np.random.default_rng(0).random((40, 3, 8, 8), np.float32))
    given = ["--data", str(data), "--samples", "24", "--batch-size", "8"]
    document = recorded([*given, "--criterion", "wanda", "--recover", "full", "--stats-out", str(stats)], model)
    assert document["settings"]["samples"] == 24
    assert document["settings"]["recover"] == "full"
    assert CalibrationStats.load(stats).samples == 24
    again = recorded(["--criterion", "wanda", "--stats", str(stats), "--recover", "none"], model)
    assert again["removed"] == document["removed"]
    measured = recorded([*given, "--allocate", "measured", "--recover", "merge"], model)
    assert measured["settings"]["allocate"] == "measured"
    assert capsys.readouterr().out == ""


def test_results_have_names_of_their_own(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(model.parent.iterdir())
    for option in ("--plan-out", "--stats-out"):
        same = str(model.parent / "." / "out.onnx")
        assert cli.run([str(model), "-o", str(model.with_name("out.onnx")), option, same]) == 1
        assert "two results at once" in capsys.readouterr().err
    assert sorted(model.parent.iterdir()) == before


def test_apply_recovers_with_data(pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, out, plan = pruned
    data, again = model.with_name("x.npz"), model.with_name("again.onnx")
    np.savez(data, x=np.random.default_rng(0).random((16, 3, 8, 8), np.float32))
    command = ["apply", str(model), str(plan), "-o", str(again), "--data", str(data), *CPU]
    assert cli.run(command) == 0
    assert "calibrated on 16 of 16 samples" in capsys.readouterr().out
    assert shapes(onnx.load(again)) == shapes(onnx.load(out))
    assert again.read_bytes() != out.read_bytes()


# What is shown


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
    console.show_json({"path": Path("a"), "far": float("inf"), "deep": [{"not": float("nan")}]})
    assert json.loads(capsys.readouterr().out) == {"path": "a", "far": None, "deep": [{"not": None}]}


def test_the_summary_tells_a_story(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_quiet_says_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = model.with_name("x.npz")
    np.savez(data, x=np.random.default_rng(0).random((4, 3, 8, 8), np.float32))
    options = ["--data", str(data), "--criterion", "l1", "--recover", "none", "--latency-seconds", "0"]
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


def test_colour_only_where_wanted(model: Path) -> None:
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


def test_log_lines_go_to_standard_error(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline.prune

    def prune(*arguments: Any, **settings: Any) -> pipeline.PruneResult:
        console.log.info("a line")
        console.log.debug("a detail")
        console.log.warning("a warning")
        return original(*arguments, **settings)

    monkeypatch.setattr(pipeline, "prune", prune)
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
    with Progress() as progress:
        for done in range(3):
            progress("a step", done, 3)
    assert capsys.readouterr() == ("", "")


def test_progress_appears_on_a_terminal() -> None:
    script = (
        "import time; from onnxcop.progress import Progress\n"
        "with Progress() as progress:\n"
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


def test_log_lines_stand_above_the_bar_and_a_finished_one_goes() -> None:
    script = (
        "import logging, time; from onnxcop.console import logging_to_stderr; from onnxcop.progress import Progress\n"
        "with logging_to_stderr(), Progress() as progress:\n"
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


def test_signs_are_spelled_out_where_an_encoding_lacks_them(model: Path) -> None:
    command = [sys.executable, "-m", "onnxcop", str(model), "-o", str(model.parent / "o.onnx"), *BARE]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    text = done.stdout.decode("ascii")
    assert "conv2 16->" in text
    assert "?" not in text


# Exit codes


def test_ctrl_c_exits_with_130_and_writes_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conclusion, "verify", interrupt)
    before = sorted(model.parent.iterdir())
    assert cli.run([str(model), *BARE]) == 130
    assert lines(capsys.readouterr().err) == ["stopped; no file is half written"]
    assert sorted(model.parent.iterdir()) == before


def test_ctrl_c_while_writing_leaves_the_old_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    out = model.with_name("out.onnx")
    out.write_bytes(b"old")
    before = sorted(model.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("onnxcop.writing.os.fsync", interrupt)
        assert cli.run([str(model), "-o", str(out), *BARE]) == 130
        assert cli.run([str(model), "-o", str(out), "--external-data", *BARE]) == 130
    assert out.read_bytes() == b"old"
    assert sorted(model.parent.iterdir()) == before


def test_a_bug_is_one_line_that_asks_for_a_report(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("what\nnow")

    monkeypatch.setattr(conclusion, "verify", fail)
    assert cli.run([str(model), *BARE]) == 1
    shown = lines(capsys.readouterr().err)
    assert len(shown) == 1
    assert "RuntimeError: what now" in shown[0]
    assert "--debug" in shown[0]
    assert cli.run([str(model), *BARE, "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unknown_provider_is_an_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([str(model), "--provider", "abacus"]) == 1
    shown = lines(capsys.readouterr().err)
    assert len(shown) == 1
    assert shown[0].startswith("error: provider 'abacus'")


# Commands


def test_inspect_lists_groups_and_what_is_frozen(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(model), *CPU]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in ("conv1", "conv2", "head", "5 of 5", "graph output", "MACs/filter"):
        assert text in shown.out


def test_inspect_says_what_a_filter_saves(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(model), "--json", *CPU]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["groups"]
    assert (one["layers"], one["readers"], one["width"]) == (["conv1"], ["conv2"], 8)
    assert (two["layers"], two["readers"], two["width"]) == (["conv2"], ["head"], 16)
    assert one["exact"]
    assert one["macs"] == 64 * 9 * (3 + 16)
    assert one["params"] == 3 * 9 + 1 + 16 * 9
    assert two["macs"] == 64 * 9 * 8 + 5
    assert two["params"] == 8 * 9 + 1 + 5
    assert found["filters"] == 8 + 16 + 5
    assert found["prunable"] == pytest.approx(24 / 29)
    (frozen,) = found["frozen_layers"]
    assert (frozen["name"], frozen["filters"], frozen["prunable"]) == ("head", 5, 0)
    assert found["cost"]["macs"] == 64 * 9 * (3 * 8 + 8 * 16) + 16 * 5
    assert one["half_macs"] == 64 * 9 * (3 * 4 + 4 * 16)
    assert one["half_params"] == 4 * (3 * 9 + 1 + 16 * 9)
    assert (two["half_macs"], two["half_params"]) == (8 * two["macs"], 8 * two["params"])
    assert found["halved"]["macs"] == 64 * 9 * (3 * 4 + 4 * 8) + 8 * 5
    assert found["halved"]["params"] == 4 * 3 * 9 + 4 + 8 * 4 * 9 + 8 + 8 * 5 + 2 * 5


def test_inspect_puts_first_what_saves_most(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    source = models_dir / "digits_resnet.onnx"
    assert cli.run(["inspect", str(source), "--json", *CPU]) == 0
    saved = [group["half_macs"] for group in json.loads(capsys.readouterr().out)["groups"]]
    assert saved == sorted(saved, reverse=True)
    assert cli.run(["inspect", str(source), *CPU]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in shown if line.endswith("%")]
    assert len(rows) == len(saved)
    assert max(map(len, shown)) <= 80


def test_long_names_keep_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = chain()
    model.graph.node[0].name = "/".join(f"block{number}" for number in range(20)) + "/the_first"
    path = written(model, tmp_path / "net.onnx")
    assert cli.run(["inspect", str(path), *CPU]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the_first" in line]
    assert "…" in line
    assert len(line.rstrip()) <= 80
    assert model.graph.node[0].name not in line
    assert cli.run(["inspect", str(path), "-v", *CPU]) == 0
    column = "".join(line[:40].strip() for line in capsys.readouterr().out.splitlines())
    assert "block0/block1/" in column


def test_inspect_verbose_names_every_layer(models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = models_dir / "digits_resnet.onnx"
    convolutions = [node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    assert cli.run(["inspect", str(source), "-v", *CPU]) == 0
    shown = capsys.readouterr().out
    assert [name for name in convolutions if name not in shown] == []


def test_apply_repeats_a_run_to_the_byte(pruned: tuple[Path, Path, Path]) -> None:
    model, out, plan = pruned
    again = model.with_name("again.onnx")
    assert cli.run(["apply", str(model), str(plan), "-o", str(again), "-q", *CPU]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_apply_refuses_another_model(pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, _, plan = pruned
    other = written(chain(widths=(8, 12)), plan.with_name("other.onnx"))
    assert cli.run(["apply", str(other), str(plan), *CPU]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "made for another model" in line
    assert not plan.with_name("other.pruned.onnx").exists()


def test_verify_compares_with_the_masked_original(
    pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, plan = map(str, pruned)
    assert cli.run(["verify", model, out, "--plan", plan, "--json", *CPU]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verification"]["max_difference"] <= 1e-4
    assert found["verification"]["exact_units"] == found["removed"] > 0
    assert found["changed"] == []
    assert cli.run(["verify", model, out, "--plan", plan, *CPU]) == 0
    assert "masked original" in capsys.readouterr().out


def test_verify_refuses_changed_weights_unless_told(
    pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    original, out, plan = pruned
    changed = onnx.load(out)
    tensor = next(t for t in changed.graph.initializer if t.name == "w3")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, "w3"))
    written(changed, out)
    command = ["verify", str(original), str(out), "--plan", str(plan), *CPU]
    assert cli.run(command) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "'w3'" in line
    assert cli.run([*command, "--structure-only"]) == 0
    assert "structure only" in capsys.readouterr().out


def test_verify_knows_that_recovery_changes_weights(
    pruned: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    original, out, plan = pruned
    document = json.loads(plan.read_text())
    document["settings"]["recover"] = "merge"
    plan.write_text(json.dumps(document))
    changed = onnx.load(out)
    tensor = next(t for t in changed.graph.initializer if t.name == "b3")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, "b3"))
    written(changed, out)
    assert cli.run(["verify", str(original), str(out), "--plan", str(plan), *CPU]) == 0
    assert "structure only" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--structure-only"]])
def test_verify_refuses_other_shapes(
    pruned: tuple[Path, Path, Path], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    original, _, plan = pruned
    other = written(chain(), plan.with_name("other.onnx"))
    assert cli.run(["verify", str(original), str(other), "--plan", str(plan), *CPU, *flags]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "the plan makes it" in line


def test_merge_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((30, 4)) + 7
    paths = []
    for number, part in enumerate(np.split(data, [5, 17])):
        mean = part.mean(axis=0)
        moments = Moments(len(part), mean, (part - mean).T @ (part - mean))
        paths.append(tmp_path / f"{number}.npz")
        CalibrationStats("a" * 64, len(part), {"t|1|1|1": moments}).save(paths[-1])
    out = tmp_path / "all.npz"
    assert cli.run(["merge-stats", str(out), *map(str, paths)]) == 0
    assert "30 samples" in capsys.readouterr().out
    merged = CalibrationStats.load(out)
    assert merged.samples == 30
    moments = merged.taps["t|1|1|1"]
    np.testing.assert_allclose(moments.mean, data.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(data.T, ddof=0), rtol=1e-9)


def test_merge_stats_refuses_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = Moments(1, np.zeros(1), np.zeros((1, 1)))
    for name in "ab":
        CalibrationStats(name * 64, 1, {"t": moments}).save(tmp_path / f"{name}.npz")
    out = tmp_path / "out.npz"
    assert cli.run(["merge-stats", str(out), str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert "different models" in line
    assert not out.exists()
