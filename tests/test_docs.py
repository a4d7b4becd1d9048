"""The documentation: its examples run, its options exist, its messages are those of the program.

Every Python block of docs/*.md is executed, page by page in one namespace, unless the line before it says
`<!-- not executed: why -->`. Shell blocks after `<!-- executed -->` are run line by line; of the other
lines that call onnxcop at least the options must exist. Blocks after `<!-- tested: NAME -->` are run by other tests,
with files of the names that they use.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from doc_pages import DOCS, FENCE, PAGES, ROOT, Block, blocks, commands

from onnxcop.cli import main as cli
from onnxcop.cli.framework import MAIN


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write into, with `models/` and `tests/` in it."""
    for name in ("models", "tests"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _executed(page: Path) -> list[Block]:
    return [
        block
        for block in blocks(page)
        if (block.language == "python" and not block.note.startswith(("not executed:", "tested:")))
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
            for command in commands(block.body):
                assert cli.run(command) == 0, f"{_name(page)}, line {block.line}: onnxcop {shlex.join(command)}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_options_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("sh", "yaml"):
            for command in commands(block.body.replace("run: ", "")):
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
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for option in re.findall(r"`(?:onnxcop [^`]*?)?(--[a-z][a-z-]+)[^`]*`", text):
            assert option in known or option in ("--package-config",), f"{_name(page)}: {option}"


def _texts() -> list[str]:
    """Every text in the source of the package, what is filled in as an ellipsis."""
    found = []
    for path in sorted((ROOT / "onnxcop").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
    return found


def test_troubleshooting_quotes_real_messages() -> None:
    """The fixed parts of every message that the page explains stand, in this order, in one text of the source."""
    texts = [re.sub(r"%[sd]", "…", text) for text in _texts()]
    headings = re.findall(
        r"^### (`+) ?(.*?) ?\1$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(headings) > 25
    for _, message in headings:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "tools" / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[:-1]:
        assert re.search(rf"[ :]{re.escape(page.relative_to(DOCS).as_posix())}$", navigation, re.MULTILINE), page


def test_the_reference_names_what_exists() -> None:
    """Every entry of the reference is there, and none of the command line's pages is forgotten."""
    for name in re.findall(r"^::: ([\w.]+)$", (DOCS / "reference" / "python.md").read_text("utf-8"), re.MULTILINE):
        path = ROOT / (name.replace(".", "/") + ".py")
        module, _, member = name.rpartition(".")
        source = ROOT / (module.replace(".", "/") + ".py")
        assert path.exists() or re.search(rf"^(class|def) {member}\b", source.read_text("utf-8"), re.MULTILINE), name
    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- help: (\S*) ?-->", text)) | {MAIN} == set(cli.app.commands)


def test_local_links_and_pictures_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{_name(page)}: {target}"
