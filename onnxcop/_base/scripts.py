"""Scripts of the user: imports from their own folder, and the exceptions that they raise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Allow imports from a folder during the block, as if a script in it had been started."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def cause_of(error: BaseException) -> str:
    """The exception of a script in one line; also for `sys.exit`, which would otherwise end the run."""
    text = " ".join(str(error).split())[:200]
    return f"it called sys.exit({text})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
