"""COP as its authors released it, to the letter, for comparisons with the published results.

Where it differs from :class:`onnxcop.criteria.cop.Cop`, and why, is described in docs/cop.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.analysis.layers import layer_weights
from onnxcop.criteria.base import PruningContext, Ranking
from onnxcop.criteria.cop import ChannelCorrelations, Cop
from onnxcop.criteria.cop_regularization import Regularizer, depths, depthwise_nodes, node_sizes
from onnxcop.graph.subgraphs import Scopes, captured

SUMMARIES = {"cop-paper": "COP as its authors released it"}

_EPSILON = 1e-8  # added to products of deviations, whatever the scale of the weights


@dataclass(frozen=True)
class CopPaper(Cop):
    """COP's released implementation: absolute ε, one reader a layer, no correction of narrow layers.

    The importance is that of :class:`onnxcop.criteria.cop.Cop`, with these rules:

    * R_ij = mean over taps of |cov_ij / (σ_i σ_j + 1e-8)|, the diagonal included; R is divided by its
      largest value off the diagonal ("max"), half its sum ("l1") or its Frobenius norm ("l2").
    * s_i is the mean of the `top_k` values of column i after the very largest, which is taken for i itself.
    * A layer is scored by one reader. Coupled layers share the mean over those whose outputs are summed
      before they are read; projections, a stem, and the layer before the classifier are left out.
    * A depthwise layer in between counts with all its weights and one bias.

    Kernels are scored as they are stored. If an exporter has folded a normalization into them, their outputs carry its
    scale, which the reference code never sees; `unit_filters` undoes most of that.

    Source: W. Wang et al., "COP: Customized Deep Model Compression via Regularized Correlation-Based
    Filter-Level Pruning", 2019, arXiv 1906.10337, and the implementation that its authors released.

    Attributes:
        unit_filters: Divide the weights of every output by their norm before they are correlated.
    """

    name: str = "cop-paper"
    narrow_correction: bool = False
    unit_filters: bool = False

    def rank(self, context: PruningContext) -> Ranking:
        """Correlate, normalize and regularize."""
        chosen = scored_pairs(context)
        readers = {layer.node: layer for layer in context.layers}
        tables: dict[int, PaperCorrelations] = {}
        for node in {pair[-1] for pairs in chosen for pair in pairs if pair[-1] in readers}:
            weights = layer_weights(context.weights, readers[node])
            if weights is not None:
                if self.unit_filters:
                    norms = np.linalg.norm(weights, axis=(0, 2), keepdims=True)
                    weights = weights / np.maximum(norms, np.finfo(np.float64).tiny)
                table = paper_correlation(weights, self.measure)
                units = readers[node].units[: len(weights)]
                table /= paper_normalizer(table, self.normalization)
                tables[node] = PaperCorrelations.of(units, table, np.zeros(len(units), np.bool_), self.top_k)
        sizes = node_sizes(context)
        for node in depthwise_nodes(context) & sizes.keys():
            sizes[node] = replace(sizes[node], outputs=1.0, output_axis=None)
        regularizer = Regularizer.of_pairs(sizes, chosen, context.structure.group_of)
        scored = [[tables[pair[-1]] for pair in pairs if pair[-1] in tables] for pairs in chosen]
        return PaperRanking(self, scored, regularizer, len(context.structure.unit_class))

    def parameters(self) -> dict[str, Any]:
        """The paper's constants."""
        named = {name: value for name, value in super().parameters().items() if name != "narrow_correction"}
        return named | {"unit_filters": self.unit_filters}


def paper_correlation(weights: FloatArray, measure: str = "pearson") -> FloatArray:
    """Mean over taps of the magnitude of correlation, with an absolute ε.

    Args:
        weights: float64 [channels, outputs, taps].
        measure: "pearson", "cosine" or "inner".

    Returns:
        float64 [channels, channels], diagonal included.
    """
    channels, outputs, taps = weights.shape
    total: FloatArray = np.zeros((channels, channels))
    for tap in range(taps):
        rows = weights[:, :, tap]
        if measure == "pearson":
            size = rows.std(axis=1)
            rows = rows - rows.mean(axis=1, keepdims=True)
            total += np.abs(rows @ rows.T / outputs / (np.outer(size, size) + _EPSILON))
        elif measure == "cosine":
            size = np.linalg.norm(rows, axis=1)
            total += np.abs(rows @ rows.T / (np.outer(size, size) + _EPSILON))
        else:
            total += np.abs(rows @ rows.T)
    return np.asarray(total / taps)


def paper_normalizer(correlation: FloatArray, how: str) -> float:
    """Largest value off the diagonal, half the sum of those values (l1), or their Frobenius norm (l2)."""
    apart = correlation * (1.0 - np.eye(len(correlation)))
    if how == "max":
        scale = float(apart.max(initial=0.0))
    elif how == "l1":
        scale = float(apart.sum()) / 2
    elif how == "l2":
        scale = float(np.linalg.norm(apart))
    else:
        raise ValueError(f"unknown normalization {how!r}")
    return scale if scale > 0 else 1.0


def scored_pairs(context: PruningContext) -> list[list[tuple[int, ...]]]:
    """The chains (layer, depthwise layers …, reader) of every group; their scores are averaged.

    A layer is scored by the reader from which the way to the outputs is longest: the first layer of the
    next block, not the projection beside it. In a group with sums, a layer that is read before any sum (a
    stem) is left out, and so is what is read by a layer whose outputs cannot be cut (a classifier),
    as long as anything is left.
    """
    structure, nodes = context.structure, Scopes.of(context.model).nodes
    depth, height = depths(context.model), _heights(context)
    sizes, between = node_sizes(context), depthwise_nodes(context)
    layers = {c.node: c for c in structure.coupling.findings.contractions if c.kernel is not None}
    makers_of = {name: number for number, node in enumerate(nodes) for name in node.output}
    stops = layers.keys() - between
    reads = {layer.node: layer.tensor for layer in context.layers}
    result = []
    for group in structure.groups:
        best: dict[int, tuple[int, int, bool, tuple[int, ...]]] = {}
        alone: list[tuple[int, ...]] = []
        for reader in (n for n in group.consumers if n in sizes and n in reads):
            met = _upstream(context, reads[reader], makers_of, stops) & set(group.producers) & sizes.keys()
            makers, inner = met - between, sorted(met & between)
            if not makers:
                alone.append((*inner, reader))
                continue
            maker = max(makers, key=lambda n: (depth[n], -n))
            inner = [n for n in inner if depth[n] > depth[maker]]
            found = (height[reader], -reader, len(makers) > 1, (maker, *inner, reader))
            best[maker] = max(best.get(maker, found), found)
        pairs = sorted(best.values(), key=lambda entry: entry[3])
        pairs = [entry for entry in pairs if entry[2]] or pairs
        ends = {entry[3][-1] for entry in pairs if not _can_be_cut(context, layers[entry[3][-1]].produced)}
        pairs = [entry for entry in pairs if entry[3][-1] not in ends] or pairs
        result.append([entry[3] for entry in pairs] or alone)
    return result


def _can_be_cut(context: PruningContext, produced: IntArray | None) -> bool:
    return produced is not None and bool((context.structure.units_on(produced) >= 0).any())


def _upstream(context: PruningContext, tensor: str, makers_of: dict[str, int], stops: Iterable[int]) -> set[int]:
    """Nodes that a tensor depends on, back to the nearest of `stops` on every path."""
    nodes, ends = Scopes.of(context.model).nodes, set(stops)
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        number = makers_of.get(waiting.pop())
        if number is None or number in seen:
            continue
        seen.add(number)
        if number not in ends:
            waiting.extend({*nodes[number].input, *captured(nodes[number])})
    return seen


def _heights(context: PruningContext) -> list[int]:
    """Number of nodes on the longest way from every node to the outputs."""
    nodes = Scopes.of(context.model).nodes
    reached: dict[str, int] = {}
    heights = [0] * len(nodes)
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        heights[number] = 1 + max((reached.get(name, 0) for name in node.output), default=0)
        for name in {*node.input, *captured(node)}:
            reached[name] = max(reached.get(name, 0), heights[number])
    return heights


@dataclass
class PaperCorrelations(ChannelCorrelations):
    """Correlations of one reader's channels, diagonal included; the largest of each is not averaged."""

    def _refresh(self, rows: IntArray) -> None:
        count = min(self.top_k, len(self.units) - 1)
        if count < 1 or not len(rows):
            return
        top = np.sort(np.partition(self.correlation[rows], -count - 1, axis=1)[:, -count - 1 :], axis=1)
        self.evidence[rows] = top[:, :-1].mean(axis=1)
        self.threshold[rows] = top[:, 0]


class PaperRanking:
    """The released code's importance while units are removed.

    Args:
        criterion: The weights of the terms.
        scored: For every group the tables whose means it shares.
        regularizer: The cost terms.
        count: Number of units.
    """

    def __init__(
        self, criterion: CopPaper, scored: list[list[PaperCorrelations]], regularizer: Regularizer, count: int
    ) -> None:
        self._criterion, self._regularizer, self._count = criterion, regularizer, count
        self._entries: list[tuple[PaperCorrelations, IntArray, IntArray]] = []  # table, its positions, their units
        self._where: dict[int, list[tuple[PaperCorrelations, int]]] = {}
        self._seen = np.zeros(count)
        group_of = regularizer.group_of
        for group, tables in enumerate(scored):
            for table in tables:
                positions = np.flatnonzero(table.units >= 0)
                positions = positions[group_of[table.units[positions]] == group]
                units = table.units[positions]
                self._entries.append((table, positions, units))
                np.add.at(self._seen, units, 1.0)
                for position, unit in zip(positions.tolist(), units.tolist(), strict=True):
                    self._where.setdefault(unit, []).append((table, position))

    def importance(self, kept: IntArray) -> FloatArray:
        """The importance of every unit at the current widths, float64 [units]."""
        terms = self.terms(kept)
        total = self._criterion.alpha * terms["correlation"]
        return total + self._criterion.beta * terms["flops"] + self._criterion.gamma * terms["params"]

    def terms(self, kept: IntArray) -> dict[str, FloatArray]:
        """1 - s, the FLOPs term and the parameters term."""
        evidence = np.zeros(self._count)
        for table, positions, units in self._entries:
            np.add.at(evidence, units, table.evidence[positions])
        redundancy = np.divide(evidence, self._seen, out=evidence, where=self._seen > 0)
        flops, params = self._regularizer.terms(kept)
        return {"correlation": 1.0 - redundancy, "flops": flops, "params": params}

    def remove(self, unit: int) -> None:
        """Remove a unit; it no longer counts as evidence for others."""
        for table, position in self._where.get(unit, ()):
            table.remove(position)


CRITERIA = (CopPaper(),)
