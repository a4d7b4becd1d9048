"""Tables of the documentation that tools write between two comments, `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

import re
from pathlib import Path


def with_table(text: str, name: str, table: str) -> str:
    """A document with a table between its comments, wherever it has them; the first may say how to make the table."""
    parts = re.split(rf"(<!-- {name}:(?:begin[^\n]*|end) -->\n)", text)
    for place in range(2, len(parts) - 2, 4):  # between a begin and its end
        parts[place] = f"\n{table}\n\n"
    return "".join(parts)


def write_table(page: Path, name: str, table: str) -> None:
    """Write a table into a page.

    Raises:
        SystemExit: The page lacks the comments.
    """
    text = page.read_text(encoding="utf-8")
    if not all(f"<!-- {name}:{end} -->\n" in text for end in ("begin", "end")):
        raise SystemExit(f"{page} lacks the comments <!-- {name}:begin --> and <!-- {name}:end -->")
    page.write_text(with_table(text, name, table), encoding="utf-8")
