"""The interface of an operator rule: one node, the labels of its operands, and the verbs of coupling.

A *label* has one entry per axis of a tensor: the atoms along that axis (int64, as long as the axis), or None if the
axis is rigid, that is, never pruned. A rule reads the labels of its inputs and relates them (`tie`, `freeze`,
`contract`). It states which sizes and indices stored in the graph follow from them (`size`, `ratio`, `index`, `split`),
and gives every output a label (`emit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, IntArray
from onnxcop.coupling.atoms import AtomPool, Reason
from onnxcop.coupling.ops.facts import (
    AxesEdit,
    Choice,
    Contraction,
    Findings,
    IndexEdit,
    Mac,
    Operand,
    PinEdit,
    RatioEdit,
    SizeEdit,
    SplitEdit,
    Statistic,
)
from onnxcop.graph.linear import Kernel
from onnxcop.graph.shapes import Shape, TensorInfo

Label = tuple[IntArray | None, ...]
Rule = Callable[["Op"], None]
RuleTable = Mapping[tuple[str, str], Rule]


class Decline(Exception):
    """Raised by a rule that cannot follow its node: everything that the node touches is frozen, with the reason."""


@dataclass(slots=True)
class Op:
    """One node as a rule sees it; inputs and outputs are addressed by position."""

    index: int
    node: onnx.NodeProto
    opset: int
    attributes: dict[str, Any]
    infos: Sequence[TensorInfo | None]
    out_infos: Sequence[TensorInfo]
    pool: AtomPool
    findings: Findings
    label_of: Callable[[str], Label | None]
    preferred: Mapping[int, int]
    constants: Set[str]
    policy: str = "finest"
    labels_out: dict[int, Label | None] = field(default_factory=dict)
    handled: list[IntArray] = field(default_factory=list)
    seen: dict[int, Label] = field(default_factory=dict)

    # ---- reading -----------------------------------------------------------------------------
    @property
    def count(self) -> int:
        """Number of inputs, including absent ones before the last."""
        return len(self.infos)

    def has(self, position: int) -> bool:
        """Whether input `position` is present."""
        return position < len(self.infos) and self.infos[position] is not None

    def shape(self, position: int) -> Shape:
        """Concrete shape of an input; raises :class:`Decline` if it is unknown."""
        info = self.infos[position] if position < len(self.infos) else None
        if info is None or info.shape is None:
            raise Decline(f"{self.node.op_type} with an input of unknown shape")
        return info.shape

    def out_shape(self, position: int = 0) -> Shape:
        """Concrete shape of an output; raises :class:`Decline` if it is unknown."""
        shape = self.out_infos[position].shape
        if shape is None:
            raise Decline(f"{self.node.op_type} with an output of unknown shape")
        return shape

    def label(self, position: int) -> Label:
        """Label of an input; all None if it carries no atoms or is absent."""
        if position in self.seen:
            return self.seen[position]
        if not self.has(position):
            return ()
        label = self.label_of(self.node.input[position])
        if label is None:
            info = self.infos[position]
            shape = info.shape if info is not None else None
            label = (None,) * len(shape or ())
        self.seen[position] = label
        return label

    def value(self, position: int) -> Array | None:
        """The constant value of an input, None if it is not known before the run."""
        if not self.has(position):
            return None
        self.findings.values_read.add(self.node.input[position])
        info = self.infos[position]
        return None if info is None else info.value

    def written(self, position: int, element: int) -> bool:
        """Whether an element of a constant input is a plain number, not computed from a runtime size."""
        value, info = self.value(position), self.infos[position]
        if value is None or info is None:
            return False
        return info.varies is None or not bool(info.varies.reshape(-1)[element])

    def ints(self, position: int, attribute: str) -> list[int] | None:
        """A list of integers that newer opsets give as an input and older ones as an attribute."""
        if attribute in self.attributes:
            return [int(v) for v in self.attributes[attribute]]
        if not self.has(position):
            return None
        value = self.value(position)
        if value is None:
            raise Decline(f"{self.node.op_type} whose {attribute} are computed from data")
        return [int(v) for v in np.atleast_1d(value)]

    def constant(self, position: int) -> bool:
        """Whether an input is computed from initializers alone."""
        return self.has(position) and self.node.input[position] in self.constants

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, or `default`."""
        return self.attributes.get(name, default)

    # ---- relating ----------------------------------------------------------------------------
    def tie(self, left: IntArray | None, right: IntArray | None, what: str = "") -> IntArray | None:
        """Tie two axes and return the common label; if one is rigid, the other is frozen."""
        if left is None or right is None:
            live = left if left is not None else right
            if live is not None:
                self.freeze(live, what or "is combined with an axis that is never pruned")
            return None
        if len(left) != len(right):
            raise Decline(f"{self.node.op_type} between axes of {len(left)} and {len(right)}")
        self.handled += (left, right)
        self.pool.tie(left, right)
        return left

    def balance(self, groups: IntArray, why: str) -> None:
        """State that equally many of every row of `groups` (int64 [groups, size]) must be removed together."""
        self.handled.append(groups.reshape(-1))
        self.pool.balance(groups, Reason(why, self.where))

    def freeze(self, atoms: IntArray | None, why: str, *, given: bool = False) -> None:
        """Forbid the removal of `atoms` because of this node, or (`given`) because of the purpose of the model."""
        if atoms is not None:
            self.handled.append(atoms)
            self.pool.freeze(atoms, Reason(why, self.where, given))

    def freeze_axes(self, position: int, axes: Sequence[int], why: str) -> None:
        """Freeze the given axes of an input."""
        label = self.label(position)
        for axis in axes:
            self.freeze(label[axis], why)

    def inexact(self, atoms: IntArray | None, why: str) -> None:
        """State that this node computes a statistic over `atoms`."""
        if atoms is not None:
            self.handled.append(atoms)
            self.pool.mark_inexact(atoms, Reason(why, self.where))
            self.findings.statistics.append(Statistic(self.index, atoms))

    def contract(
        self, *operands: tuple[int, int], kernel: Kernel | None = None, produced: IntArray | None = None
    ) -> None:
        """Tie the contracted axes, given as (input, axis), and record the contraction."""
        labels = [self.label(position)[axis] for position, axis in operands]
        first = labels[0]
        for other in labels[1:]:
            first = self.tie(first, other, "is contracted with an axis that is never pruned")
        live = [
            Operand(position, axis, label)
            for (position, axis), label in zip(operands, labels, strict=True)
            if label is not None
        ]
        self.handled += [operand.atoms for operand in live]
        if live and len(live) == len(operands):
            self.findings.contractions.append(Contraction(self.index, tuple(live), kernel, produced))
        elif kernel is not None:
            self.findings.contractions.append(Contraction(self.index, (), kernel, produced))

    def drop(self, atoms: IntArray | None) -> None:
        """State that this node drops (part of) an axis, so that its indices end here."""
        if atoms is not None:
            self.handled.append(atoms)

    def macs(self, scale: float, *axes: IntArray | int | None) -> None:
        """Record multiply-accumulates: `scale` × the product of the axes (numbers count as they are)."""
        live: list[IntArray] = []
        for axis in axes:
            if isinstance(axis, np.ndarray):
                live.append(axis)
            elif axis is not None:
                scale *= axis
        self.findings.macs.append(Mac(self.index, float(scale), tuple(live)))

    def choose(self, options: int, atoms: IntArray, default: int = 0) -> int:
        """Pick one of several couplings; another is tried later if this one ends frozen."""
        taken = self.preferred.get(self.index, default)
        taken = taken if taken < options else default
        self.findings.choices.append(Choice(self.index, taken, options, atoms))
        return taken

    # ---- facts for rewriting -----------------------------------------------------------------
    def size(self, where: int | str, element: int, atoms: IntArray | None, whole: IntArray | None = None) -> None:
        """A number written in the graph equals the kept count of `atoms` (a leading part of `whole`)."""
        if atoms is not None:
            self.findings.edits.append(
                SizeEdit(node=self.index, where=where, element=element, atoms=atoms, whole=whole)
            )

    def ratio(self, name: str, atoms: IntArray | None, per: IntArray | int) -> None:
        """An attribute equals a ratio of kept counts."""
        if atoms is not None:
            self.findings.edits.append(RatioEdit(self.index, name, atoms, per))

    def pin(self, name: str, value: float | list[int], atoms: IntArray | None) -> None:
        """An attribute with a default that would change with `atoms` keeps its value."""
        if atoms is not None:
            self.findings.edits.append(PinEdit(self.index, name, value, atoms))

    def index_into(self, position: int, atoms: IntArray, axis: int = 0) -> None:
        """An input holds indices into an axis carrying `atoms`; along its own `axis` they can be removed."""
        self.findings.edits.append(IndexEdit(self.index, position, atoms, axis))

    def split_into(self, sections: Sequence[IntArray]) -> None:
        """The node cuts an axis into `sections`; none of them may become empty."""
        self.findings.edits.append(SplitEdit(self.index, tuple(sections)))
        self.never_empty(*sections)

    def never_empty(self, *sections: IntArray | None) -> None:
        """Parts of an axis that must each keep an index."""
        self.findings.sections.extend(section for section in sections if section is not None)

    def drops(self, axes: Sequence[int], live: Sequence[IntArray]) -> None:
        """The node drops the axes of size 1 without naming them."""
        self.findings.edits.append(AxesEdit(self.index, tuple(axes), tuple(live)))

    def emit(self, label: Sequence[IntArray | None], position: int = 0) -> None:
        """Give an output its label."""
        if position < len(self.node.output) and self.node.output[position]:
            self.labels_out[position] = tuple(label)

    @property
    def where(self) -> str:
        """The node's name, or its type and first output if it has none."""
        if self.node.name:
            return self.node.name
        named = next((name for name in self.node.output if name), "")
        return f"{self.node.op_type} → {named}"
