"""What the JSON output is made of: numbers that JSON can hold, and files with their hashes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JSON_VERSION = 1  # changes when a field is removed or means something else, not when one is added


def finite(value: Any) -> Any:
    """The same with None for numbers that are infinite or undefined, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def file_record(path: Path) -> dict[str, Any]:
    """A file as the JSON output names it: path, size and SHA-256; of a folder those of its listing.

    The listing of a folder is one line for each file, sorted: its path within the folder, a tab and its size.
    """
    if path.is_dir():
        files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        sizes = [entry.stat().st_size for entry in files]
        lines = [f"{entry.relative_to(path).as_posix()}\t{size}\n" for entry, size in zip(files, sizes, strict=True)]
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        return {"path": str(path), "files": len(files), "bytes": sum(sizes), "listing_sha256": digest}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}
