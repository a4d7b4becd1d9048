"""The prose of README and docs/: sentences average at most twenty words, and none has more than forty."""

from __future__ import annotations

import re

from conftest import REPO_ROOT

PAGES = [REPO_ROOT / "README.md", REPO_ROOT / "CONTRIBUTING.md", *sorted((REPO_ROOT / "docs").rglob("*.md"))]
_FEWEST = 3  # words: shorter pieces are headings of lists


def sentences(text: str) -> list[str]:
    """The sentences of a page of Markdown, without code, tables, headings and images; code in a line is one word."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\.)\s)|\n(?=#)", text):
        if block.startswith("    ") or block.strip().startswith(("|", "#", "![", ":::", "---")):
            continue
        plain = re.sub(r"^\s*([-*]|\d+\.)\s+", "", block)
        plain = re.sub(r"`[^`]*`", "X", plain)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        found += re.split(r"(?<=[.!?])[\"')]?\s+(?=[A-Z\"'(])", " ".join(plain.replace("*", "").split()))
    return [sentence for sentence in found if words(sentence) >= _FEWEST]


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def test_sentences_are_split() -> None:
    page = "# Title\n\nOne two three. `a b c` four five!\n\n- six seven eight\n\n```sh\nno sentence at all\n```\n"
    assert sentences(page) == ["One two three.", "X four five!", "six seven eight"]


def test_sentences_are_short() -> None:
    found = {page.name: sentences(page.read_text(encoding="utf-8")) for page in PAGES}
    long = [(name, sentence) for name, listed in found.items() for sentence in listed if words(sentence) > 40]
    assert not long
    lengths = [words(sentence) for listed in found.values() for sentence in listed]
    assert len(lengths) > 500
    assert sum(lengths) / len(lengths) <= 20
