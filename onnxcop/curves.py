"""Measured curves: what each group costs at several widths, in the network's own output.

The channels of a group are ordered by what their removal costs the layers that consume them; at a few
widths the group is cut, the consumers make up for it, and the rest of the network is run from there on
held-out samples. Only the consumers' weights change, so everything before them is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop.atoms import IntArray
from onnxcop.budget import Limits, allowed_units
from onnxcop.divergence import Reference
from onnxcop.engine import EngineOptions
from onnxcop.layers import FloatArray, Layer
from onnxcop.segments import Rolling
from onnxcop.shapes import Array
from onnxcop.stats import CalibrationStats
from onnxcop.surgeon import LayerSurgery, best_ridge, removal_order
from onnxcop.working import Working

LEVELS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65)


@dataclass(frozen=True, slots=True)
class Curve:
    """One group's order and price.

    Attributes:
        group: The group's index.
        order: Units in the order of removal.
        counts: int64 [points], numbers of removed units at which the divergence was measured.
        values: float64 [points], the divergence there, less that of the network as it was.
    """

    group: int
    order: tuple[int, ...]
    counts: IntArray
    values: FloatArray

    def price(self, count: FloatArray | float) -> FloatArray:
        """Divergence at any number of removed units, linear between points and steeper beyond."""
        counts = np.concatenate([[0.0], self.counts.astype(np.float64)])
        values = np.concatenate([[0.0], np.maximum.accumulate(np.maximum(self.values, 0.0))])
        if len(counts) > 1 and np.max(count) > counts[-1]:
            slope = (values[-1] - values[-2]) / max(counts[-1] - counts[-2], 1.0)
            counts = np.append(counts, 2 * counts[-1] + 1)
            values = np.append(values, values[-1] + 2 * slope * (counts[-1] - counts[-2]))
        return np.asarray(np.interp(count, counts, values))


@dataclass(frozen=True)
class Samples:
    """What curves are measured with.

    Attributes:
        fit: Statistics that merges are fitted on.
        held: Statistics of other samples, to choose the regularization by.
        feeds: Batches of samples that neither has seen, for the divergence.
        reference: The original's outputs on `feeds`.
    """

    fit: CalibrationStats
    held: CalibrationStats
    feeds: Sequence[Mapping[str, Array]]
    reference: Reference


def measure(
    working: Working, samples: Samples, limits: Limits, fallback: FloatArray, options: EngineOptions,
    levels: Sequence[float] = LEVELS, progress: Callable[[int, int], None] | None = None,
) -> list[Curve]:  # fmt: skip
    """Measure every group's curve on the network as it stands.

    Args:
        working: The network; it is not changed.
        samples: Statistics and held-out samples.
        limits: What may not be cut.
        fallback: float64 [units], an order for groups without statistics, lowest first.
        options: How pieces are run.
        levels: Fractions of the group's original width to cut, beyond what is already gone.
        progress: Called with groups done and their number.
    """
    structure = working.analysis.structure
    allowed = allowed_units(working.model, structure, limits) & working.alive
    ridges = choose_ridges(working, samples)
    rolling = Rolling(working.cutter, samples.feeds, options)
    base = samples.reference.compare(rolling.finish()).value
    groups = [g for g in structure.groups if allowed[g.units].any() and len(g.consumers)]
    groups.sort(key=lambda g: min(g.consumers))
    curves = []
    for done, group in enumerate(groups):
        rolling.advance(min(group.consumers))
        units = group.units[allowed[group.units]]
        counts = level_counts(group.width, len(units), levels, limits)
        curves.append(_curve(working, samples, ridges, rolling, group.index, units, counts, fallback, base))
        if progress is not None:
            progress(done + 1, len(groups))
    return [curve for curve in curves if len(curve.counts)]


def level_counts(width: int, available: int, levels: Sequence[float], limits: Limits) -> list[int]:
    """How many units to remove at each level, at least one and never all."""
    most = min(available - 1, int(limits.max_cut * width) - (width - available))
    counts = sorted({min(max(1, round(level * width)), most) for level in levels})
    return [count for count in counts if count >= 1]


def choose_ridges(working: Working, samples: Samples) -> dict[int, float]:
    """The regularization of every layer, by what it does on held-out samples."""
    ridges = {}
    for layer in working.layers:
        fit, held = samples.fit.moments(layer), samples.held.moments(layer)
        if fit is None or held is None or not working.is_open(layer):
            continue
        alive = alive_channels(working, layer)
        trial = np.flatnonzero(alive & (layer.units >= 0))
        if len(trial) < 2 or fit.count < 2:
            continue
        weights = working.weights(layer)
        surgery = LayerSurgery.of(layer, weights, fit, 1e-2, alive)
        gone = np.sort(trial[np.argsort(surgery.costs()[trial], kind="stable")][: max(1, len(trial) // 5)])
        keep = np.setdiff1d(np.flatnonzero(alive), gone)
        ridges[layer.node] = best_ridge(weights, fit, held, keep, gone)
    return ridges


def alive_channels(working: Working, layer: Layer) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of a layer's input channels are still there."""
    return np.where(layer.units >= 0, working.alive[layer.units], True)


def surgeries_for(
    working: Working, fit: CalibrationStats, ridges: Mapping[int, float], group: int
) -> list[LayerSurgery]:
    """The layers that consume a group and can make up for its channels."""
    wanted = set(working.analysis.structure.groups[group].consumers)
    found = []
    for layer in working.layers:
        moments = fit.moments(layer) if layer.node in wanted and layer.node in ridges else None
        if moments is not None:
            found.append(
                LayerSurgery.of(
                    layer, working.weights(layer), moments, ridges[layer.node], alive_channels(working, layer)
                )
            )
    return found


def _curve(
    working: Working, samples: Samples, ridges: Mapping[int, float], rolling: Rolling, group: int,
    units: IntArray, counts: list[int], fallback: FloatArray, base: float,
) -> Curve:  # fmt: skip
    surgeries = surgeries_for(working, samples.fit, ridges, group)
    snapshots: dict[int, list[FloatArray]] = {}

    def note(order: list[int]) -> None:
        for count in counts:
            if count not in snapshots and len(order) >= count:
                snapshots[count] = [s.weights.copy() for s in surgeries]

    order = removal_order(surgeries, units, fallback, max(len(units) - max(counts, default=0), 1), note)
    values, measured = [], []
    for count in counts:
        if count not in snapshots:
            continue
        found = _variant(working, samples, rolling, surgeries, snapshots[count], order[:count], base)
        values.append(found)
        measured.append(count)
        if found > 4 * max(values[0], 0.05) + 3.0:
            break  # far beyond anything worth buying
    return Curve(group, tuple(order), np.array(measured, dtype=np.int64), np.array(values))


def _variant(
    working: Working, samples: Samples, rolling: Rolling, surgeries: Sequence[LayerSurgery],
    weights: Sequence[FloatArray], gone: Sequence[int], base: float,
) -> float:  # fmt: skip
    """Divergence added when a group loses units and its consumers make up for them."""
    saved = {name: onnx.TensorProto.FromString(working.cutter.stored[name].SerializeToString())
             for name in touched_names(working, surgeries, gone)}  # fmt: skip
    try:
        for surgery, flat in zip(surgeries, weights, strict=True):
            old = working.weights(surgery.layer)
            new = flat.reshape(old.shape)
            moments = samples.fit.moments(surgery.layer)
            mean = moments.mean if moments is not None else np.zeros(len(old))
            working.set_weights(surgery.layer, new, np.einsum("cot,c->o", old - new, mean))
        silence(working, gone, {s.layer.node for s in surgeries})
        return samples.reference.compare(rolling.finish()).value - base
    finally:
        for name, tensor in saved.items():
            working.cutter.stored[name].CopyFrom(tensor)


def touched_names(working: Working, surgeries: Sequence[LayerSurgery], gone: Sequence[int]) -> set[str]:
    """Stored tensors that a variant changes."""
    names = set()
    for layer in [s.layer for s in surgeries] + silenced_layers(working, gone, {s.layer.node for s in surgeries}):
        name = working.model.graph.node[layer.node].input[layer.kernel.input]
        if name in working.cutter.stored:
            names.add(name)
        bias = working.bias_name(layer.node, layer.kernel.kind, layer.kernel.bias)
        if bias is not None:
            names.add(bias)
    return names


def silenced_layers(working: Working, gone: Sequence[int], done: set[int]) -> list[Layer]:
    """Layers that consume the units but cannot make up for them."""
    lost = set(gone)
    return [
        layer for layer in working.layers
        if layer.node not in done and not lost.isdisjoint(layer.units.tolist())
        and working.weight_name(layer.node, layer.kernel.input) is not None and layer.groups == 1
    ]  # fmt: skip


def silence(working: Working, gone: Sequence[int], done: set[int]) -> None:
    """Set the outgoing weights of units to zero where nothing makes up for them."""
    for layer in silenced_layers(working, gone, done):
        weights = working.weights(layer)
        weights[np.isin(layer.units, np.asarray(gone))] = 0.0
        working.set_weights(layer, weights)
