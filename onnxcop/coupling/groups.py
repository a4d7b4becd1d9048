"""Units, dependency groups and their incidence on tensor axes.

A *unit* is a class of atoms that may be removed: one filter with everything coupled to it. Units that lie on the same
axes equally often are interchangeable and form a *dependency group*. All costs and limits are functions of how many
indices each axis keeps, so allocation needs only the incidence of units on axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from onnxcop._base.types import IntArray
from onnxcop.coupling.atoms import Reason
from onnxcop.coupling.ops import Contraction
from onnxcop.coupling.result import Coupling
from onnxcop.coupling.tracing import axes_of


@dataclass(frozen=True, slots=True)
class DependencyGroup:
    """Interchangeable units: the channels of one layer and of everything coupled to it.

    Attributes:
        index: Position among the structure's groups.
        units: int64 [width], unit numbers, in the order of the channels.
        exact: Whether the pruned model equals the masked original when only this group is pruned.
        producers: Indices of the nodes that produce the units.
        consumers: Indices of the nodes that sum over the units.
        reasons: Why the group is inexact, if it is.
    """

    index: int
    units: IntArray
    exact: bool
    producers: tuple[int, ...]
    consumers: tuple[int, ...]
    reasons: tuple[Reason, ...]

    @property
    def width(self) -> int:
        """Number of units."""
        return len(self.units)


@dataclass(frozen=True)
class Structure:
    """Units, groups and axes of a traced model.

    Attributes:
        coupling: The coupling that it is derived from.
        unit_class: int64 [units], the class of every unit.
        class_unit: int64 [classes], the unit of every class, -1 if it may not be removed.
        axes: The distinct live axes, each as int64 classes along the axis.
        incidence: int64 sparse [units, axes], how often a unit is on an axis.
        groups: The dependency groups, in the order of their first unit.
        group_of: int64 [units].
    """

    coupling: Coupling
    unit_class: IntArray
    class_unit: IntArray
    axes: tuple[IntArray, ...]
    axis_ids: Mapping[bytes, int]
    incidence: csr_array
    groups: tuple[DependencyGroup, ...]
    group_of: IntArray
    limited_axes: IntArray

    def axis_id(self, atoms: IntArray) -> int:
        """Number of the axis that carries these atoms."""
        return self.axis_ids[self.coupling.classes.of[atoms].tobytes()]

    def units_on(self, atoms: IntArray) -> IntArray:
        """Unit at every position of an axis, -1 for positions that may not be removed."""
        return self.class_unit[self.coupling.classes.of[atoms]]

    @cached_property
    def axis_sizes(self) -> IntArray:
        """int64 [axes], the original size of every axis."""
        return np.array([len(axis) for axis in self.axes], dtype=np.int64)


def structure_of(coupling: Coupling) -> Structure:
    """Group the prunable classes of a coupling."""
    classes, findings = coupling.classes, coupling.findings
    unit_class = np.flatnonzero(_prunable(coupling))
    class_unit = np.full(len(classes), -1, dtype=np.int64)
    class_unit[unit_class] = np.arange(len(unit_class))
    limited = [*axes_of(coupling.labels), *findings.sections]
    counted = [axis for mac in findings.macs for axis in mac.axes]
    axes: dict[bytes, IntArray] = {}
    ids: dict[bytes, int] = {}
    limited_ids: list[int] = []
    for position, atoms in enumerate([*limited, *counted]):
        on_axis = classes.of[atoms]
        key = on_axis.tobytes()
        if key not in ids:
            ids[key] = len(ids)
            axes[key] = on_axis
        if position < len(limited):
            limited_ids.append(ids[key])
    incidence = _incidence(list(axes.values()), class_unit, len(unit_class))
    groups, group_of = _groups(coupling, incidence, unit_class, class_unit)
    return Structure(
        coupling=coupling,
        unit_class=unit_class,
        class_unit=class_unit,
        axes=tuple(axes.values()),
        axis_ids=ids,
        incidence=incidence,
        groups=groups,
        group_of=group_of,
        limited_axes=np.unique(np.array(limited_ids, dtype=np.int64)),
    )


def _prunable(coupling: Coupling) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Classes that may be removed: not frozen, and never a whole axis."""
    classes = coupling.classes
    allowed = ~classes.frozen
    for atoms in axes_of(coupling.labels):
        on_axis = classes.of[atoms]
        if (on_axis == on_axis[0]).all():
            allowed[on_axis[0]] = False
    return allowed


def _incidence(axes: list[IntArray], class_unit: IntArray, units: int) -> csr_array:
    rows, columns = [], []
    for column, axis in enumerate(axes):
        on_axis = class_unit[axis]
        on_axis = on_axis[on_axis >= 0]
        rows.append(on_axis)
        columns.append(np.full(len(on_axis), column, dtype=np.int64))
    row = np.concatenate(rows) if rows else np.empty(0, np.int64)
    column_ids = np.concatenate(columns) if columns else np.empty(0, np.int64)
    matrix = csr_array((np.ones(len(row), np.int64), (row, column_ids)), shape=(units, len(axes)))
    matrix.sum_duplicates()
    matrix.sort_indices()
    return matrix


def _groups(
    coupling: Coupling, incidence: csr_array, unit_class: IntArray, class_unit: IntArray
) -> tuple[tuple[DependencyGroup, ...], IntArray]:
    classes = coupling.classes
    members: dict[tuple[bytes, bytes, bool], list[int]] = {}
    indptr = incidence.indptr
    for unit in range(len(unit_class)):
        row = slice(indptr[unit], indptr[unit + 1])
        key = (
            incidence.indices[row].tobytes(), incidence.data[row].tobytes(),
            bool(classes.inexact[unit_class[unit]]),
        )  # fmt: skip
        members.setdefault(key, []).append(unit)
    group_of = np.full(len(unit_class), -1, dtype=np.int64)
    for index, units in enumerate(members.values()):
        group_of[units] = index
    producers, consumers = _layers(coupling, class_unit, group_of, len(members))
    groups = tuple(
        DependencyGroup(
            index=index, units=np.array(units, dtype=np.int64), exact=not key[2],
            producers=tuple(sorted(producers[index])), consumers=tuple(sorted(consumers[index])),
            reasons=classes.reasons.get(int(unit_class[units[0]]), ()),
        )
        for index, (key, units) in enumerate(members.items())
    )  # fmt: skip
    return groups, group_of


def _layers(
    coupling: Coupling, class_unit: IntArray, group_of: IntArray, count: int
) -> tuple[list[set[int]], list[set[int]]]:
    """The nodes that produce and that consume the units of every group."""
    producers: list[set[int]] = [set() for _ in range(count)]
    consumers: list[set[int]] = [set() for _ in range(count)]

    def note(into: list[set[int]], atoms: IntArray, contraction: Contraction) -> None:
        units = class_unit[coupling.classes.of[atoms]]
        for group in np.unique(group_of[units[units >= 0]]).tolist():
            into[group].add(contraction.node)

    for contraction in coupling.findings.contractions:
        if contraction.produced is not None:
            note(producers, contraction.produced, contraction)
        for operand in contraction.operands[:1]:
            note(consumers, operand.atoms, contraction)
    return producers, consumers
