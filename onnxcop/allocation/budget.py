"""Budgets: how much of each resource to keep at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxcop.allocation.resources import RESOURCES, resource


class Budget:
    """Upper bounds on resources; all given bounds hold together.

    Args:
        bounds: Largest amount to keep, by name of a resource (see :data:`onnxcop.allocation.resources.RESOURCES`):
            `macs`, `params` and `filters` as a fraction, `0.7` or `"70%"`; `size` likewise, or in bytes, as `"5MB"`.

    Raises:
        BudgetError: A bound is not a fraction or size, or its resource does not exist.
    """

    __slots__ = ("bounds",)
    bounds: Mapping[str, float]
    """The bounds that are given, by name."""

    def __init__(self, **bounds: float | str | None) -> None:
        given = {name: resource(name).read(value) for name, value in bounds.items() if value is not None}
        object.__setattr__(self, "bounds", MappingProxyType(given))

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __getattr__(self, name: str) -> float | None:
        if name not in {entry.name for entry in RESOURCES}:
            raise AttributeError(f"a budget has no bound {name!r}")
        return self.bounds.get(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and dict(self.bounds) == dict(other.bounds)

    def __hash__(self) -> int:
        return hash(frozenset(self.bounds.items()))

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={bound!r}' for name, bound in self.bounds.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _budget, (dict(self.bounds),)

    @property
    def empty(self) -> bool:
        """Whether there are no bounds."""
        return not self.bounds

    @property
    def shares(self) -> dict[str, float]:
        """The bounds that are fractions, by name."""
        return {name: bound for name, bound in self.bounds.items() if resource(name).is_share(bound)}

    def but(self, **bounds: float | str | None) -> Budget:
        """The same with other bounds; None removes a bound."""
        return Budget(**(dict(self.bounds) | bounds))


def _budget(bounds: dict[str, float]) -> Budget:
    return Budget(**bounds)


def round_budgets(budget: Budget, rounds: int) -> list[Budget]:
    """Intermediate budgets that remove the same share of the remaining resources in every round."""
    steps = [
        Budget(**{name: float(bound ** (step / rounds)) for name, bound in budget.shares.items()})
        for step in range(1, rounds)
    ]
    return [step for step in steps if not step.empty] + [budget]


def default_rounds(budget: Budget) -> int:
    """One round for about every fifth of the resources to remove."""
    tightest = min(budget.shares.values(), default=0.7)
    return int(np.clip(np.ceil(np.log(tightest) / np.log(0.83) - 1e-9), 1, 6))
