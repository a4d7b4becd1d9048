"""What a user would rather save: COP's β and γ, for criteria and for measured allocation alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.errors import BudgetError

NAMED = {"balanced": (1.0, 1.0), "faster": (3.0, 0.0), "smaller": (0.0, 3.0)}


@dataclass(frozen=True, slots=True)
class Preference:
    """Weights of arithmetic and of parameters, beside a weight of 1 for accuracy and the budget.

    Attributes:
        beta: Of multiply-accumulates.
        gamma: Of parameters.
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
        """How much of the value of a step the preference decides; the budget decides the rest."""
        return (self.beta + self.gamma) / (1.0 + self.beta + self.gamma)

    def mixed(self, budget: FloatArray, original: FloatArray) -> FloatArray:
        """What a unit of each cost is worth, float64 [3]: the budget's weights mixed with the preferred ones.

        Args:
            budget: float64 [3], what the budget makes of MACs, parameters and bytes; only ratios matter.
            original: float64 [3], the original's costs.
        """
        total = self.beta + self.gamma
        shares = budget * original
        if total == 0 or not shares.any():
            return budget
        shares = (1.0 - self.share) * shares / shares.sum()
        shares[0] += self.share * self.beta / total
        shares[1] += self.share * self.gamma / total
        return np.asarray(shares / original.clip(min=1e-30))
