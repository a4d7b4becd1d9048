"""Look-up of named entries in a table, and the error that lists them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from onnxcop.errors import BudgetError, OnnxcopError


class Named(Protocol):
    """An entry of a table."""

    @property
    def name(self) -> str:
        """The entry's name."""
        ...


N = TypeVar("N", bound=Named)


def entry_named(name: str, entries: Iterable[N], what: str) -> N:
    """Look an entry up by name.

    Raises:
        BudgetError: There is none; the message lists all names.
    """
    known = {entry.name: entry for entry in entries}
    check_known(name, known, what)
    return known[name]


def check_known(name: str, known: Iterable[str], what: str, error: type[OnnxcopError] = BudgetError) -> None:
    """Check that a name exists.

    Raises:
        OnnxcopError: It does not; the message lists all names.
    """
    if name not in known:
        raise unknown(what, name, known, error)


def unknown(what: str, name: str, known: Iterable[str], error: type[OnnxcopError] = BudgetError) -> OnnxcopError:
    """The error for an unknown name."""
    return error(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
