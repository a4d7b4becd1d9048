"""Things that have names: finding one in a table, or the error that lists them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from onnxcop.errors import BudgetError, OnnxcopError


class Named(Protocol):
    """An entry of a table."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...


N = TypeVar("N", bound=Named)


def entry_named(name: str, entries: Iterable[N], what: str) -> N:
    """The entry of a name.

    Raises:
        BudgetError: There is none; the message says which there are.
    """
    known = {entry.name: entry for entry in entries}
    check_known(name, known, what)
    return known[name]


def check_known(name: str, known: Iterable[str], what: str, error: type[OnnxcopError] = BudgetError) -> None:
    """See that something of this name exists.

    Raises:
        OnnxcopError: It does not; the message says which there are.
    """
    if name not in known:
        raise unknown(what, name, known, error)


def unknown(what: str, name: str, known: Iterable[str], error: type[OnnxcopError] = BudgetError) -> OnnxcopError:
    """The error for a name that nothing has."""
    return error(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
