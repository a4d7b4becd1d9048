"""Shares and sizes as people write them: `0.7`, `70%`, `5MB`."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def share(value: object, *, zero: bool = False) -> float:
    """A fraction above 0 (from 0 with `zero`) and at most 1, from a number or a text such as `70%`.

    Raises:
        ValueError: It is not such a fraction; the message says what to write.
    """
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a fraction; write 0.7 or 70%") from None
    if isinstance(value, bool) or not (0 < number <= 1 or (zero and number == 0)):
        hint = f"; for {number:g} percent write {number:g}%" if 1 < number <= 100 and "%" not in text else ""
        raise ValueError(f"{text} is not {'from 0' if zero else 'above 0'} and at most 1 (or 100%){hint}")
    return number


def size_in_bytes(value: object) -> int:
    """Bytes, from a number or a text with a unit: `5MB` (10^6), `5MiB` (2^20), `700k`.

    See :func:`size_or_share` for shares such as `50%`.

    Raises:
        ValueError: It is not a size of at least a byte; the message says what to write.
    """
    if isinstance(value, float) and value >= 1:
        value = int(value)
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"{str(value)!r} is not a size; write 5MB, 5MiB or a number of bytes")
    number, prefix, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if size < 1:
        raise ValueError(f"{str(value)!r} is less than a byte; write e.g. 5MB")
    return size


def size_or_share(value: object) -> float:
    """Bytes above 1, or a share of the original at most 1: `5MB`, `50%`, `0.5`.

    Raises:
        ValueError: It is neither; the message says what to write.
    """
    if str(value).strip().endswith("%") or (isinstance(value, float) and 0 < value < 1):
        return share(value)
    return size_in_bytes(value)
