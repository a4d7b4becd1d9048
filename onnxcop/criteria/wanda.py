"""Outgoing weights times activations: the baseline `wanda`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop.analysis.layers import layer_weights
from onnxcop.criteria.base import PruningContext, Ranking, StaticRanking
from onnxcop.criteria.filters import produced_norms
from onnxcop.errors import CalibrationError

SUMMARIES = {"wanda": "outgoing weights times the size of activations (needs data)"}


@dataclass(frozen=True)
class Wanda:
    """Outgoing weights times the size of their inputs: Σ|W_i| · √E[x_i²], over the layer's mean.

    Source: after M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    2024, who score single weights by |w| · ‖x‖. Layers that read the same channels share the mean. Units
    that only layers without statistics read are scored by the norm of their filters.
    """

    name: str = "wanda"
    needs_stats: bool = True

    def rank(self, context: PruningContext) -> Ranking:
        """Score by weights times activations."""
        if context.stats is None:
            raise CalibrationError("criterion wanda needs calibration data; give --data")
        count = len(context.structure.unit_class)
        total, seen = np.zeros(count), np.zeros(count)
        for layer in context.layers:
            weights = layer_weights(context.weights, layer)
            moments = context.stats.moments(layer)
            if weights is None or moments is None:
                continue
            flow = np.sqrt(np.maximum(np.diag(moments.second), 0))
            outgoing = np.tile(np.abs(weights).sum(axis=(1, 2)), layer.groups)
            scores = outgoing * flow
            scores = scores / max(float(scores.mean()), np.finfo(np.float64).tiny)
            live = layer.units >= 0
            np.add.at(total, layer.units[live], scores[live])
            np.add.at(seen, layer.units[live], 1)
        unseen = produced_norms(context)  # units that no layer with statistics reads
        return StaticRanking(np.divide(total, seen, out=unseen, where=seen > 0))

    def parameters(self) -> dict[str, Any]:
        """No parameters."""
        return {}


CRITERIA = (Wanda(),)
