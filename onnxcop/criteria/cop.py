"""COP: correlation-based filter pruning, with global normalization and cost regularization.

W. Wang, C. Fu, J. Guo, D. Cai, X. He: "COP: Customized Deep Model Compression via Regularized
Correlation-Based Filter-Level Pruning", IJCAI 2019 (arXiv 1906.10337).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from onnxcop._base.types import Array, BoolArray, FloatArray, IntArray
from onnxcop.analysis.layers import Layer, layer_weights
from onnxcop.criteria.base import PruningContext, Ranking
from onnxcop.criteria.cop_regularization import Regularizer
from onnxcop.errors import CalibrationError

SUMMARIES = {
    "cop": "correlation of outgoing weights, with the price of MACs and parameters",
    "cop-activation": "the same with the correlation of feature maps (needs data)",
}

_DEAD = -1.0  # importance of a channel that has no effect: below every other
_EPSILON = 1e-10  # relative to a layer's largest deviation
_NEARLY_DEAD = 1e-5  # norm of outgoing weights, relative to the layer's largest, of a channel without effect


@dataclass(frozen=True)
class Cop:
    """COP on the outgoing weights ("cop") or on the feature maps ("cop-activation").

    For channels i, j of a layer's input, ρ_ij is the Pearson correlation of their outgoing weights,
    its magnitude averaged over kernel taps, or that of their activations over samples and positions.
    R̃ = R / max R within the layer; s_i is the mean of the `top_k` largest R̃_ij; and the importance is

        I_i = α (1 - s_i) + β (1 - log2 C / max log2 C) + γ (1 - log2 P / max log2 P)

    with C the FLOPs and P the parameters of the layer and the next, at their current widths. The lowest is removed
    first; then it no longer counts as evidence for others. Channels with outgoing weights below 1e-5 of the layer's
    largest, a result of weight decay, are removed before all others and never count as evidence.

    Source: W. Wang et al., "COP: Customized Deep Model Compression via Regularized Correlation-Based
    Filter-Level Pruning", 2019, arXiv 1906.10337; "cop-activation" uses feature maps instead of weights.

    Attributes:
        name: "cop" or "cop-activation".
        alpha: Weight of correlation.
        beta: Preference for removing FLOPs.
        gamma: Preference for removing parameters.
        top_k: Number of largest correlations to average.
        normalization: "max", "l1" or "l2" of a layer's off-diagonal correlations.
        measure: "pearson", "cosine" or "inner" (product), for outgoing weights.
        narrow_correction: Subtract from s_i the level that unrelated vectors of N outputs reach by chance (see
            :func:`chance_level`), so that a layer before a narrow one does not look redundant. The paper does not do
            this.
    """

    name: str = "cop"
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    top_k: int = 3
    normalization: str = "max"
    measure: str = "pearson"
    narrow_correction: bool = True

    @property
    def needs_stats(self) -> bool:
        """The activation variant needs statistics of feature maps."""
        return self.name == "cop-activation"

    def rank(self, context: PruningContext) -> Ranking:
        """Correlate, normalize and regularize.

        Units whose readers are all inside a body of control flow, where nothing can be observed, are compared by
        their outgoing weights even in the activation variant.
        """
        tables, watched = [], np.zeros(len(context.structure.unit_class), dtype=np.bool_)
        unseen = list[Layer]()
        for layer in context.layers:
            if self.needs_stats and not self._is_watched(context, layer):
                unseen.append(layer)
                continue
            table = self._table(context, layer, activations=self.needs_stats)
            if table is not None:
                tables.append(table)
                watched[layer.units[layer.units >= 0]] = True
        for layer in unseen:
            if not watched[layer.units[layer.units >= 0]].any():
                table = self._table(context, layer, activations=False)
                tables += [] if table is None else [table]
        regularizer = Regularizer.of(context)
        return CopRanking(self, tables, regularizer, len(context.structure.unit_class))

    def parameters(self) -> dict[str, Any]:
        """The paper's constants."""
        return {
            "alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "top_k": self.top_k,
            "normalization": self.normalization, "measure": self.measure,
            "narrow_correction": self.narrow_correction,
        }  # fmt: skip

    def _is_watched(self, context: PruningContext, layer: Layer) -> bool:
        """Whether there are statistics of a layer's inputs.

        Raises:
            CalibrationError: There are none at all.
        """
        if context.stats is None:
            raise CalibrationError("criterion cop-activation needs calibration data; give --data")
        return context.stats.moments(layer) is not None

    def _table(self, context: PruningContext, layer: Layer, *, activations: bool) -> ChannelCorrelations | None:
        weights = layer_weights(context.weights, layer)
        if weights is None:
            return None
        dead = nearly_dead(weights)
        units, chance = layer.units[: len(weights)], 0.0
        moments = context.stats.moments(layer) if activations and context.stats is not None else None
        if moments is not None:
            correlation, still = activation_correlation(moments.covariance, layer.groups)
            dead = dead | still
        else:
            correlation = weight_correlation(weights, self.measure)
            if self.narrow_correction and self.measure != "inner":
                chance = self._chance(weights[~dead])
        correlation[dead, :] = correlation[:, dead] = 0.0
        scale = normalizer(correlation, self.normalization)
        return ChannelCorrelations.of(units, correlation / scale, dead, self.top_k, chance / scale)

    def _chance(self, weights: FloatArray) -> float:
        channels, outputs, taps = weights.shape
        return chance_level(outputs - (self.measure == "pearson"), taps, channels - 1, self.top_k)


def nearly_dead(weights: FloatArray) -> BoolArray:
    """Which channels have negligible outgoing weights [channels, outputs, taps], bool [channels]."""
    norms = np.linalg.norm(weights.reshape(len(weights), -1), axis=1)
    return np.asarray(norms <= _NEARLY_DEAD * norms.max(initial=0.0))


def weight_correlation(weights: FloatArray, measure: str = "pearson") -> FloatArray:
    """Mean over taps of |ρ| between outgoing weights (paper, section 3.1).

    Args:
        weights: float64 [channels, outputs, taps].
        measure: "pearson", "cosine" or "inner".

    Returns:
        float64 [channels, channels], zero on the diagonal and for channels with no variation.
    """
    channels, _, taps = weights.shape
    total = np.zeros((channels, channels))
    for tap in range(taps):
        rows = weights[:, :, tap]
        if measure == "pearson":
            rows = rows - rows.mean(axis=1, keepdims=True)
        if measure != "inner":
            size = np.sqrt((rows**2).sum(axis=1))
            live = size > _EPSILON * max(float(size.max(initial=0.0)), np.finfo(np.float64).tiny)
            rows = np.where(live[:, None], rows / np.where(live, size, 1.0)[:, None], 0.0)
        total += np.abs(rows @ rows.T)
    total /= taps
    np.fill_diagonal(total, 0.0)
    return total


def chance_level(freedom: int, taps: int, others: int, top_k: int) -> float:
    """The expected size of a channel's largest correlations if it is independent of all others.

    |cos| of two random directions in d dimensions has the mean Γ(d/2) / (√π Γ((d+1)/2)), about 0.8/√d,
    and its square follows Beta(1/2, (d-1)/2); the mean over taps is taken as the beta distribution with
    the same mean and variance. The `top_k` upper quantiles among `others` draws are averaged.

    Args:
        freedom: Dimensions d: the outputs, less one for Pearson's correlation.
        taps: Kernel taps averaged over.
        others: Number of channels to be correlated with.
        top_k: Number of largest correlations to average.
    """
    from scipy.special import betaincinv

    if freedom < 1 or others < 1 or top_k < 1:
        return 0.0
    if freedom == 1:
        return 1.0
    upper = 1.0 - (np.arange(min(top_k, others)) + 0.5) / others
    if taps == 1:
        return float(np.sqrt(betaincinv(0.5, (freedom - 1) / 2, upper)).mean())
    mean = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) / math.sqrt(math.pi)
    variance = (1.0 / freedom - mean**2) / taps
    both = mean * (1.0 - mean) / variance - 1.0
    return float(betaincinv(mean * both, (1.0 - mean) * both, upper).mean())


def activation_correlation(covariance: FloatArray, groups: int = 1) -> tuple[FloatArray, Array]:
    """|Pearson| of feature maps, averaged over groups, and which channels never vary.

    Args:
        covariance: float64 [channels, channels], over samples and positions.
        groups: Convolution groups; stripe j of all groups is one row of the result.
    """
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    live = deviation > _EPSILON * max(float(deviation.max(initial=0.0)), np.finfo(np.float64).tiny)
    scale = np.where(live, deviation, 1.0)
    rho = np.where(live[:, None] & live[None, :], np.abs(covariance) / scale[:, None] / scale[None, :], 0.0)
    width = len(deviation) // groups
    blocks = [rho[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)]
    result = np.asarray(np.mean(blocks, axis=0))
    np.fill_diagonal(result, 0.0)
    return result, np.logical_not(live.reshape(groups, width).any(axis=0))


def normalizer(correlation: FloatArray, how: str) -> float:
    """A layer's largest correlation, or their mean (l1) or root mean square (l2), off the diagonal."""
    count = max(len(correlation) * (len(correlation) - 1), 1)
    if how == "max":
        scale = float(correlation.max(initial=0.0))
    elif how == "l1":
        scale = float(correlation.sum()) / count
    elif how == "l2":
        scale = float(np.sqrt((correlation**2).sum() / count))
    else:
        raise ValueError(f"unknown normalization {how!r}")
    return scale if scale > 0 else 1.0


@dataclass
class ChannelCorrelations:
    """Normalized correlations of one layer's channels, and the evidence that is left of them.

    The evidence is the mean of a channel's largest correlations, less the `chance` of them.
    """

    units: IntArray
    correlation: FloatArray
    dead: Array
    top_k: int
    chance: float
    evidence: FloatArray
    threshold: FloatArray

    @classmethod
    def of(cls, units: IntArray, correlation: FloatArray, dead: Array, top_k: int, chance: float = 0.0) -> Self:
        """Rank the correlations of every channel."""
        evidence, threshold = np.zeros((2, len(units)))
        table = cls(units, correlation.copy(), dead, top_k=top_k, chance=chance, evidence=evidence, threshold=threshold)
        table._refresh(np.arange(len(units)))
        return table

    def _refresh(self, rows: IntArray) -> None:
        k = min(self.top_k, len(self.units) - 1)
        if k < 1 or not len(rows):
            return
        top = np.partition(self.correlation[rows], -k, axis=1)[:, -k:]
        self.evidence[rows] = top.mean(axis=1) - self.chance
        self.threshold[rows] = top.min(axis=1)

    def remove(self, position: int) -> IntArray:
        """A channel is removed: it is no evidence for its twin any more. Returns the channels affected."""
        column = self.correlation[:, position]
        affected = np.flatnonzero((column >= self.threshold) & (column > 0))
        self.correlation[position, :] = 0.0
        self.correlation[:, position] = 0.0
        self._refresh(affected)
        return affected


@dataclass
class CopRanking:
    """COP's importance while units are removed."""

    criterion: Cop
    tables: list[ChannelCorrelations]
    regularizer: Regularizer
    count: int
    _where: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._evidence, self._seen, dead = np.zeros(self.count), np.zeros(self.count), np.zeros(self.count)
        for number, table in enumerate(self.tables):
            live = table.units >= 0
            np.add.at(self._evidence, table.units[live], table.evidence[live])
            np.add.at(self._seen, table.units[live], 1.0)
            np.add.at(dead, table.units[live], table.dead[live])
            for position, unit in enumerate(table.units.tolist()):
                if unit >= 0:
                    self._where.setdefault(unit, []).append((number, position))
        self._dead = (dead == self._seen) & (self._seen > 0)

    def importance(self, kept: IntArray) -> FloatArray:
        """The paper's I for every unit at the current widths."""
        terms = self.terms(kept)
        total = self.criterion.alpha * terms["correlation"]
        total += self.criterion.beta * terms["flops"] + self.criterion.gamma * terms["params"]
        return np.where(self._dead, _DEAD, total)

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """1 - s, the FLOPs term, the parameters term, and whether a channel is dead."""
        redundancy = np.divide(self._evidence, self._seen, out=np.zeros(self.count), where=self._seen > 0)
        flops, params = self.regularizer.terms(kept)
        return {
            "correlation": 1.0 - redundancy, "flops": flops, "params": params,
            "dead": self._dead.astype(np.float64),
        }  # fmt: skip

    def remove(self, unit: int) -> None:
        """Take the unit's evidence away from its twins."""
        for number, position in self._where.get(unit, ()):
            table = self.tables[number]
            before = table.evidence.copy()
            affected = table.remove(position)
            units = table.units[affected]
            change = table.evidence[affected] - before[affected]
            np.add.at(self._evidence, units[units >= 0], change[units >= 0])


CRITERIA = (Cop(), Cop("cop-activation"))
