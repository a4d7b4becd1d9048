#!/usr/bin/env python3
"""Draws what README.md's first command shows on a terminal, as SVG.

    python tools/terminal_picture.py docs/images/first-run.svg

The command is taken from README.md and really run, with a pseudo-terminal for its standard output; progress and
log lines, which go to standard error, are left out. Run it on a quiet machine: the picture holds a latency.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 96
THEME = TerminalTheme(
    (27, 32, 39), (230, 233, 239),
    [(27, 32, 39), (255, 123, 114), (126, 211, 138), (255, 200, 120), (111, 176, 242), (200, 160, 240), (120, 210, 215),
     (230, 233, 239)],
)  # fmt: skip


def command() -> str:
    """The first run of README.md, without the installation."""
    found = re.search(r"<!-- ci:main -->\n```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    if found is None:
        raise SystemExit("README.md has no block after <!-- ci:main -->")
    return found[1].split("&&")[-1].strip()


def output(arguments: list[str]) -> str:
    """Output of a program on a terminal, with its colours."""
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    chunks = []
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=child, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(child)
        while True:
            try:
                chunk = os.read(main, 4096)
            except OSError:  # the other side is closed
                break
            chunks.append(chunk)
    os.close(main)
    if process.returncode:
        raise SystemExit(f"{shlex.join(arguments)} failed; run it to see why")
    return b"".join(chunks).decode().replace("\r\n", "\n")


def picture(typed: str, shown: str) -> str:
    """A terminal with a command and its output, as SVG that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), highlight=False)
    console.print(Text.assemble(("$ ", "bold green"), typed))
    console.print(Text.from_ansi(re.sub(r"[ ]+$", "", shown, flags=re.MULTILINE).strip("\n")))
    drawn = console.export_svg(title="onnxcop", theme=THEME, unique_id="onnxcop")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL).replace("Fira Code", "ui-monospace, Menlo")


def main() -> None:
    """Run and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    target = parser.parse_args().output.resolve()
    typed = command()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(ROOT / "models")
        os.chdir(folder)
        shown = output([sys.executable, "-m", *shlex.split(typed)])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(picture(typed, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
