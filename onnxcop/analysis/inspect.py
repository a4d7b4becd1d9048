"""A report before pruning: what can be pruned, what cannot and why, and how much it would save."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import census, group_name, inner_share, node_name, prunable_share
from onnxcop.analysis.summary import Totals, frozen_reasons, totals

log = logging.getLogger("onnxcop")

_MOST_REASONS = 3  # of a layer


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """A dependency group.

    Attributes:
        name: Its first layer, and the number of others.
        layers: The layers whose filters are removed together.
        readers: The layers that lose input channels.
        width: Number of filters (of every layer).
        exact: Whether pruning it leaves the other channels unchanged.
        reasons: Why the group is inexact, if it is.
        macs: Multiply-accumulates per sample that removing the first filter saves.
        params: Parameters that it saves.
        half_macs: Multiply-accumulates saved if half of the group is removed, and nothing else.
        half_params: Parameters saved by that.
    """

    name: str
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int
    exact: bool
    reasons: tuple[str, ...]
    macs: float
    params: float
    half_macs: float = 0.0
    half_params: float = 0.0


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """A layer with filters that cannot be removed."""

    name: str
    filters: int
    prunable: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of an inspection.

    Attributes:
        model: Path or description.
        sha256: Identity of the model.
        input_shapes: The shapes of the analysis.
        cost: Its cost.
        filters: Number of filters in all layers.
        prunable: Fraction of them that can be removed.
        given: Number of filters that the model's purpose fixes: they feed an output or a softmax, or a layer has only
            one.
        prunable_inner: Fraction of the others that can be removed; None if there are none.
        groups: Every dependency group, sorted by the multiply-accumulates that removing half of it saves.
        halved: Cost of the model with half of every group removed.
        frozen: Number of filters by the reason that freezes them.
        frozen_layers: Layers with filters that cannot be removed.
        declined: Nodes that could not be followed, with the reason.
    """

    model: str
    sha256: str
    input_shapes: dict[str, tuple[int, ...]]
    cost: Totals
    filters: int
    prunable: float
    given: int
    prunable_inner: float | None
    groups: tuple[GroupEntry, ...]
    frozen: dict[str, int]
    frozen_layers: tuple[FrozenLayer, ...]
    declined: tuple[str, ...]
    halved: Totals

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect(analysis: Analysis) -> Inspection:
    """Describe an analysed model."""
    _warn_of_unknown_shapes(analysis)
    layers = census(analysis)
    _, _, frozen = frozen_reasons(analysis)
    groups = sorted((_entry(analysis, g.index) for g in analysis.structure.groups), key=lambda entry: -entry.half_macs)
    return Inspection(
        model=analysis.source,
        sha256=analysis.sha256,
        input_shapes=dict(analysis.input_shapes),
        cost=totals(analysis.original, float(analysis.cost.original()[0])),
        filters=sum(layer.filters for layer in layers),
        prunable=prunable_share(layers),
        given=sum(layer.given for layer in layers),
        prunable_inner=inner_share(layers),
        groups=tuple(groups),
        frozen=frozen,
        frozen_layers=frozen_layers(analysis),
        declined=tuple(str(reason) for _, reason in analysis.structure.coupling.declined),
        halved=_halved(analysis),
    )


def _warn_of_unknown_shapes(analysis: Analysis) -> None:
    """Log relevant shapes that are unknown, and the remedy."""
    shapes = analysis.structure.coupling.shapes
    inputs = {name for node in analysis.model.graph.node for name in node.input}
    unknown = [name for name in shapes.unknown if name in inputs]
    if not shapes.trouble or not unknown:
        return
    first, others = unknown[0], len(unknown) - 1
    log.warning(
        "the shape of tensor %r%s is not known, and what reads it is frozen: the model cannot be run here (%s); "
        "give what it needs, e.g. its operators' library with --custom-ops, or declare that shape in the model's "
        "value_info; --input-shape does not set it",
        first, f" and of {others} behind it" if others else "", shapes.trouble,
    )  # fmt: skip


def _halved(analysis: Analysis) -> Totals:
    halves = [group.units[: group.width // 2] for group in analysis.structure.groups]
    cost = analysis.cost.of_units(np.concatenate(halves) if halves else np.empty(0, dtype=np.int64))
    return Totals(float(cost[0]), round(float(cost[1])), round(float(cost[2])) + analysis.cost.file_overhead)


def frozen_layers(analysis: Analysis) -> tuple[FrozenLayer, ...]:
    """Layers with filters that cannot be removed, in graph order."""
    return tuple(
        FrozenLayer(layer.name, layer.filters, layer.prunable, tuple(map(str, list(layer.reasons)[:_MOST_REASONS])))
        for layer in census(analysis)
        if layer.prunable < layer.filters
    )


def _entry(analysis: Analysis, index: int) -> GroupEntry:
    structure = analysis.structure
    group = structure.groups[index]
    rows = structure.incidence
    row = slice(rows.indptr[group.units[0]], rows.indptr[group.units[0] + 1])
    axes, times = rows.indices[row].astype(np.int64), rows.data[row].astype(np.int64)
    saved = analysis.cost.change(structure.axis_sizes, axes, times)
    half = analysis.cost.change(structure.axis_sizes, axes, group.width // 2 * times)
    return GroupEntry(
        name=group_name(analysis, index),
        layers=tuple(node_name(analysis, node) for node in group.producers),
        readers=tuple(node_name(analysis, node) for node in group.consumers),
        width=group.width,
        exact=group.exact,
        reasons=() if group.exact else tuple(map(str, group.reasons)),
        macs=float(saved[0]),
        params=float(saved[1]),
        half_macs=float(half[0]),
        half_params=float(half[1]),
    )
