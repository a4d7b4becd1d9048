"""Building blocks of the JSON output: numbers that JSON can hold, and files with their hashes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JSON_VERSION = 1  # changes if a field is removed or changes its meaning, not if one is added


def finite(value: Any) -> Any:
    """The same value, with None for infinite or undefined numbers, which JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def file_record(path: Path) -> dict[str, Any]:
    """The record of a file: path, size and SHA-256; for a folder, those of its listing.

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
