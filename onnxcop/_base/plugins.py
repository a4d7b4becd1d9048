"""Extensions by other packages: entry points, listed without loading anything, and loaded one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

log = logging.getLogger("onnxcop")


@cache
def registered(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, e.g. `onnxcop.criteria`, by name."""
    from importlib.metadata import entry_points  # takes a while to load

    return tuple(sorted(entry_points(group=group), key=lambda entry: entry.name))


def loaded(group: str) -> Iterator[tuple[EntryPoint, object]]:
    """The objects that other packages registered; one that fails to load is named in a warning and skipped."""
    for entry in registered(group):
        try:
            yield entry, entry.load()
        except Exception as error:  # a foreign module may raise anything
            skipped(entry, f"{type(error).__name__}: {error}")


def skipped(entry: EntryPoint, reason: str) -> None:
    """Say in one line that an entry point is not used."""
    text = " ".join(reason.split())
    log.warning("skipped %r of %s, an entry point of %s: %s", entry.name, entry.group, _package(entry), text)


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
