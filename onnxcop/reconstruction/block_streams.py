"""Blocks of channels between linear maps and products: attention heads, each of which may get its own basis.

Queries and keys meet in a product that sums over their dimensions; values pass through one that sums over tokens.
Neither distinguishes dimensions. For any invertible M of a head, queries M q and keys M⁻ᵀ k give the same product.
Values M v give the same result if the layer that reads them holds M⁻ᵀ W. So every head can be written in a basis that
concentrates its signal in few dimensions.

The dimensions of all heads form one group: removing a unit removes one dimension of every head. The heads are its
*blocks*. To find which entries of a tensor belong to which block, the operators that move entries are applied to the
block numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.analysis.layers import UNREAD, Layer
from onnxcop.calibration.statistics import Moments
from onnxcop.coupling.groups import DependencyGroup
from onnxcop.coupling.ops.facts import Contraction
from onnxcop.graph.shapes import evaluate
from onnxcop.graph.traits import Trait, scales, traits
from onnxcop.reconstruction.network import MaskedNetwork

_BEFORE_SOFTMAX = frozenset(("Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity"))
_EXACT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)  # other types would be rounded again
_LARGEST = 1 << 26  # tensors with more entries are not followed


@dataclass(frozen=True, slots=True)
class Site:
    """The place of a block in a tensor: positions of its channels along an axis, in the group's order.

    Attributes:
        tensor: Name of the tensor, stored or not.
        axis: The axis.
        positions: int64 [channels].
        dual: Whether it holds M⁻ᵀ x when the block is written as M x.
        layer: Number of the node whose stored weights sum over the block here, None if there is none.
        centred: Whether the mean of the channels has no effect, or a bias compensates for it.
    """

    tensor: str
    axis: int
    positions: IntArray
    dual: bool
    layer: int | None = None
    centred: bool = False

    def moments(self, whole_axis: Moments) -> FloatArray:
        """Select the second moments of this site, float64 [channels, channels], from those of the whole axis."""
        return np.asarray(
            (whole_axis.covariance if self.centred else whole_axis.second)[np.ix_(self.positions, self.positions)]
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Channels that share a basis.

    Attributes:
        stored: Stored tensors that make or read the channels.
        seen: Tensors that hold the channels when the network runs, one for every stored kernel that makes them.
        product: Whether a product of two activations sums over the channels.
    """

    stored: tuple[Site, ...]
    seen: tuple[Site, ...]
    product: bool


@dataclass(frozen=True, slots=True)
class BlockStream:
    """A group with blocks that may each be written in another basis."""

    group: DependencyGroup
    blocks: tuple[Block, ...]


class _Spoiled(Exception):
    """Raised if an operator distinguishes the channels of a block or cannot be followed."""


def block_streams(working: MaskedNetwork) -> Iterator[BlockStream]:
    """Find all groups whose blocks feed a product of two activations and may be mixed."""
    structure = working.analysis.structure
    carriers: dict[int, set[str]] = defaultdict(set)
    for name, label in structure.coupling.labels.items():
        for atoms in label:
            if atoms is not None:
                units = structure.units_on(atoms)
                for group in np.unique(structure.group_of[units[units >= 0]]).tolist():
                    carriers[group].add(name)
    for group in structure.groups:
        try:
            tracer = _Tracer(working, group, carriers[group.index])
            blocks = tracer.run()
        except _Spoiled:
            continue
        if tracer.meets_product and group.width > 1 and blocks:
            yield BlockStream(group, tuple(blocks))


def tap(working: MaskedNetwork, site: Site) -> Layer:
    """The tap that observes all of a tensor's block axis in the moments."""
    atoms = working.analysis.structure.coupling.labels[site.tensor][site.axis]
    assert atoms is not None
    units = working.analysis.structure.units_on(atoms)
    return Layer(node=-1, kernel=UNREAD, tensor=site.tensor, axis=site.axis, units=units)


@dataclass
class _Tracer:
    working: MaskedNetwork
    group: DependencyGroup
    carriers: set[str]
    meets_product: bool = False
    numbers: dict[str, Array] = field(default_factory=dict)  # tensor: the block of every entry, -1 for none
    sites: list[Site] = field(default_factory=list)  # block numbers of stored tensors
    links: list[tuple[int, int, bool]] = field(default_factory=list)
    summed: set[int] = field(default_factory=set)  # blocks that a product of two activations sums over
    cancelled: set[int] = field(default_factory=set)  # blocks whose mean cancels in a softmax over the products

    def __post_init__(self) -> None:
        structure = self.working.analysis.structure
        self.rank = np.full(len(structure.unit_class) + 1, -1, dtype=np.int64)
        self.rank[self.group.units] = np.arange(self.group.width)
        self.contractions: dict[int, list[Contraction]] = defaultdict(list)
        for contraction in structure.coupling.findings.contractions:
            self.contractions[contraction.node].append(contraction)
        self.opset = next((o.version for o in self.working.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def run(self) -> list[Block]:
        for number, node in enumerate(self.working.nodes):
            if self.carriers.intersection((*node.input, *node.output)):
                self._visit(number, node)
        return self._blocks()

    def _visit(self, number: int, node: onnx.NodeProto) -> None:
        if traits(node) & Trait.SIZES:
            return
        if number >= self.working.partition.count or node.domain not in ("", "ai.onnx"):
            raise _Spoiled
        contractions = self.contractions.get(number, [])
        kernels = [c for c in contractions if c.kernel is not None]
        if kernels:
            self._layer(number, node, kernels[0])
        elif node.op_type == "MatMul":
            self._product(number, node, contractions)
        elif contractions:
            raise _Spoiled
        else:
            self._between(node)
        if any(name in self.carriers and name not in self.numbers for name in node.output):
            raise _Spoiled

    def ranks(self, name: str) -> tuple[int, IntArray]:
        """Return the axis of a tensor that carries the group, and the rank within the group of every position."""
        structure = self.working.analysis.structure
        entries = []
        for axis, atoms in enumerate(structure.coupling.labels[name]):
            ranks = None if atoms is None else self.rank[structure.units_on(atoms)]
            if ranks is not None and (ranks >= 0).any():
                entries.append((axis, ranks))
        if len(entries) != 1:
            raise _Spoiled
        return entries[0]

    def _stored(self, name: str, layer: int | None = None) -> IntArray:
        """Assign new block numbers along the axis of a stored tensor, -1 for other positions."""
        stored = self.working.partition.stored.get(name)
        if stored is None or self.working.uses(name) != 1 or stored.data_type not in _EXACT_TYPES:
            raise _Spoiled
        axis, ranks = self.ranks(name)
        own = np.flatnonzero(ranks >= 0)
        order = np.argsort(ranks[own], kind="stable").reshape(self.group.width, -1) if self._even(ranks[own]) else None
        if order is None:
            raise _Spoiled
        numbers = np.full(len(ranks), -1, dtype=np.int64)
        for positions in own[order].T:
            numbers[positions] = len(self.sites)
            self.sites.append(Site(tensor=name, axis=axis, positions=positions, dual=False, layer=layer))
        return numbers

    def _even(self, ranks: IntArray) -> bool:
        counts = np.bincount(ranks, minlength=self.group.width)
        return bool((counts == counts[0]).all())

    def _vector(self, name: str) -> IntArray:
        """Return the blocks along the axis that carries the group, if they are the same everywhere."""
        axis, _ = self.ranks(name)
        moved = np.moveaxis(self.numbers[name], axis, -1).reshape(-1, self.numbers[name].shape[axis])
        if (moved != moved[0]).any():
            raise _Spoiled
        return np.asarray(moved[0])

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.working.partition.shapes[name].shape
        if shape is None or int(np.prod(shape)) > _LARGEST:
            raise _Spoiled
        return shape

    def _spread(self, name: str, vector: IntArray) -> None:
        """Record the blocks of a tensor that has the same blocks everywhere."""
        axis, ranks = self.ranks(name)
        shape = self._shape(name)
        if len(ranks) != len(vector):
            raise _Spoiled
        self.numbers[name] = np.broadcast_to(
            vector.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape
        )  # fmt: skip

    def _link(self, one: IntArray, other: IntArray, dual: bool) -> None:
        if ((one < 0) != (other < 0)).any():
            raise _Spoiled
        pairs = np.unique((one * len(self.sites) + other)[one >= 0])
        self.links += [(pair // len(self.sites), pair % len(self.sites), dual) for pair in pairs.tolist()]

    def _layer(self, number: int, node: onnx.NodeProto, contraction: Contraction) -> None:
        """Handle a layer with stored weights: it makes the channels, or sums over them."""
        kernel = contraction.kernel
        assert kernel is not None
        if kernel.groups != 1 or not kernel.changeable:
            raise _Spoiled
        weight = node.input[kernel.input]
        summed = {operand.input: operand.axis for operand in contraction.operands}
        for position, name in enumerate(node.input):
            if name not in self.carriers or position == kernel.input:
                continue
            if name in self.working.partition.stored or position == kernel.bias:
                continue
            if name not in self.numbers or self.ranks(name)[0] != summed.get(position):
                raise _Spoiled
            if self.ranks(weight)[0] != kernel.in_axis:
                raise _Spoiled
            self._link(self._vector(name), self._stored(weight, number), True)
        if node.output[0] in self.carriers:
            if self.ranks(weight)[0] != kernel.out_axis:
                raise _Spoiled
            vector = self._stored(weight)
            self._spread(node.output[0], vector)
            for name in node.input:
                if name in self.carriers and name != weight:
                    self._link(vector, self._stored(name), False)

    def _product(self, number: int, node: onnx.NodeProto, contractions: list[Contraction]) -> None:
        """Handle a product of two activations: it sums over the channels of both, or over something else."""
        self.meets_product = True
        left, right = node.input
        if any((self.rank[self.working.analysis.structure.units_on(o.atoms)] >= 0).any()
               for c in contractions for o in c.operands):  # fmt: skip
            one, other = self.numbers.get(left), self.numbers.get(right)
            if one is None or other is None or one.ndim < 2 or other.ndim < 2:
                raise _Spoiled
            if (one != one[..., :1, :]).any() or (other != other[..., :, :1]).any():
                raise _Spoiled
            rows, columns = np.broadcast_arrays(one[..., 0, :], other[..., :, 0])
            self.summed |= set(np.unique(rows).tolist()) | set(np.unique(columns).tolist())
            if softmax_cancels(self.working, number, 1):
                self.cancelled |= set(np.unique(columns).tolist())
            self._link(rows.reshape(-1), columns.reshape(-1), True)
            return
        carried = [name for name in (left, right) if name in self.carriers]
        if len(carried) != 1 or carried[0] not in self.numbers:
            raise _Spoiled
        numbers, shape = self.numbers[carried[0]], self._shape(node.output[0])
        axis = self.ranks(carried[0])[0] - numbers.ndim
        if carried[0] == right and axis == -1:
            first = numbers[..., :1, :]
        elif carried[0] == left and axis == -2:
            first = numbers[..., :, :1]
        else:
            raise _Spoiled
        if (numbers != first).any():
            raise _Spoiled
        self.numbers[node.output[0]] = np.broadcast_to(first, shape)

    def _between(self, node: onnx.NodeProto) -> None:
        """Handle an operator between layers; it must treat all channels of a block alike."""
        here = [name for name in node.input if name in self.carriers]
        known = traits(node)
        if known & (Trait.KEEPS | Trait.PICKS):
            self._move(node, here)
        elif known & Trait.SUMS and len(here) == len(node.input):
            self._sum(node)
        elif scales(node, here):
            numbers = self.numbers.get(here[0])
            if numbers is None:
                raise _Spoiled
            self.numbers[node.output[0]] = np.broadcast_to(numbers, self._shape(node.output[0]))
        else:
            raise _Spoiled

    def _move(self, node: onnx.NodeProto, here: list[str]) -> None:
        if here != node.input[:1] or here[0] not in self.numbers:
            raise _Spoiled
        self._shape(here[0])
        values = [self.working.partition.shapes[name].value if name else None for name in node.input[1:]]
        if any(name and value is None for name, value in zip(node.input[1:], values, strict=True)):
            raise _Spoiled
        moved = evaluate(node, [np.ascontiguousarray(self.numbers[here[0]]), *values], self.opset, _LARGEST)
        if moved is None:
            raise _Spoiled
        for name, numbers in zip(node.output, moved, strict=False):
            if name in self.carriers:
                self.numbers[name] = numbers

    def _sum(self, node: onnx.NodeProto) -> None:
        axis, _ = self.ranks(node.output[0])
        shape = self._shape(node.output[0])
        data = [name for name in node.input if name not in self.working.partition.constants]
        for name in (*data, *(name for name in node.input if name not in data)):
            if name not in data:
                vector = self._stored(name)
                rank, own = len(self.working.partition.stored[name].dims), self.ranks(name)[0]
                if axis - len(shape) != own - rank:
                    raise _Spoiled
                aligned = vector.reshape([-1 if a == own else 1 for a in range(rank)])
            elif name in self.numbers:
                aligned = self.numbers[name]
            else:
                raise _Spoiled
            aligned = np.broadcast_to(aligned, shape)
            known = self.numbers.setdefault(node.output[0], aligned)
            self._link(known.reshape(-1), aligned.reshape(-1), False)

    def _blocks(self) -> list[Block]:
        """Collect linked blocks, with the sites that are dual."""
        neighbours: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        for one, other, dual in self.links:
            neighbours[one].append((other, dual))
            neighbours[other].append((one, dual))
        side: dict[int, bool] = {}
        blocks = []
        for start in range(len(self.sites)):
            if start in side:
                continue
            side[start], members = False, [start]
            for number in members:  # grows during the loop
                for other, dual in neighbours[number]:
                    if other not in side:
                        side[other] = side[number] != dual
                        members.append(other)
                    elif side[other] != (side[number] != dual):
                        raise _Spoiled
            blocks.append(self._block(members, side))
        return blocks

    def _block(self, members: list[int], side: dict[int, bool]) -> Block:
        stored = tuple(
            Site(tensor=site.tensor, axis=site.axis, positions=site.positions, dual=side[number], layer=site.layer)
            for number in members
            for site in (self.sites[number],)
        )
        seen = {}
        for name, numbers in self.numbers.items():  # in graph order: the last one wins
            axis, ranks = self.ranks(name)
            moved = np.moveaxis(numbers, axis, -1).reshape(-1, len(ranks))
            if (moved != moved[:1]).any():
                continue
            for number in set(moved[0].tolist()).intersection(members):
                positions = np.flatnonzero(moved[0] == number)
                if len(positions) == self.group.width:
                    ordered = positions[np.argsort(ranks[positions])]
                    centred = number in self.cancelled or number not in self.summed
                    seen[number] = Site(name, axis, ordered, side[number], centred=centred)
        if not seen:
            raise _Spoiled
        return Block(stored, tuple(seen.values()), not self.summed.isdisjoint(members))


def softmax_cancels(working: MaskedNetwork, number: int, position: int) -> bool:
    """Whether a softmax over a product cancels a term common to all rows of one operand (e.g. of the keys)."""
    node = working.nodes[number]
    if node.op_type != "MatMul" or position != 1:
        return False
    name = node.output[0]
    while True:
        readers = [n for n in working.nodes if name in n.input]
        if len(readers) != 1 or working.uses(name) != 1:
            return False
        reader = readers[0]
        if reader.op_type == "Softmax":
            axis = next((a.i for a in reader.attribute if a.name == "axis"), -1)
            return axis in (-1, len(working.partition.shapes[name].shape or ()) - 1)
        if reader.op_type not in _BEFORE_SOFTMAX:
            return False
        name = reader.output[0]
