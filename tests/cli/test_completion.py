"""Shell completion: click's own, for commands and for the main form."""

from __future__ import annotations

import pytest
from click.shell_completion import BashComplete

from onnxcop.cli.main import app


def completions(*words: str) -> dict[str, str]:
    """Completions that bash would offer for the last word, with their kinds."""
    *before, last = words
    complete = BashComplete(app, {}, "onnxcop", "_ONNXCOP_COMPLETE")
    return {item.value: item.type for item in complete.get_completions(before, last)}


def test_commands_and_files_come_first() -> None:
    assert completions("ins") == {"inspect": "plain", "ins": "file"}
    assert {"apply", "compare", "inspect", "verify"} <= set(completions(""))
    assert completions("mod") == {"mod": "file"}


def test_the_first_word_may_be_an_option() -> None:
    assert completions("--mac") == {"--macs": "plain"}
    assert completions("--vers") == {"--version": "plain"}
    assert completions("--hel") == {"--help": "plain"}


@pytest.mark.parametrize("command", [[], ["compare"]])
def test_options_of_a_command(command: list[str]) -> None:
    offered = completions(*command, "model.onnx", "--s")
    assert "--samples" in offered
    assert ("--size" in offered) == (not command)


def test_files_are_completed_for_file_options() -> None:
    assert completions("model.onnx", "-o", "") == {"": "file"}
    assert completions("inspect", "mo") == {"mo": "file"}


def test_choices() -> None:
    assert set(completions("model.onnx", "--recover", "")) == {"auto", "none", "merge", "full"}


@pytest.mark.parametrize(
    ("option", "start", "names"),
    [
        ("--criterion", "cop-a", {"cop-activation"}),
        ("--preprocess", "keras-t", {"keras-tf", "keras-torch"}),
        ("--provider", "c", {"cpu", "cuda", "coreml"}),
        ("--prefer", "", {"balanced", "faster", "smaller"}),
        ("--resize", "", {"crop", "stretch", "letterbox", "pad"}),
    ],
)
def test_names_of_catalogues(option: str, start: str, names: set[str]) -> None:
    assert set(completions("model.onnx", option, start)) == names
    assert completions("model.onnx", "--report", "x") == {"x": "file"}
