"""The command line: forms and options."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from cli_runs import BARE, CPU, WARNING, lines
from small_models import shapes

from onnxcop._version import __version__
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.cli import framework as cli_form
from onnxcop.cli import main as cli
from onnxcop.cli.arguments import default_output, preprocess_from
from onnxcop.cli.framework import MAIN
from onnxcop.cli.types import FileSize, Fraction, InputShape, Numbers, PreferenceWeights
from onnxcop.criteria.preference import NAMED
from onnxcop.criteria.registry import CRITERIA
from onnxcop.images.preprocess import Preprocess
from onnxcop.images.presets import PRESETS
from onnxcop.pipeline.options import ALLOCATE
from onnxcop.recovery.methods import RECOVERIES

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
def test_default_output_is_beside_the_model(name: str, expected: str) -> None:
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
    for command in COMMANDS:
        assert f"\n  {command} " in text
    flat = " ".join(re.sub(r"-\n +", "-", text).split())
    for name in (*CRITERIA, *NAMED, *PRESETS, *ALLOCATE, *(method.name for method in RECOVERIES)):
        assert name in flat
    assert cli.run([str(model), "--help"]) == 0
    assert capsys.readouterr().out == text


COMMANDS = sorted({*cli.app.commands} - {MAIN})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: onnxcop {command} ")


@pytest.mark.parametrize("command", [MAIN, *COMMANDS])
def test_help_shows_examples_that_parse(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("macs: 0.6\n", encoding="utf-8")
    assert cli.run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    examples = cli.app.commands[command].examples
    assert examples
    for line, purpose in examples:
        assert f"  {purpose}\n    {line}\n" in shown
        assert len(line) < 80
        program, *words = shlex.split(line)
        assert program == "onnxcop"
        named = words[0] if words[0] in COMMANDS else MAIN
        with cli.app.commands[named].make_context(named, words[named != MAIN :], parent=click.Context(cli.app)):
            pass


def test_version_through_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "onnxcop", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"onnxcop {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from onnxcop.cli.main import run; run(['--help']);"
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
        (FileSize(), "5MB", 5_000_000),
        (FileSize(), "5 mb", 5_000_000),
        (FileSize(), "5MiB", 5 * 2**20),
        (FileSize(), "1.5k", 1500),
        (FileSize(), "700", 700),
        (FileSize(), "2GB", 2_000_000_000),
        (InputShape(), "x:1,3,224,224", ("x", (1, 3, 224, 224))),
        (InputShape(), "x:1x3x8x8", ("x", (1, 3, 8, 8))),
        (InputShape(), "in:0:7", ("in:0", (7,))),
        (Numbers(), "0.485,0.456,0.406", (0.485, 0.456, 0.406)),
        (Numbers(), "127.5", (127.5,)),
        (PreferenceWeights(), "faster", NAMED["faster"]),
        (PreferenceWeights(), "2,0.5", (2.0, 0.5)),
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
        (FileSize(), "0"),
        (FileSize(), "-5MB"),
        (FileSize(), "5XB"),
        (FileSize(), "MB"),
        (InputShape(), "1,3,224,224"),
        (InputShape(), "x:"),
        (InputShape(), "x:1,-3"),
        (InputShape(), "x:N,3"),
        (Numbers(), "a,b"),
        (PreferenceWeights(), "cheaper"),
        (PreferenceWeights(), "1,2,3"),
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
        ["merge-stats", "out.npz", "a.npz"],
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
        (["a.onnx", "--ratio=0.5"], "budgets say what to keep: --macs 0.7"),
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
        (["--prefer", "faster"], {"beta": NAMED["faster"][0], "gamma": 0.0}),
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
        "exact_only": True, "layers": [], "staircase": {"fine": 4, "block": 8}, "blocks": False,
    }  # fmt: skip


def test_preprocessing_from_options() -> None:
    names = ("preprocess", "mean", "std", "scale", "layout", "channels", "resize", "interpolation")
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


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--speedup", "1.25"], "for a speed-up 1.25 measured on this machine give --latency 0.8, or --macs 0.8"),
        (["--speedup=2x"], "for a speed-up 2x measured on this machine give --latency 0.5"),
        (["--speed-up"], "for a speed-up measured on this machine give --latency 0.8"),
    ],
)
def test_a_speed_up_is_answered_with_a_share_of_the_time(
    arguments: list[str], answer: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([str(model), *arguments]) == 2
    assert answer in " ".join(capsys.readouterr().err.split())


def test_the_last_line_gives_times_of_phases_and_sizes_may_be_shares(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([str(model), "--size", "60%", *BARE]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    phases = r"\(analysis [\d.]+, .*selection [\d.]+, rewriting [\d.]+.*\)"
    assert re.search(r"wrote \S+ in [\d.]+ s on CPUExecutionProvider " + phases, last), last
