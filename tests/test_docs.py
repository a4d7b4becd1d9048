"""The documentation: its examples run, its options exist, its messages are those of the program.

Every Python block of docs/*.md is executed, page by page in one namespace, unless the line before it says
`<!-- not executed: why -->`. Shell blocks after `<!-- executed -->` are run line by line; of the other
lines that call onnxcop at least the options must exist.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from onnxcop import cli
from onnxcop.cli_form import MAIN

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
_FENCE = re.compile(
    r"(?:<!-- (?P<note>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    note: str
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["note"] or "", found["body"], text[: found.start("body")].count("\n"))
        for found in _FENCE.finditer(text)
    ]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write into, in which `models/` stands."""
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _executed(page: Path) -> list[Block]:
    return [
        block
        for block in blocks(page)
        if (block.language == "python" and not block.note.startswith("not executed:"))
        or (block.language == "sh" and block.note == "executed")
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if _executed(page)], ids=_name)
def test_examples_run(page: Path, workplace: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in _executed(page):
        if block.language == "python":
            code = "\n" * block.line + block.body  # so that a failure names the line of the page
            exec(compile(code, str(page), "exec"), names)
        else:
            for command in _commands(block.body):
                assert cli.run(command) == 0, f"{_name(page)}, line {block.line}: onnxcop {shlex.join(command)}"


def _commands(body: str) -> Iterator[list[str]]:
    """The arguments of every call of onnxcop in a shell block."""
    for line in body.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\|", line):
            words = shlex.split(part, comments=True)
            if "onnxcop" in words[:1]:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_options_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("sh", "yaml"):
            for command in _commands(block.body.replace("run: ", "")):
                known = _options(command)
                for word in command:
                    if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
                        assert word.partition("=")[0] in known, f"{_name(page)}, line {block.line}: {word}"


def _options(command: list[str]) -> set[str]:
    named = command[0] if command and command[0] in cli.app.commands else MAIN
    found = {option for param in cli.app.commands[named].params for option in (*param.opts, *param.secondary_opts)}
    return found | {"--help", "-h", *(("--version",) if named == MAIN else ())}


def test_inline_options_exist() -> None:
    """Options that the text names in backticks are options of some command."""
    known = {
        option
        for command in cli.app.commands.values()
        for param in command.params
        if isinstance(param, click.Option)
        for option in (*param.opts, *param.secondary_opts)
    } | {"--help", "--version"}
    for page in (page for page in PAGES if not {"comparison.md", "deploy.md"} & {page.name}):
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for option in re.findall(r"`(?:onnxcop [^`]*?)?(--[a-z][a-z-]+)[^`]*`", text):
            assert option in known or option in ("--package-config",), f"{_name(page)}: {option}"
