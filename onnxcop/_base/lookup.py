"""Look-up of named entries in a table, with an error that lists them all, and of values that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, ValuesView
from typing import Generic, Protocol, TypeVar

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


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values that were used last, by key.

    Args:
        most: How many are kept.
        end: Called with a value that is kept no more.
    """

    def __init__(self, most: int, end: Callable[[V], object] | None = None) -> None:
        self._most, self._end = most, end
        self._held: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def values(self) -> ValuesView[V]:
        """All that are kept."""
        return self._held.values()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key; if it is not kept, the one that was not used for longest makes room for it."""
        if key not in self._held:
            while len(self._held) >= self._most:
                _, oldest = self._held.popitem(last=False)
                if self._end is not None:
                    self._end(oldest)
            self._held[key] = make()
        self._held.move_to_end(key)
        return self._held[key]
