"""Scripts of the user: what they import from their own folder, and what they raise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported while the block runs, as if a script in it had been started."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def cause_of(error: BaseException) -> str:
    """What a script raised, in a line; `sys.exit` too, which would otherwise end the run."""
    text = " ".join(str(error).split())[:200]
    return f"it called sys.exit({text})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
