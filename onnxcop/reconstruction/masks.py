"""Masks for removed units: replacements of a network's nodes that keep the original's shapes.

A removed unit ends at a sum. There its weights are set to zero, or one factor of a product of activations is multiplied
by a mask. A node that computes a statistic (LayerNormalization, a mean) sees only the remaining channels, as it will in
the written file: they are gathered before it, and its results are scattered to the original positions. All other
operators pass removed channels on. Nodes without removed units stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array, BoolArray, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import Contraction, Operand
from onnxcop.graph.io import values_of
from onnxcop.graph.subgraphs import Scope, Scopes
from onnxcop.runtime.segments import Replacement

Changed = dict[tuple[Any, ...], "onnx.TensorProto | None"]  # stored tensors without what is removed, shared by nodes

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


Hold = Callable[[onnx.TensorProto], onnx.TensorProto]


def _kept(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return tensor


@dataclass
class UnitMasks:
    """Masks of one network for its current weights and units.

    Attributes:
        structure: Units of the original.
        scopes: The network's graphs.
        stored: Its stored tensors, by name.
        held: Where new tensors of its top-level graph are put; by default they stay in memory.
    """

    structure: Structure
    scopes: Scopes
    stored: Mapping[str, onnx.TensorProto]
    held: Hold = _kept
    _sums: dict[int, list[Contraction]] = field(init=False)
    _statistics: set[int] = field(init=False)

    def __post_init__(self) -> None:
        findings = self.structure.coupling.findings
        self._sums = defaultdict(list)
        for contraction in findings.contractions:
            if contraction.operands:
                self._sums[contraction.node].append(contraction)
        self._statistics = {entry.node for entry in findings.statistics}

    @cached_property
    def _units(self) -> dict[int, IntArray]:
        """Units that each node sums over or computes a statistic over."""
        by_node: dict[int, set[int]] = defaultdict(set)
        for number, contractions in self._sums.items():
            for contraction in contractions:
                for operand in contraction.operands:
                    by_node[number].update(self._known(operand.atoms))
        for entry in self.structure.coupling.findings.statistics:
            by_node[entry.node].update(self._known(entry.atoms))
        return {number: np.array(sorted(units), dtype=np.int64) for number, units in by_node.items() if units}

    def _known(self, atoms: IntArray) -> list[int]:
        units = np.unique(self.structure.units_on(atoms))
        return units[units >= 0].tolist()  # type: ignore[no-any-return]

    @cached_property
    def _inside(self) -> dict[int, list[int]]:
        """By node of the top-level graph: the nodes in its bodies at which a unit ends."""
        inside: dict[int, list[int]] = defaultdict(list)
        for number in self._units:
            if number >= self.scopes.outer:
                inside[self.scopes.place(number)].append(number)
        return inside

    def places(self, units: IntArray) -> list[int]:
        """Positions of the top-level nodes that change when units are removed, ascending."""
        return sorted({self.scopes.place(n) for n, own in self._units.items() if np.isin(own, units).any()})

    def of(self, numbers: Iterable[int], alive: BoolArray) -> dict[int, Replacement]:
        """Replacements of top-level nodes, by number; unchanged nodes are left out."""
        changed: Changed = {}
        pairs = ((number, self._outer(number, alive, changed)) for number in numbers)
        return {number: replacement for number, replacement in pairs if replacement is not None}

    def _outer(self, number: int, alive: BoolArray, changed: Changed) -> Replacement | None:
        inner = self._inside.get(number)
        if inner is None:
            return self._replacement(number, alive, changed)
        if all(alive[self._units[n]].all() for n in inner):
            return None
        node = onnx.NodeProto()
        node.CopyFrom(self.scopes.nodes[number])
        for attribute in node.attribute:
            if attribute.type == attribute.GRAPH:
                self._mask_body(attribute.g, self._body(number, attribute.name), alive)
        return Replacement((node,), ())  # no units end at a node with bodies itself

    def _body(self, owner: int, attribute: str) -> Scope:
        return self.scopes.bodies()[owner, attribute]

    def _mask_body(self, copy: onnx.GraphProto, scope: Scope, alive: BoolArray) -> None:
        """Put masks into a copy of a body, and into the bodies inside it."""
        nodes: list[onnx.NodeProto] = []
        changed: Changed = {}
        for place, source in enumerate(copy.node):
            number = scope.first + place
            node = onnx.NodeProto()
            node.CopyFrom(source)
            for attribute in node.attribute:
                if attribute.type == attribute.GRAPH:
                    self._mask_body(attribute.g, self._body(number, attribute.name), alive)
            replacement = self._replacement(number, alive, changed, node)
            nodes += [node] if replacement is None else replacement.nodes
            stored = {tensor.name for tensor in copy.initializer}
            copy.initializer.extend(
                t for t in (() if replacement is None else replacement.tensors) if t.name not in stored
            )
        del copy.node[:]
        copy.node.extend(nodes)

    def _replacement(
        self, number: int, alive: BoolArray, changed: Changed, node: onnx.NodeProto | None = None
    ) -> Replacement | None:
        units = self._units.get(number)
        if units is None or alive[units].all():
            return None
        writer = _Writer(
            masks=self,
            number=number,
            alive=alive,
            changed=changed,
            held=self.held if node is None else _kept,
            node=self.scopes.nodes[number] if node is None else node,
        )
        if number in self._statistics:
            writer.gather()
        else:
            for contraction in self._sums[number]:
                writer.end(contraction)
        return writer.found()


class _Writer:
    """Writes the replacement of one node."""

    def __init__(
        self, *, masks: UnitMasks, number: int, alive: BoolArray, changed: Changed, node: onnx.NodeProto,
        held: Hold,
    ) -> None:  # fmt: skip
        self.structure, self.stored, self.number, self.changed = masks.structure, masks.stored, number, changed
        self.held = held
        self.alive = np.append(alive, True)  # the last label stands for units that are not removable
        self.node = onnx.NodeProto()
        self.node.CopyFrom(node)
        self.names = list(node.input)
        self.before: list[onnx.NodeProto] = []
        self.after: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.ends: dict[int, list[tuple[int, BoolArray, Any]]] = defaultdict(list)
        self.takes: dict[int, list[tuple[int, IntArray]]] = defaultdict(list)

    def found(self) -> Replacement | None:
        """The complete replacement of the node; None if nothing changed."""
        for position, ends in self.ends.items():
            key = (self.names[position], *(part for axis, removed, _ in ends for part in (axis, removed.tobytes())))
            if key not in self.changed:
                self.changed[key] = self._zeroed(position, ends)
            self._replace(position, self.changed[key])
        for position, takes in self.takes.items():
            key = (self.names[position], "cut", *(part for axis, kept in takes for part in (axis, kept.tobytes())))
            if key not in self.changed:
                self.changed[key] = self._cut(position, takes)
            self._replace(position, self.changed[key])
        if not self.tensors:
            return None
        return Replacement((*self.before, self.node, *self.after), tuple(self.tensors))

    def _replace(self, position: int, tensor: onnx.TensorProto | None) -> None:
        if tensor is not None:
            self.node.input[position] = tensor.name
            self.tensors.append(tensor)

    def _zeroed(self, position: int, ends: Sequence[tuple[int, BoolArray, Any]]) -> onnx.TensorProto | None:
        """Stored weights with removed units set to zero; None if they are zero already."""
        before = values_of(self.stored[self.names[position]])
        changes = [((slice(None),) * axis + (removed,), zero) for axis, removed, zero in ends]
        if not any((before[place] != zero).any() for place, zero in changes):
            return None
        values = before.copy()
        for place, zero in changes:
            values[place] = zero
        return self.held(numpy_helper.from_array(values, f"{self.names[position]}__ended_{self.number}_{position}"))

    def _cut(self, position: int, takes: Sequence[tuple[int, IntArray]]) -> onnx.TensorProto:
        """Stored parameters of the remaining channels."""
        values = values_of(self.stored[self.names[position]])
        for axis, kept in takes:
            values = np.take(values, kept, axis=axis)
        cut = numpy_helper.from_array(np.ascontiguousarray(values), f"{self.names[position]}__cut_{self.number}")
        return self.held(cut)

    def _present(self, atoms: IntArray) -> BoolArray:
        return np.asarray(self.alive[self.structure.units_on(atoms)])

    def _constant(self, values: Array, what: str) -> str:
        name = f"mask_{self.number}_{what}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def end(self, contraction: Contraction) -> None:
        """End units at a sum: zero stored weights, or else a mask on one of the factors."""
        operand = next((o for o in contraction.operands if self.names[o.input] in self.stored), None)
        present = self._present((operand or contraction.operands[0]).atoms)
        if present.all():
            return
        if operand is None:
            self._mask(contraction.operands[0], present)
        else:
            self.ends[operand.input].append((operand.axis, ~present, self._zero(contraction)))

    def _zero(self, contraction: Contraction) -> Any:
        """Representation of zero: the zero point of quantized weights, one for all outputs or one for each."""
        kernel = contraction.kernel
        if kernel is None or kernel.zero is None or kernel.zero >= len(self.names):
            return 0
        stored = self.stored.get(self.names[kernel.zero])
        if stored is None:
            return 0
        zero = values_of(stored)
        if zero.size == 1:
            return zero.reshape(-1)[0]
        rank = len(self.stored[self.names[kernel.input]].dims)
        return zero.reshape([-1 if axis == kernel.out_axis else 1 for axis in range(rank)])

    def _mask(self, operand: Operand, present: BoolArray) -> None:
        """Insert a mask between the node and one of its inputs."""
        info = self.structure.coupling.shapes[self.names[operand.input]]
        shape = [-1 if axis == operand.axis else 1 for axis in range(len(info.shape or ()))]
        what = f"{operand.input}_{operand.axis}"
        result = f"{self.names[operand.input]}__masked_{self.number}_{what}"
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.elem_type)
        source = self.node.input[operand.input]
        if info.elem_type in _FLOATS:
            mask = self._constant(present.astype(dtype).reshape(shape), what)
            self.before.append(onnx.helper.make_node("Mul", [source, mask], [result]))
        else:
            mask, zero = self._constant(present.reshape(shape), what), self._constant(np.zeros((), dtype), f"{what}_0")
            self.before.append(onnx.helper.make_node("Where", [mask, source, zero], [result]))
        self.node.input[operand.input] = result

    def gather(self) -> None:
        """Evaluate the node on the remaining channels and scatter its results over all positions."""
        for position, name in enumerate(self.names):
            for axis, present in self._incomplete(name):
                self._take(position, axis, np.flatnonzero(present))
        for position, name in enumerate(self.node.output):
            for axis, present in self._incomplete(name):
                self._spread(position, axis, np.where(present, np.cumsum(present) - 1, 0))

    def _incomplete(self, name: str) -> list[tuple[int, BoolArray]]:
        """Axes of a tensor with removed units, and the positions that remain on each."""
        label = self.structure.coupling.labels.get(name) or ()
        axes = [(axis, self._present(atoms)) for axis, atoms in enumerate(label) if atoms is not None]
        return [(axis, present) for axis, present in axes if not present.all()]

    def _take(self, position: int, axis: int, kept: IntArray) -> None:
        if self.names[position] in self.stored:
            self.takes[position].append((axis, kept))
            return
        result = f"{self.names[position]}__masked_{self.number}_{position}_{axis}"
        indices = self._constant(kept, f"kept_{position}_{axis}")
        self.before.append(onnx.helper.make_node("Gather", [self.node.input[position], indices], [result], axis=axis))
        self.node.input[position] = result

    def _spread(self, position: int, axis: int, ranks: IntArray) -> None:
        result = self.node.output[position]
        inner = f"{result}__cut_{self.number}_{axis}"
        indices = self._constant(ranks.astype(np.int64), f"spread_{position}_{axis}")
        self.after.insert(0, onnx.helper.make_node("Gather", [inner, indices], [result], axis=axis))
        self.node.output[position] = inner
