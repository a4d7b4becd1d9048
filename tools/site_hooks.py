"""Hooks of the documentation site: the help of every command, as it is now.

A page writes `<!-- help: NAME -->` where the help of `onnxcop NAME` belongs, and `<!-- help: -->` where
that of `onnxcop` itself does.
"""

from __future__ import annotations

import re
from typing import Any

from click.testing import CliRunner

from onnxcop.cli import app


def help_text(command: str) -> str:
    """What `onnxcop COMMAND --help` prints."""
    done = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="onnxcop", terminal_width=90)
    if done.exit_code:
        raise SystemExit(f"onnxcop {command} --help failed: {done.output}")
    return done.output.rstrip()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help texts in their places."""
    return re.sub(r"<!-- help: ?(.*?) ?-->", lambda found: f"```text\n{help_text(found[1])}\n```", markdown)
