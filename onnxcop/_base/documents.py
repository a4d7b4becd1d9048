"""JSON files that this package writes and reads back: their kind and version, and fields of the right type."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcop.errors import PlanMismatchError


@dataclass(frozen=True, slots=True)
class DocumentKind:
    """A kind of file.

    Attributes:
        format: Value of the field `format`.
        version: The version that this release reads and writes, the field `version`.
        noun: Name of the kind in messages.
        again: How to make the file again, for messages.
    """

    format: str
    version: int
    noun: str
    again: str

    def load(self, path: str | Path) -> Any:
        """The content of a file.

        Raises:
            PlanMismatchError: The file is missing or is not JSON.
        """
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanMismatchError(f"{path} cannot be read: {error.strerror or error}; {self.again}") from None
        except (ValueError, RecursionError) as error:
            raise PlanMismatchError(
                f"{path} is not a {self.noun}: it holds no valid JSON ({error}); {self.again}"
            ) from None

    @contextmanager
    def fields(self, document: Any, source: str | Path) -> Iterator[dict[str, Any]]:
        """Turn errors while the fields of a file are read into one message about the file.

        Raises:
            PlanMismatchError: It is of another kind or version, or a field is missing or of the wrong type.
        """
        if not isinstance(document, dict) or document.get("format") != self.format:
            raise PlanMismatchError(f"{source} is not a {self.noun}; {self.again}")
        if document.get("version") != self.version:
            raise PlanMismatchError(
                f"{source} is a {self.noun} of version {document.get('version')!r}, this release reads {self.version}; "
                f"{self.again}"
            )
        try:
            yield document
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise PlanMismatchError(f"{source} is a damaged {self.noun}: {what}; {self.again}") from None


def json_table(path: Path, largest: int | None = None) -> dict[str, Any] | None:
    """The table in a JSON file of another program.

    Returns:
        None if there is no such file, if it cannot be read or holds something else, or if it is of more than `largest`
        bytes.
    """
    try:
        if largest is not None and path.stat().st_size > largest:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def table_in(value: Any) -> dict[str, Any]:
    """A table of names and values."""
    if not isinstance(value, dict):
        raise TypeError(f"{_short(value)} is not a table of names and values")
    return value


def list_in(value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise TypeError(f"{_short(value)} is not a list")
    return value


def text_in(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{_short(value)} is not text")
    return value


def whole_in(value: Any) -> int:
    """A whole number of at least 0; JSON has one kind of number, and Python accepts a boolean as one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{_short(value)} is not a whole number of at least 0")
    return value


def wholes_in(value: Any) -> tuple[int, ...]:
    """A list of whole numbers of at least 0."""
    return tuple(map(whole_in, list_in(value)))


def time_in(value: Any, *, zero: bool = False) -> float:
    """A time, or a ratio of two; 0 only if allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{_short(value)} is not a time")
    if value == 0 and not zero:
        raise ValueError("0 is not a time")
    return float(value)


def _short(value: Any) -> str:
    return repr(value)[:40]
