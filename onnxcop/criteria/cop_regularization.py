"""COP's cost regularization: the computation and the parameters that depend on a layer.

For a layer and the next, P = params(l) + params(l+1) and C = FLOPs(l) + FLOPs(l+1) at the current widths, with params =
taps·Cin·Cout + Cout and FLOPs = 2·positions·taps·Cin·Cout. A depthwise layer in between is included. If several layers
are coupled (a residual stage), a unit's term is the mean over its pairs (layer, next layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.criteria.base import PruningContext
from onnxcop.graph.subgraphs import Scopes, captured


@dataclass(frozen=True)
class Sizes:
    """How one node's cost follows from kept widths: `macs × Π`, and `weights × Π + outputs`."""

    macs: float
    mac_axes: tuple[int, ...]
    weights: float
    weight_axes: tuple[int, ...]
    outputs: float
    output_axis: int | None

    def flops(self, kept: IntArray) -> float:
        """2 × multiply-accumulates at the given widths."""
        return 2.0 * self.macs * float(np.prod(kept[list(self.mac_axes)], dtype=np.float64))

    def params(self, kept: IntArray) -> float:
        """Weights and one bias per output at the given widths."""
        outputs = self.outputs if self.output_axis is None else float(kept[self.output_axis])
        return self.weights * float(np.prod(kept[list(self.weight_axes)], dtype=np.float64)) + outputs


@dataclass
class Regularizer:
    """The FLOPs and parameter terms of every unit.

    Attributes:
        pairs: Nodes with a common cost: (layer, …, next layer).
        members: For every dependency group the numbers of its pairs.
        group_of: int64 [units].
    """

    sizes: dict[int, Sizes]
    pairs: tuple[tuple[int, ...], ...]
    members: tuple[tuple[int, ...], ...]
    group_of: IntArray

    def __post_init__(self) -> None:
        self._last: IntArray | None = None
        self._costs: dict[int, tuple[float, float]] = {}
        self._pair_costs = np.zeros((2, len(self.pairs)))
        self._by_node: dict[int, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            for node in pair:
                self._by_node.setdefault(node, []).append(number)
        self._by_axis: dict[int, list[int]] = {}
        for node, size in self.sizes.items():
            axes = {*size.mac_axes, *size.weight_axes}
            axes |= set() if size.output_axis is None else {size.output_axis}
            for axis in axes:
                self._by_axis.setdefault(axis, []).append(node)
        self._averaging = np.zeros((len(self.members), len(self.pairs)))
        self._alone = np.array([0.0 if numbers else 1.0 for numbers in self.members])
        for group, numbers in enumerate(self.members):
            self._averaging[group, list(numbers)] = 1.0 / max(len(numbers), 1)

    @classmethod
    def of(cls, context: PruningContext) -> Regularizer:
        """Pair every consumer of a group with the nearest layer before it that produces the group.

        The nearest is the one with the longest path from the inputs: the last convolution of a block, not the
        projection beside it, in whatever order the file lists them.
        """
        structure, depth = context.structure, depths(context.model)
        sizes, between = node_sizes(context), depthwise_nodes(context)
        pairs_by_group: list[list[tuple[int, ...]]] = []
        for group in structure.groups:
            makers = [n for n in group.producers if n in sizes and n not in between]
            pairs_by_group.append([])
            for consumer in (n for n in group.consumers if n in sizes):
                maker = max((n for n in makers if n < consumer), key=depth.__getitem__, default=None)
                start = -1 if maker is None else maker
                inner = [n for n in group.producers if n in between and start < n < consumer and n in sizes]
                pairs_by_group[-1].append((*([] if maker is None else [maker]), *inner, consumer))
        return cls.of_pairs(sizes, pairs_by_group, structure.group_of)

    @classmethod
    def of_pairs(
        cls, sizes: dict[int, Sizes], pairs_by_group: Sequence[Sequence[tuple[int, ...]]], group_of: IntArray
    ) -> Regularizer:
        """Average the costs of given pairs of every group; a pair of several groups counts once."""
        pairs: dict[tuple[int, ...], int] = {}
        members = [
            tuple(sorted({pairs.setdefault(pair, len(pairs)) for pair in of_group})) for of_group in pairs_by_group
        ]
        return cls(sizes, tuple(pairs), tuple(members), group_of)

    def pair_costs(self, kept: IntArray) -> tuple[FloatArray, FloatArray]:
        """C and P of every pair at the given widths; only pairs that have changed are computed again."""
        changed = np.flatnonzero(self._last != kept) if self._last is not None else None
        stale = set(self.sizes) if changed is None else {n for a in changed.tolist() for n in self._by_axis.get(a, ())}
        for node in stale:
            self._costs[node] = (self.sizes[node].flops(kept), self.sizes[node].params(kept))
        for number in {p for n in stale for p in self._by_node.get(n, ())}:
            self._pair_costs[:, number] = np.sum([self._costs[n] for n in self.pairs[number]], axis=0)
        self._last = kept.copy()
        return self._pair_costs[0], self._pair_costs[1]

    def terms(self, kept: IntArray) -> tuple[FloatArray, FloatArray]:
        """1 - log2 C / max log2 C and the same for P, float64 [units] each."""
        if not self.pairs:
            zeros = np.zeros(len(self.group_of))
            return zeros, zeros.copy()
        result = []
        for costs in self.pair_costs(kept):
            logs = np.log2(np.maximum(costs, 2.0))
            relative = 1.0 - logs / logs.max()
            per_group = self._averaging @ relative + self._alone
            result.append(per_group[self.group_of])
        return result[0], result[1]


def depths(model: onnx.ModelProto) -> list[int]:
    """Number of nodes on the longest path from the inputs to every node."""
    reached: dict[str, int] = {}
    depths = []
    for node in Scopes.of(model).nodes:
        depth = 1 + max((reached.get(name, 0) for name in {*node.input, *captured(node)}), default=0)
        reached |= dict.fromkeys(node.output, depth)
        depths.append(depth)
    return depths


def depthwise_nodes(context: PruningContext) -> set[int]:
    """Convolutions that treat every channel separately."""
    return {
        c.node for c in context.structure.coupling.findings.contractions
        if c.kernel is not None and c.kernel.groups > 1 and not c.operands
    }  # fmt: skip


def node_sizes(context: PruningContext) -> dict[int, Sizes]:
    """How the cost of every layer with weights follows from kept widths."""
    structure = context.structure
    macs = {mac.node: mac for mac in structure.coupling.findings.macs}
    result = {}
    for contraction in structure.coupling.findings.contractions:
        mac = macs.get(contraction.node)
        if contraction.kernel is None or mac is None:
            continue
        name = context.weights.nodes[contraction.node].input[contraction.kernel.input]
        shape = structure.coupling.shapes[name].shape or ()
        label = structure.coupling.labels.get(name, (None,) * len(shape))
        free = [size for size, atoms in zip(shape, label, strict=True) if atoms is None]
        result[contraction.node] = Sizes(
            macs=mac.scale / context.cost.batch,
            mac_axes=tuple(structure.axis_id(atoms) for atoms in mac.axes),
            weights=float(np.prod(free, dtype=np.float64)),
            weight_axes=tuple(structure.axis_id(atoms) for atoms in label if atoms is not None),
            outputs=0.0 if contraction.produced is not None else float(shape[contraction.kernel.out_axis]),
            output_axis=None if contraction.produced is None else structure.axis_id(contraction.produced),
        )
    return result
