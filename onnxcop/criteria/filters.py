"""Weights that produce units and weights that read them, for criteria that measure filters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from onnxcop._base.types import Array, BoolArray, FloatArray, IntArray
from onnxcop.analysis.layers import layer_weights
from onnxcop.criteria.base import PruningContext

_BLOCK = 2**20  # weights that are measured at once


def produced_filters(context: PruningContext) -> Iterator[tuple[IntArray, Array]]:
    """Filters of one layer after another that produces units: (unit per filter, [filters, weights] as stored)."""
    structure = context.structure
    for contraction in structure.coupling.findings.contractions:
        kernel = contraction.kernel
        if kernel is None or contraction.produced is None:
            continue
        units = structure.units_on(contraction.produced)
        if not (units >= 0).any():
            continue
        name = context.weights.nodes[contraction.node].input[kernel.input]
        values = context.weights.read(name)
        if values is None:
            continue
        filters = kernel.arranged(values) if kernel.scale == 1.0 else kernel.read(values)
        del values  # a layer may be most of the model
        yield units, filters.swapaxes(1, 2).reshape(len(units), -1)


def produced_filter_counts(context: PruningContext) -> FloatArray:
    """How many filters every unit represents, float64 [units]; depthwise filters do not count."""
    structure = context.structure
    counts = np.zeros(len(structure.unit_class))
    for contraction in structure.coupling.findings.contractions:
        if contraction.kernel is None or contraction.produced is None:
            continue
        depthwise = contraction.kernel.groups > 1 and not contraction.operands
        if depthwise and contraction.kernel.groups == len(contraction.produced):
            continue
        units = structure.units_on(contraction.produced)
        np.add.at(counts, units[units >= 0], 1.0)
    return counts


def per_filter(
    context: PruningContext, measure: Callable[[FloatArray], FloatArray], *, by_rows: bool = False
) -> FloatArray:
    """Average a measure of filters over the coupled layers, each relative to its layer's mean.

    Units that no layer produces (e.g. frequencies of a positional encoding) are measured by the weights that read them.

    Args:
        context: The model.
        measure: A number for every row of float64 [filters, weights].
        by_rows: Whether that number depends on its row alone. Then a few rows at a time are measured, and a layer is
            never in memory as float64.
    """
    made, seen = _averaged(context, produced_filters(context), measure, by_rows=by_rows)
    if seen.all():
        return made
    readers, _ = _averaged(context, _reading_weights(context), measure, by_rows=by_rows)
    return np.where(seen, made, readers)


def _averaged(
    context: PruningContext, rows: Iterable[tuple[IntArray, Array]], measure: Callable[[FloatArray], FloatArray], *,
    by_rows: bool,
) -> tuple[FloatArray, BoolArray]:  # fmt: skip
    """A measure of rows of weights averaged by unit, and which units have any."""
    count = len(context.structure.unit_class)
    total, seen = np.zeros(count), np.zeros(count)
    for units, weights in rows:
        step = max(1, _BLOCK // max(weights.shape[1], 1)) if by_rows else max(len(weights), 1)
        parts = (weights[start : start + step] for start in range(0, max(len(weights), 1), step))
        scores = np.concatenate([measure(part.astype(np.float64, copy=False)) for part in parts])
        scores = scores / max(float(scores.mean()), np.finfo(np.float64).tiny)
        live = units >= 0
        np.add.at(total, units[live], scores[live])
        np.add.at(seen, units[live], 1)
    return np.divide(total, seen, out=np.zeros(count), where=seen > 0), seen > 0


def _reading_weights(context: PruningContext) -> Iterator[tuple[IntArray, FloatArray]]:
    """Weights of every layer that reads units: (unit per channel, float64 [channels, weights])."""
    for layer in context.layers:
        weights = layer_weights(context.weights, layer)
        if weights is not None:
            yield layer.units, np.tile(weights.reshape(len(weights), -1), (layer.groups, 1))


def filter_norms(context: PruningContext, order: int) -> FloatArray:
    """Norm of the filters that produce each unit, relative to their layer's mean, float64 [units]; order 1 or 2."""
    return per_filter(context, lambda filters: np.linalg.norm(filters, order, axis=1), by_rows=True)


def produced_norms(context: PruningContext) -> FloatArray:
    """The L2 norms of :func:`filter_norms`."""
    return filter_norms(context, 2)
