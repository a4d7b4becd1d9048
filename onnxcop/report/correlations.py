"""Correlation matrices of layers, small enough for a page."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcop._base.formatting import plural
from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import node_name
from onnxcop.analysis.layers import Layer, layer_weights, layers_of
from onnxcop.calibration.statistics import CalibrationStats
from onnxcop.criteria.cop import activation_correlation, weight_correlation
from onnxcop.graph.constants import Weights

MOST_CHANNELS = 256  # channels of a matrix
_MOST_BYTES = 1_400_000  # bytes of all matrices: a page of two megabytes
_LARGEST = 1 << 24  # weights of a layer


@dataclass(frozen=True, slots=True)
class Correlation:
    """Similarity of the channels that a layer reads.

    Attributes:
        layer: Name of the node that reads them.
        measure: "weights" for the outgoing weights, as in the COP paper, or "activations" for the inputs during
            calibration.
        width: Number of channels.
        channels: The channels that are shown, ascending.
        removed: The removed ones among them, as positions in `channels`.
        values: uint8, 255 |ρ| for each pair of shown channels: the upper triangle without the diagonal,
            row after row.
    """

    layer: str
    measure: str
    width: int
    channels: tuple[int, ...]
    removed: tuple[int, ...]
    values: bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the values in base64."""
        return {
            "layer": self.layer, "measure": self.measure, "width": self.width, "channels": list(self.channels),
            "removed": list(self.removed), "values": base64.b64encode(self.values).decode(),
        }  # fmt: skip

    def matrix(self) -> FloatArray:
        """|ρ| as float64 [shown, shown], zero on the diagonal."""
        size = len(self.channels)
        full = np.zeros((size, size))
        full[np.triu_indices(size, 1)] = np.frombuffer(self.values, dtype=np.uint8) / 255
        return full + full.T

    def strongest(self) -> tuple[float | None, float | None]:
        """Mean, over the removed and over the kept channels, of each one's largest correlation with a kept channel."""
        size = len(self.channels)
        is_removed = np.zeros(size, dtype=np.bool_)
        is_removed[list(self.removed)] = True
        if is_removed.all() or size < 2:
            return None, None
        largest = self.matrix()[:, ~is_removed].max(axis=1)
        return (float(largest[is_removed].mean()) if is_removed.any() else None), float(largest[~is_removed].mean())


def correlations(
    analysis: Analysis, removed: IntArray, stats: CalibrationStats | None
) -> tuple[tuple[Correlation, ...], tuple[str, ...]]:
    """Matrices of the layers that lost the most channels, in graph order, and notes on those left out.

    Args:
        analysis: The model.
        removed: int64, units.
        stats: Statistics of the original, if there are any.
    """
    is_removed: BoolArray = np.zeros(len(analysis.structure.unit_class), dtype=np.bool_)
    is_removed[removed] = True
    layers = layers_of(analysis.model, analysis.structure)
    chosen, left = _chosen(layers, is_removed, stats)
    weights, chosen_matrices, wide, large = Weights.of(analysis.model), [], 0, 0
    for layer, name in zip(chosen, _names(analysis, chosen), strict=True):
        width = layer.channels // layer.groups
        shown = _shown(width)
        wide += len(shown) < width
        places = np.flatnonzero(_is_removed(layer, is_removed)[shown])
        matrices = _matrices(layer, weights, stats, shown)
        large += not matrices
        for measure, matrix in matrices:
            upper = np.round(255 * np.nan_to_num(matrix)[np.triu_indices(len(shown), 1)]).astype(np.uint8)
            chosen_matrices.append(
                Correlation(
                    layer=name,
                    measure=measure,
                    width=width,
                    channels=tuple(shown.tolist()),
                    removed=tuple(places.tolist()),
                    values=upper.tobytes(),
                )
            )
    notes = []
    if left:
        notes.append(f"correlation matrices of {plural(left, 'layer')}: those that lost the fewest channels")
    if large:
        notes.append(f"correlation matrices of {plural(large, 'layer')}, whose weights are too many or not constant")
    if wide:
        notes.append(f"channels of {plural(wide, 'wide layer')}: {MOST_CHANNELS} of each, evenly spaced, are shown")
    return tuple(chosen_matrices), tuple(notes)


def _chosen(layers: Sequence[Layer], is_removed: BoolArray, stats: CalibrationStats | None) -> tuple[list[Layer], int]:
    """Layers with matrices that fit, in graph order, and the number of others."""
    order = sorted(range(len(layers)), key=lambda place: -int(_is_removed(layers[place], is_removed).sum()))
    room, chosen = _MOST_BYTES, []
    for place in order:
        layer = layers[place]
        width = min(layer.channels // layer.groups, MOST_CHANNELS)
        size = width * (width - 1) // 2 * (1 if stats is None or stats.moments(layer) is None else 2)
        if width < 2 or size > room:
            continue
        room -= size
        chosen.append(place)
    wide = sum(layer.channels // layer.groups >= 2 for layer in layers)
    return [layers[place] for place in sorted(chosen)], wide - len(chosen)


def _names(analysis: Analysis, layers: Sequence[Layer]) -> list[str]:
    """Unique names: a recurrent node reads channels twice, and several nodes may have one name."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for layer in layers:
        name = node_name(analysis, layer.node)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _is_removed(layer: Layer, is_removed: BoolArray) -> BoolArray:
    units = layer.units[: layer.channels // layer.groups]
    return np.asarray((units >= 0) & is_removed[units])


def _shown(width: int) -> IntArray:
    return np.unique(np.linspace(0, width - 1, min(width, MOST_CHANNELS)).round().astype(np.int64))


def _matrices(
    layer: Layer, weights: Weights, stats: CalibrationStats | None, shown: IntArray
) -> list[tuple[str, FloatArray]]:
    """|ρ| of the shown channels by each available measure."""
    matrices = []
    moments = None if stats is None else stats.moments(layer)
    name = weights.nodes[layer.node].input[layer.kernel.input]
    stored = weights.stored.get(name)
    if stored is None or np.prod(stored.dims, dtype=np.int64) <= _LARGEST:
        values = layer_weights(weights, layer)
        if values is not None:
            matrices.append(("weights", np.clip(weight_correlation(values[shown]), 0, 1)))
    if moments is not None:
        matrix, _ = activation_correlation(moments.covariance, layer.groups)
        matrices.append(("activations", np.clip(matrix[np.ix_(shown, shown)], 0, 1)))
    return matrices
