"""Hypothesis strategies that the cases share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx
from hypothesis import strategies as st

Shape = tuple[int, ...]
OPSETS = (9, 10, 11, 12, 13, 15, 17, 18, 19, 20, 21)


@functools.cache
def first_version(op: str, domain: str = "") -> int:
    """The opset in which an operator appeared."""
    history = onnx.defs.get_all_schemas_with_history()
    return min(s.since_version for s in history if s.name == op and s.domain == domain)


def opsets(op: str, low: int = 9, high: int = 21) -> st.SearchStrategy[int]:
    """Opsets that have an operator."""
    first = max(low, first_version(op))
    found = [version for version in OPSETS if first <= version <= high]
    return st.sampled_from(found or [first])


def shapes(low: int, high: int, sizes: tuple[int, int] = (2, 5)) -> st.SearchStrategy[Shape]:
    """Shapes of `low` to `high` axes."""
    return st.lists(st.integers(*sizes), min_size=low, max_size=high).map(tuple)


def some_axes(shape: Sequence[int]) -> st.SearchStrategy[Shape]:
    """A non-empty choice of the axes that are longer than one, ascending."""
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    return st.lists(st.sampled_from(wide), min_size=1, unique=True).map(lambda axes: tuple(sorted(axes)))


def either_sign(axis: int, rank: int) -> st.SearchStrategy[int]:
    """An axis counted from the front or from the back."""
    return st.sampled_from([axis, axis - rank])


def total(shape: Sequence[int], axes: Sequence[int]) -> int:
    """How many indices the axes have together, those of one index aside."""
    return sum(shape[axis] for axis in set(axes) if shape[axis] > 1)
