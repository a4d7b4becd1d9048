"""Groups that can be removed as a whole: a term of a sum, an operand of a Concat, a gate.

Without any of its channels a layer computes its bias, wherever it runs. If that constant is then only added to, or
multiplied with, tensors that depend on the inputs, the network works without the layers before it: a residual branch,
the gate of squeeze-and-excitation. An operand of a Concat is simply dropped. So a block is not a pattern and has no
name: it is a group without which every output still depends on the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import onnx

from onnxcop._base.types import IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.graph.subgraphs import Scopes, captured
from onnxcop.graph.traits import Trait, traits

_ENDS = Trait.LINEAR
_MERGES = Trait.SUMS | Trait.MULTIPLIES
_ELEMENTWISE = Trait.ACTIVATES | Trait.SUMS | Trait.MULTIPLIES | Trait.DIVIDES
_OTHERS = ("BatchNormalization", "HardSwish", "Elu", "Gelu", "Erf", "Softplus", "Tanh", "Identity")


class _State(Enum):
    """State of a tensor."""

    STORED = auto()
    LIVE = auto()
    CONSTANT = auto()
    EMPTY = auto()


@dataclass(slots=True)
class Remains:
    """The top-level graph after whole groups are removed; all fields hold numbers of nodes.

    Attributes:
        ends: Layers without channels to sum over, which compute their bias.
        constant: Nodes that read constants alone because of that.
        joins: Nodes that lose operands, with their positions among the inputs.
        dead: Nodes that compute nothing any more.
    """

    ends: list[int] = field(default_factory=list)
    constant: list[int] = field(default_factory=list)
    joins: dict[int, tuple[int, ...]] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)


class Blocks:
    """The groups of a model that can be removed whole.

    Args:
        model: The traced model.
        structure: Its structure.
    """

    def __init__(self, model: onnx.ModelProto, structure: Structure) -> None:
        self.structure = structure
        self._scopes = Scopes.of(model)
        self._nodes = list(model.graph.node)
        self._held = {v.name for v in model.graph.output} | {name for n in self._nodes for name in captured(n)}
        self._axes = {
            name: [structure.axis_id(atoms) for atoms in label if atoms is not None]
            for name, label in structure.coupling.labels.items()
        }
        stored = {t.name for scope in self._scopes.all for t in scope.graph.initializer}
        self._start = dict.fromkeys(stored, _State.STORED)
        self._start |= {v.name: _State.LIVE for v in model.graph.input if v.name not in stored}
        self._kernels = {
            c.node: c.kernel
            for c in structure.coupling.findings.contractions
            if c.kernel is not None and c.kernel.changeable and c.kernel.input == 1
        }
        self._known: dict[frozenset[int], Remains | None] = {}

    def whole(self) -> tuple[int, ...]:
        """The groups that can be removed as a whole, each by itself."""
        return tuple(group.index for group in self.structure.groups if self.may_go(group.index))

    def may_go(self, group: int) -> bool:
        """Whether a group can be removed as a whole if all others stay."""
        return self._may(group) and self.without((group,)) is not None

    def without(self, groups: Iterable[int]) -> Remains | None:
        """The remains without some whole groups; None if they cannot be removed together."""
        key = frozenset(groups)
        if key not in self._known:
            units = [self.structure.groups[group].units for group in sorted(key)]
            removed = np.zeros(len(self.structure.unit_class), dtype=np.int64)
            removed[np.concatenate(units) if units else np.empty(0, np.int64)] = 1
            left = self.structure.axis_sizes - self.structure.incidence.T @ removed
            self._known[key] = self._followed(set(np.flatnonzero(left == 0).tolist()))
        return self._known[key]

    def _may(self, group: int) -> bool:
        """Whether a group is exact, and recovery can change its layers."""
        candidate = self.structure.groups[group]
        statistics = self.structure.coupling.findings.statistics
        inside = max((*candidate.producers, *candidate.consumers), default=0) < self._scopes.outer
        counted = any(np.isin(self.structure.units_on(entry.atoms), candidate.units).any() for entry in statistics)
        return candidate.exact and bool(candidate.consumers) and inside and not counted

    def _followed(self, empty: set[int]) -> Remains | None:
        """Visit the graph with some axes empty."""
        remains, states = Remains(), dict(self._start)
        hollow = {name for name, axes in self._axes.items() if not empty.isdisjoint(axes)}
        states |= dict.fromkeys(hollow & states.keys(), _State.EMPTY)
        for number, node in enumerate(self._nodes):
            outputs = [name for name in node.output if name]
            lost = [name in hollow for name in outputs]
            if any(lost):
                if not all(lost):
                    return None
                remains.dead.add(number)
                states |= dict.fromkeys(outputs, _State.EMPTY)
                continue
            state = self._state(number, node, states, remains)
            if state is None or (state in (_State.CONSTANT, _State.EMPTY) and not self._held.isdisjoint(outputs)):
                return None
            states |= dict.fromkeys(outputs, state)
        return None if not hollow.isdisjoint(self._held) else remains

    def _state(
        self, number: int, node: onnx.NodeProto, states: dict[str, _State], remains: Remains
    ) -> _State | None:  # fmt: skip
        """State of the results of a node that still has elements; None if it can no longer run."""
        inputs = [states.get(name, _State.STORED) if name else None for name in node.input]
        empty = [place for place, state in enumerate(inputs) if state is _State.EMPTY]
        live = any(state is _State.LIVE for state in inputs) or any(
            states.get(name) is _State.LIVE for name in captured(node)
        )
        if empty:
            if number in self._kernels and set(empty) == {0, 1}:
                remains.ends.append(number)
                return _State.CONSTANT
            if node.op_type == "Concat" and _State.CONSTANT not in inputs and live:
                remains.joins[number] = tuple(empty)
                return _State.LIVE
            return None
        if _State.CONSTANT not in inputs:
            return _State.LIVE if live else _State.STORED
        if not live and (traits(node) & _ELEMENTWISE or node.op_type in _OTHERS):
            remains.constant.append(number)
            return _State.CONSTANT
        return _State.LIVE if traits(node) & _MERGES and self._covers(node, inputs) else None

    def _covers(self, node: onnx.NodeProto, inputs: list[_State | None]) -> bool:
        """Whether the operands that depend on the inputs have the shape of the result.

        Then a constant operand may be smaller.
        """
        shapes = self.structure.coupling.shapes
        result_shape = shapes[node.output[0]].shape
        return result_shape is not None and any(
            state is _State.LIVE and shapes[name].shape == result_shape
            for name, state in zip(node.input, inputs, strict=True)
        )


def emptied(structure: Structure, removed: IntArray) -> tuple[int, ...]:
    """The groups of which all units are removed."""
    counts = np.bincount(structure.group_of[removed], minlength=len(structure.groups))
    return tuple(group.index for group in structure.groups if counts[group.index] == group.width)
