"""Total cost of a model, and the reasons that freeze its filters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import census, prunable_share
from onnxcop.analysis.cost import stored_tensors
from onnxcop.graph.serialize import file_size


@dataclass(frozen=True, slots=True)
class Totals:
    """Cost of a model, of one sample.

    Attributes:
        macs: Multiply-accumulates.
        params: Weights stored.
        bytes: Size of the serialized model.
    """

    macs: float
    params: int
    bytes: int


def totals(model: onnx.ModelProto, macs: float) -> Totals:
    """Count a model's stored weights and bytes."""
    params = sum(int(np.prod(dims, dtype=np.int64)) for _, dims, _, is_weight in stored_tensors(model) if is_weight)
    return Totals(macs, params, file_size(model))


def frozen_reasons(analysis: Analysis) -> tuple[int, float, dict[str, int]]:
    """Number of filters, the prunable fraction, and frozen filters by reason."""
    layers = census(analysis)
    reasons: Counter[str] = Counter()
    for entry in layers:
        reasons.update({str(reason): count for reason, count in entry.reasons.items()})
    return sum(entry.filters for entry in layers), prunable_share(layers), dict(reasons.most_common())
