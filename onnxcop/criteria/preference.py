"""Preferences between savings: COP's β and γ, for criteria and for measured allocation alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxcop.errors import BudgetError

NAMED = {"balanced": (1.0, 1.0), "faster": (3.0, 0.0), "smaller": (0.0, 3.0)}


@dataclass(frozen=True, slots=True)
class Preference:
    """Weights of arithmetic and of parameters, beside a weight of 1 for accuracy and the budget.

    Attributes:
        beta: Weight of multiply-accumulates.
        gamma: Weight of parameters.
    """

    beta: float
    gamma: float

    def __post_init__(self) -> None:
        if not (0 <= self.beta < float("inf") and 0 <= self.gamma < float("inf")):
            raise BudgetError(f"--prefer takes weights of at least 0, not {self.beta:g},{self.gamma:g}")

    @classmethod
    def of(cls, value: str | tuple[float, float] | Preference) -> Preference:
        """A preference by name, as `"beta,gamma"`, or as the two numbers.

        Raises:
            BudgetError: It is none of these.
        """
        if isinstance(value, Preference):
            return value
        given = NAMED.get(value, value) if isinstance(value, str) else value
        try:
            beta, gamma = (float(part) for part in (given.split(",") if isinstance(given, str) else given))
        except (TypeError, ValueError):
            known = ", ".join(NAMED)
            raise BudgetError(f"--prefer is one of {known}, or two numbers beta,gamma, not {value!s}") from None
        return cls(beta, gamma)

    @property
    def share(self) -> float:
        """The share of a step's value that the preference decides; the budget decides the rest."""
        return (self.beta + self.gamma) / (1.0 + self.beta + self.gamma)

    def mixed(self, weights: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        """The value of a unit of each resource: the budget's weights mixed with the preferred ones.

        Args:
            weights: By resource, including `macs` and `params`: the budget's weights; only ratios matter.
            totals: Amount of each resource in the original.
        """
        preferred = self.beta + self.gamma
        shares = {name: weight * totals[name] for name, weight in weights.items()}
        total = sum(shares.values())
        if preferred == 0 or total == 0:
            return dict(weights)
        shares = {name: (1.0 - self.share) * part / total for name, part in shares.items()}
        shares["macs"] += self.share * self.beta / preferred
        shares["params"] += self.share * self.gamma / preferred
        return {name: part / max(totals[name], 1e-30) for name, part in shares.items()}
