"""Tables on the terminal: the console, columns, and the format of numbers.

Colour is used on a terminal only, and not if NO_COLOR is set. Rich is imported when something is drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 100  # columns, if the output is not a terminal


def terminal(*, error: bool = False) -> Console:
    """Standard output or standard error, as wide as the terminal."""
    from rich.console import Console

    file = sys.stderr if error else sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    # Names of nodes contain brackets and colons, which are not markup here.
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def new_table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """A table whose first `left` columns hold text, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        text = place < left
        table.add_column(
            column, justify="left" if text else "right", no_wrap=not text,
            overflow="fold" if text else "ellipsis",
        )  # fmt: skip
    return table


def listed_names(names: Sequence[str], most: int) -> str:
    """Names, one per line, at most `most` of them."""
    more = [f"  … {len(names) - most} more"] if len(names) > most else []
    return "\n".join([names[0], *(f"  + {name}" for name in names[1:most]), *more])


def counted(value: float) -> str:
    """A number with three or four digits and a prefix."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.2f} {unit}"
    return f"{value:.0f}"


def sized(value: float) -> str:
    """Bytes with a unit."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float, spread: float | None = None) -> str:
    """Seconds with a unit, "12.3 ms", and with their spread, "12.3 ms ±0.4"."""
    scale, unit = next((entry for entry in ((1.0, "s"), (1e3, "ms")) if seconds * entry[0] >= 1), (1e6, "µs"))
    value = seconds * scale
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}" + ("" if spread is None else f" ±{spread * scale:.{digits}f}")


def percent(new: float, old: float) -> str:
    """One number as a percentage of another."""
    return f"{new / old:.1%}" if old else "-"


def plural(number: int, noun: str) -> str:
    """A number of things: 1 layer, 2 layers."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def shortened(name: str, room: int) -> str:
    """The end of a name that is too long; the end distinguishes layers."""
    return name if len(name) <= room else f"…{name[len(name) - room + 1 :]}"
