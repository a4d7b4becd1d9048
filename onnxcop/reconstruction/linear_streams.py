"""Linear streams: channels that no operator between the layers that write and read them distinguishes.

If channels are only added, averaged, moved or scaled alike before the next layers sum over them, any invertible mix of
them is equivalent. The layers that write them write the mix, and the layers that read them undo it. An example is the
shortcut path of a block without a final activation. Such a stream can be written in a basis whose channels are
redundant by construction, before any of them is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import onnx

from onnxcop._base.types import IntArray
from onnxcop.analysis.layers import Layer
from onnxcop.coupling.groups import DependencyGroup
from onnxcop.coupling.ops.facts import Contraction
from onnxcop.graph.traits import Trait, scales, traits
from onnxcop.reconstruction.network import MaskedNetwork

T = TypeVar("T")

_EXACT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)  # other types would be rounded again


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a stream in a stored tensor: `axis` consists of `outer` × channels × `inner` positions."""

    name: str
    axis: int
    outer: int
    inner: int


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization by stored statistics directly behind a layer that writes a stream.

    It scales each channel by its own factor. The layer's weights can absorb the factor, so that only the shift remains.
    """

    kernel: Place
    bias: Place | None
    scale: str
    shift: str
    mean: str
    variance: str
    epsilon: float


@dataclass(frozen=True, slots=True)
class Stream:
    """The channels of a group that may be mixed.

    Attributes:
        group: The group, with its units in the same order everywhere.
        made: Stored tensors that write the channels: kernels by their outputs, biases, constants added.
        read: Kernels that sum over the channels.
        layers: The layers of these kernels.
        norms: Normalizations to fold into the kernels before channels are mixed.
    """

    group: DependencyGroup
    made: tuple[Place, ...]
    read: tuple[Place, ...]
    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]


def linear_streams(working: MaskedNetwork) -> list[Stream]:
    """Find all groups of a network with channels that may be mixed."""
    finder = _Finder(working)
    for number, node in enumerate(working.nodes):
        finder.visit(number, node)
    return list(finder.found())


@dataclass
class _Finder:
    working: MaskedNetwork
    carried: dict[str, dict[int, tuple[int, int, int]]] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)
    made: dict[int, list[Place]] = field(default_factory=dict)
    read: dict[int, list[Place]] = field(default_factory=dict)
    norms: dict[int, list[Norm]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        structure = self.working.analysis.structure
        self.groups = structure.groups
        self.layers: dict[int, Layer] = {layer.node: layer for layer in self.working.layers}
        self.contractions: dict[int, Contraction] = {c.node: c for c in structure.coupling.findings.contractions}
        for name, label in structure.coupling.labels.items():
            for axis, atoms in enumerate(label or ()):
                if atoms is not None:
                    self._carry(name, axis, structure.units_on(atoms))

    def _carry(self, name: str, axis: int, units: IntArray) -> None:
        present = np.unique(self.working.analysis.structure.group_of[units[units >= 0]]).tolist()
        if not present:
            return
        blocks = _blocks(units, self.groups[present[0]].units) if len(present) == 1 else None
        if blocks is None or any(index == present[0] for index, *_ in self.carried.get(name, {}).values()):
            self.spoiled.update(present)
            return
        self.carried.setdefault(name, {})[axis] = (present[0], *blocks)

    def on(self, name: str) -> dict[int, tuple[int, Place]]:
        """Find the places of streams in a tensor: axis and place by group."""
        return {
            group: (axis, Place(name, axis, outer, inner))
            for axis, (group, outer, inner) in self.carried.get(name, {}).items()
        }

    def visit(self, number: int, node: onnx.NodeProto) -> None:
        """Record the effect of a node on the streams that it touches."""
        touched = {group for name in (*node.input, *node.output) for group in self.on(name)}
        if not touched:
            return
        contraction = self.contractions.get(number)
        if number >= self.working.partition.count:
            self.spoiled |= touched
        elif contraction is not None and contraction.kernel is not None:
            for group in touched:
                self._product(node, contraction, group)
        else:
            for group in touched:
                self._between(node, group)

    def _product(self, node: onnx.NodeProto, contraction: Contraction, group: int) -> None:
        """Handle a layer: its kernel writes the stream, reads it, or both."""
        kernel = contraction.kernel
        assert kernel is not None
        weight = node.input[kernel.input]
        if kernel.groups != 1 or not kernel.changeable or not self._own(weight):
            self.spoiled.add(group)
            return
        summed = {(operand.input, operand.axis) for operand in contraction.operands}
        for position, name in enumerate(node.input):
            if group not in self.on(name):
                continue
            axis, place = self.on(name)[group]
            if name == weight:
                self._note(self.made if axis == kernel.out_axis else self.read, group, place)
            elif name in self.working.partition.stored:
                self._add_constant(group, place)
            elif (position, axis) not in summed:
                self.spoiled.add(group)

    def _between(self, node: onnx.NodeProto, group: int) -> None:
        """Handle an operator between layers; it must treat all channels alike."""
        if traits(node) & Trait.SIZES:
            return
        if node.op_type == "BatchNormalization":
            norm = self._norm(node, group)
            if norm is None:
                self.spoiled.add(group)
            else:
                self._note(self.norms, group, norm)
                self._note(self.made, group, self.on(norm.shift)[group][1])
            return
        here = [name for name in node.input if group in self.on(name)]
        known = traits(node)
        linear = node.domain in ("", "ai.onnx") and (
            (known & (Trait.KEEPS | Trait.AVERAGES) and len(here) == 1)
            or (known & Trait.SUMS and len(here) == len(node.input))
            or scales(node, here)
        )
        if not linear or any(group not in self.on(name) for name in node.output[:1]):
            self.spoiled.add(group)
            return
        for name in here:
            if name in self.working.partition.constants:
                if known & Trait.SUMS and name in self.working.partition.stored:
                    self._add_constant(group, self.on(name)[group][1])
                else:
                    self.spoiled.add(group)

    def _norm(self, node: onnx.NodeProto, group: int) -> Norm | None:
        """Handle a normalization that is the only reader of a layer's output."""
        working = self.working
        data, *parameters = node.input
        maker = working.partition.maker.get(data, -1)
        contraction = self.contractions.get(maker)
        carried = all(group in self.on(name) for name in (*node.input, node.output[0]))
        if contraction is None or contraction.kernel is None or working.uses(data) != 1 or not carried:
            return None
        if not all(map(self._own, parameters)) or len([name for name in node.output if name]) > 1:
            return None
        kernel, source = contraction.kernel, working.nodes[maker]
        axis, place = self.on(source.input[kernel.input]).get(group, (-1, None))
        if place is None or axis != kernel.out_axis or place.outer * place.inner > 1:
            return None
        biases = [self.on(name)[group][1] for name in source.input[2:] if group in self.on(name)]
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale, shift, mean, variance = parameters
        return Norm(
            kernel=place,
            bias=biases[0] if biases else None,
            scale=scale,
            shift=shift,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
        )

    def _add_constant(self, group: int, place: Place) -> None:
        if self._own(place.name):
            self._note(self.made, group, place)
        else:
            self.spoiled.add(group)

    def _note(self, into: dict[int, list[T]], group: int, entry: T) -> None:
        into.setdefault(group, []).append(entry)

    def _own(self, name: str) -> bool:
        """Whether a tensor is stored, read once, and of a type that can be mixed without loss."""
        stored = self.working.partition.stored.get(name)
        return stored is not None and self.working.uses(name) == 1 and stored.data_type in _EXACT_TYPES

    def found(self) -> Iterator[Stream]:
        """The groups that no operator ruled out."""
        for group in self.groups:
            made, read = self.made.get(group.index, []), self.read.get(group.index, [])
            if group.index in self.spoiled or not made or not read or group.width < 2:
                continue
            layers = [self.layers[node] for node in group.consumers if node in self.layers]
            if len(layers) == len(group.consumers) == len(read) and all(map(self.working.is_open, layers)):
                yield Stream(
                    group=group,
                    made=tuple(made),
                    read=tuple(read),
                    layers=tuple(layers),
                    norms=tuple(self.norms.get(group.index, ())),
                )


def _blocks(units: IntArray, order: Sequence[int] | IntArray) -> tuple[int, int] | None:
    """Factor an axis into (outer, inner) around all channels in order, as in Place; None if it is impossible."""
    width = len(order)
    if len(units) % width:
        return None
    for outer, inner in ((1, len(units) // width), (len(units) // width, 1)):
        if np.array_equal(units.reshape(outer, width, inner), np.broadcast_to(
            np.asarray(order)[None, :, None], (outer, width, inner)
        )):  # fmt: skip
            return outer, inner
    return None
