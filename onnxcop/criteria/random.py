"""Random scores: the baseline that every criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop.criteria.base import PruningContext, Ranking, StaticRanking

SUMMARIES = {"random": "random scores, the baseline"}


@dataclass(frozen=True)
class Random:
    """Seeded uniform scores, I_i ~ U(0, 1): the baseline every criterion must beat."""

    name: str = "random"
    needs_stats: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Draw scores."""
        rng = np.random.default_rng(context.seed)
        return StaticRanking(rng.random(len(context.structure.unit_class)))

    def parameters(self) -> dict[str, Any]:
        """The seed is recorded by the plan."""
        return {}


CRITERIA = (Random(),)
