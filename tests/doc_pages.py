"""Fenced blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
FENCE = re.compile(
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
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["note"] or "", found["body"], text[: found.start("body")].count("\n"))
        for found in FENCE.finditer(text)
    ]


def commands(body: str) -> Iterator[list[str]]:
    """The arguments of every call of onnxcop in a shell block."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        for is_end, command in groupby(words, lambda word: bool(set(word) <= set(";&|<>()"))):
            if not is_end:
                first, *rest = command
                if first == "onnxcop":
                    yield rest


def body_of(page: str, name: str) -> str:
    """What the block of a page after the comment `tested: NAME` says."""
    (block,) = (block for block in blocks(DOCS / page) if block.note == f"tested: {name}")
    return block.body


def commands_of(page: str, name: str) -> list[list[str]]:
    """The commands of the block of a page after the comment `tested: NAME`."""
    return list(commands(body_of(page, name)))
