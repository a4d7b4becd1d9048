"""Rough cuts: models of about the requested size, made quickly to be timed.

The time of a model does not depend on the values of its weights, so a rough choice of filters suffices.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnxcop._base.types import IntArray
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.greedy import choose
from onnxcop.allocation.limits import Limits
from onnxcop.analysis.analyze import Analysis
from onnxcop.criteria.base import PruningContext
from onnxcop.criteria.registry import criterion_named
from onnxcop.rewrite.apply import apply


def rough_choice(analysis: Analysis, budget: Budget, limits: Limits) -> IntArray:
    """The units, int64, that the norms of the weights remove for a budget; good enough for timing.

    Raises:
        BudgetError: The budget cannot be met.
    """
    context = PruningContext.of(analysis.model, analysis.structure, analysis.cost)
    return choose(context, criterion_named("l2").rank(context), budget, limits).removed


def without(analysis: Analysis, removed: IntArray) -> onnx.ModelProto:
    """The analysed model without some of its units."""
    return apply(analysis.model, analysis.structure, np.sort(removed))
