"""Changes of filters, multiply-accumulates and parameters, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.census import node_name
from onnxcop.analysis.cost import KINDS


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A layer before and after, or all nodes of one operator that is not a layer.

    Attributes:
        name: The node's name, or the operator with the number of its nodes.
        op: The operator.
        width: Number of output channels, None if it is not a layer.
        kept: Number of remaining channels.
        macs: Multiply-accumulates per sample before.
        macs_after: Multiply-accumulates after.
        params: Parameters before.
        params_after: Parameters after.
    """

    name: str
    op: str
    width: int | None
    kept: int | None
    macs: float
    macs_after: float
    params: float
    params_after: float


def layer_changes(analysis: Analysis, removed: IntArray) -> tuple[LayerChange, ...]:
    """Every layer in graph order, then the cost of other operators, one entry each."""
    costs = _costs(analysis, removed)
    widths = _widths(analysis, removed)
    layers = []
    for node in sorted(widths):
        before, after = costs.pop(node, (np.zeros(len(KINDS)), np.zeros(len(KINDS))))
        op = analysis.nodes[node].op_type
        layers.append(_change(node_name(analysis, node), op, widths[node], before, after))
    others: dict[str, list[tuple[FloatArray, FloatArray]]] = {}
    for number, pair in costs.items():
        op = "stored tensors" if number is None else analysis.nodes[number].op_type
        others.setdefault(op, []).append(pair)
    for op, pairs in others.items():
        before, after = (np.sum([pair[side] for pair in pairs], axis=0) for side in (0, 1))
        if before[:2].any():
            name = op if len(pairs) == 1 else f"{op} (all {len(pairs)})"
            layers.append(_change(name, op, (None, None), before, after))
    return tuple(layers)


def _change(
    name: str, op: str, widths: tuple[int | None, int | None], before: FloatArray, after: FloatArray
) -> LayerChange:
    return LayerChange(
        name, op, *widths, macs=float(before[0]), macs_after=float(after[0]), params=float(before[1]),
        params_after=float(after[1]),
    )  # fmt: skip


def _widths(analysis: Analysis, removed: IntArray) -> dict[int, tuple[int, int]]:
    """Output channels of every layer, before and after, by node."""
    structure = analysis.structure
    is_removed: BoolArray = np.zeros(len(structure.unit_class), dtype=np.bool_)
    is_removed[removed] = True
    widths: dict[int, tuple[int, int]] = {}
    for contraction in structure.coupling.findings.contractions:
        if contraction.kernel is None or contraction.produced is None or contraction.node in widths:
            continue
        units = structure.units_on(contraction.produced)
        width = len(units)
        widths[contraction.node] = width, width - int(is_removed[units[units >= 0]].sum())
    return widths


def _costs(analysis: Analysis, removed: IntArray) -> dict[int | None, tuple[FloatArray, FloatArray]]:
    """Cost before and after by node; stored tensors count for the node that works with them, None for none."""
    cost = analysis.cost
    before = cost.shares(analysis.structure.axis_sizes)
    after = cost.shares(cost.kept_counts(removed))
    readers = _readers(analysis, (owner for owner in before if isinstance(owner, str)))
    costs: dict[int | None, tuple[FloatArray, FloatArray]] = {}
    for owner, value in before.items():
        if isinstance(owner, str) and owner in analysis.vectors.copies:
            continue  # stored once: its original counts
        node = readers[owner] if isinstance(owner, str) else owner
        old, new = costs.get(node, (np.zeros(len(KINDS)), np.zeros(len(KINDS))))
        costs[node] = old + value, new + after[owner]
    return costs


def _readers(analysis: Analysis, tensors: Iterable[str]) -> dict[str, int | None]:
    """The first node that works with each stored tensor, through nodes that only see constants."""
    graph = analysis.model.graph
    names = set(tensors)
    stored = names | {tensor.name for tensor in graph.initializer}
    origin = {name: {name} for name in names}
    readers: dict[str, int | None] = dict.fromkeys(names)
    constant = set(stored)
    for index, node in enumerate(graph.node):
        inputs = [name for name in node.input if name]
        sources: set[str] = set().union(*(origin.get(name, set()) for name in inputs))
        if all(name in constant for name in inputs):
            constant.update(node.output)
            for name in node.output:
                origin[name] = origin.get(name, set()) | sources
        else:
            for name in sources:
                if readers[name] is None:
                    readers[name] = index
    return readers
