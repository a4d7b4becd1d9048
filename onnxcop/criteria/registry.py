"""Criteria by name."""

from __future__ import annotations

from dataclasses import replace

from onnxcop.criteria.base import Criterion, GeometricMedian, Norm, Random, Wanda
from onnxcop.criteria.cop import Cop
from onnxcop.criteria.cop_paper import CopPaper
from onnxcop.criteria.multiple_correlation import Multiple
from onnxcop.errors import BudgetError

CRITERIA: dict[str, Criterion] = {
    entry.name: entry
    for entry in (
        Cop(), CopPaper(), Cop("cop-activation"), Multiple(), Norm("l1", 1), Norm("l2", 2), GeometricMedian(), Wanda(),
        Random(),
    )
}  # fmt: skip


def criterion_named(name: str, **parameters: object) -> Criterion:
    """Look a criterion up, with some of its parameters changed.

    Raises:
        BudgetError: No criterion has this name.
    """
    found = CRITERIA.get(name)
    if found is None:
        raise BudgetError(f"no criterion is called {name!r}; choose one of {', '.join(CRITERIA)}")
    if parameters and isinstance(found, Cop):
        return replace(found, **parameters)  # type: ignore[arg-type]
    return found
