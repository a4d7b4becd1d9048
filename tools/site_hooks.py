"""Hooks of the documentation site: the help of every command and the names of the package, as they are now.

A page writes `<!-- help: NAME -->` where the help of `onnxcop NAME` belongs, and `<!-- help: -->` where
that of `onnxcop` itself does. `<!-- other names -->` stands for the public names of the package that the page
does not mention otherwise.
"""

from __future__ import annotations

import html
import re
from types import FunctionType
from typing import Any

from click.testing import CliRunner

import onnxcop
from onnxcop.cli.main import app

_WIDEST = 120  # characters of a line of a signature


def help_text(command: str) -> str:
    """What `onnxcop COMMAND --help` prints."""
    done = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="onnxcop", terminal_width=90)
    if done.exit_code:
        raise SystemExit(f"onnxcop {command} --help failed: {done.output}")
    return done.output.rstrip()


def other_names(markdown: str) -> str:
    """Entries for the public names that a page of the reference leaves out."""
    listed = re.findall(r"^::: [\w.]*?(\w+)$", markdown, re.MULTILINE)
    values = {name: getattr(onnxcop, name) for name in onnxcop.__all__ if name not in listed}
    found = {name: value.__module__ for name, value in values.items() if isinstance(value, type | FunctionType)}
    return "\n\n".join(f"::: {module}.{name}" for name, module in found.items())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help texts and the names in their places."""
    markdown = markdown.replace("<!-- other names -->", other_names(markdown))
    return re.sub(r"<!-- help: ?(.*?) ?-->", lambda found: f"```text\n{help_text(found[1])}\n```", markdown)


def check_signatures(page: str) -> None:
    """Signatures are wrapped where Ruff is installed, and otherwise run out of the page: that is an error."""
    for found in re.finditer(r'<div class="[^"]*doc-signature[^"]*">(.*?)</div>', page, re.DOTALL):
        lines = html.unescape(re.sub("<[^>]+>", "", found[1])).splitlines()
        if max(map(len, lines), default=0) > _WIDEST:
            raise SystemExit(f"a signature is not wrapped (is Ruff installed?): {max(lines, key=len)[:80]}")


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles of reStructuredText out of docstrings, whose names are shown as code anyway."""
    check_signatures(html)
    return re.sub(r":(?:func|class|meth|mod|attr):(?=<code>)", "", html)
