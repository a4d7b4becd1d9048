"""The classes of a model: the axis of an output with entries that separate filters produce.

The model is analysed with its outputs open, so an entry of an output is a unit like any other: the row of the last
layer, its bias, and everything computed from it. Classes are neighbouring, interchangeable entries of one axis, one
unit each. No architecture is known by name: a classifier's whole axis is such a run, and in a detector's `[N, 4 + C,
A]` the boxes before it are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import IntArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.kept_classes import ClassWish, KeptClasses
from onnxcop.coupling.ops.op import Op, Rule, RuleTable
from onnxcop.errors import ModelError
from onnxcop.images.declared import class_names

_BOX = 4  # entries of an output of boxes
_FEWEST = 16  # sizes from which an axis beside an axis of size four is one of boxes


@dataclass(frozen=True, slots=True)
class ClassAxis:
    """An axis of an output with a run of interchangeable entries.

    Attributes:
        output: Name of the output.
        axis: The axis.
        first: The first entry of the run.
        units: int64 [classes], the unit of every entry.
    """

    output: str
    axis: int
    first: int
    units: IntArray


def open_rules(rules: RuleTable, weighed: list[IntArray]) -> dict[tuple[str, str], Rule]:
    """Rules that allow removing entries that a softmax runs over.

    Args:
        rules: The usual rules.
        weighed: Receives the atoms of the axes that a softmax runs over.
    """

    def along(usual: Rule) -> Rule:
        def rule(op: Op) -> None:
            label, shape = op.label(0), op.shape(0)
            first = op.attr("axis", -1 if op.opset >= 13 else 1) % max(len(shape), 1)
            over = [first] if op.opset >= 13 else [axis for axis in range(first, len(shape)) if shape[axis] > 1]
            atoms = label[over[0]] if len(over) == 1 else None
            if atoms is None:
                usual(op)
                return
            weighed.append(atoms)
            op.emit(label)

        return rule

    names = (("", "Softmax"), ("", "LogSoftmax"))
    return {**rules, **{name: along(rules[name]) for name in names if name in rules}}


def find_classes(analysis: Analysis, wish: ClassWish) -> tuple[tuple[ClassAxis, ...], KeptClasses]:
    """Find the axes with the classes, in every output that shares them, and the entries to keep.

    Args:
        analysis: A model analysed with open outputs.
        wish: The classes to keep.

    Raises:
        ModelError: No output holds removable classes, several might, or a class does not exist.
    """
    names = class_names(analysis.original)
    if wish.output not in (None, *(value.name for value in analysis.original.graph.output)):
        raise ModelError(f"--classes: the model has no output {wish.output!r}; {_outputs(analysis)}")
    candidates = _candidates(analysis, wish, len(names))
    if not candidates:
        raise ModelError(f"--classes: no axis of an output holds classes that can be cut: {_obstacle(analysis, wish)}")
    sets = {frozenset(entry.units.tolist()) for entry in candidates}
    sized = {units for units in sets if len(units) == len(names)}
    chosen = sized if len(sized) == 1 else sets
    if len(chosen) > 1:
        listed = ", ".join(f"{entry.output} (axis {entry.axis}, {len(entry.units)})" for entry in candidates)
        raise ModelError(f"--classes: several outputs may hold the classes: {listed}; write --classes OUTPUT:0,2,5")
    (units,) = chosen
    axes = tuple(entry for entry in candidates if frozenset(entry.units.tolist()) == units)
    return axes, _kept(wish, axes[0], names if len(names) == len(units) else (), analysis)


def has_classes(analysis: Analysis, wish: ClassWish) -> bool:
    """Whether an output may hold classes on the open axis."""
    return bool(_candidates(analysis, wish, len(class_names(analysis.original))))


def _kept(wish: ClassWish, place: ClassAxis, names: Sequence[str], analysis: Analysis) -> KeptClasses:
    count, numbers = len(place.units), []
    for entry in wish.entries:
        if isinstance(entry, str) and entry not in names:
            known = f"its classes are {', '.join(names)}" if names else "its metadata name none; give numbers"
            raise ModelError(f"--classes: {analysis.source} has no class called {entry!r}; {known}")
        number = names.index(entry) if isinstance(entry, str) else entry
        if number >= count:
            raise ModelError(f"--classes: there is no class {number}; output {place.output!r} has 0 to {count - 1}")
        numbers.append(number)
    kept = tuple(sorted(set(numbers)))
    return KeptClasses(
        output=place.output, axis=place.axis, first=place.first, kept=kept, count=count,
        names=tuple(names[number] for number in kept) if names else (), original=analysis.sha256,
    )  # fmt: skip


def _candidates(analysis: Analysis, wish: ClassWish, named: int) -> list[ClassAxis]:
    """All axes of outputs that may hold classes, with their runs."""
    structure = analysis.structure
    candidates: list[ClassAxis] = []
    for value in analysis.original.graph.output:
        if wish.output not in (None, value.name):
            continue
        label = structure.coupling.labels.get(value.name, ())
        shape = structure.coupling.shapes[value.name].shape or ()
        for axis, atoms in enumerate(label):
            if atoms is None or len(atoms) < 2:
                continue
            run = _classes(structure.units_on(atoms), structure.group_of, shape, axis, named)
            if run is not None:
                candidates.append(ClassAxis(value.name, axis, *run))
    boxes = [entry for entry in candidates if _holds_boxes(entry, analysis)]
    return [entry for entry in candidates if len(boxes) == len(candidates) or entry not in boxes]


def _holds_boxes(entry: ClassAxis, analysis: Analysis) -> bool:
    shape = analysis.structure.coupling.shapes[entry.output].shape or ()
    return len(shape) == 3 and shape[2] == _BOX and entry.axis == 2 and shape[1] >= _FEWEST


def _classes(
    units: IntArray, group_of: IntArray, shape: Sequence[int], axis: int, named: int
) -> tuple[int, IntArray] | None:
    """The run of classes on an axis: as many as are named, else the longest; its start and its units."""
    _, places, counts = np.unique(units, return_inverse=True, return_counts=True)
    alone = (units >= 0) & (counts[places] == 1)
    groups = -1 - np.arange(len(units))
    groups[alone] = group_of[units[alone]]
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    runs = [(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(units)], strict=True) if alone[a] and b - a > 1]
    if not runs:
        return None
    first, last = max(runs, key=lambda run: (run[1] - run[0] == named, run[1] - run[0]))
    if named and last - first > named:  # an entry before the classes is produced like them: objectness
        first = last - named
    elif not named and first == _BOX and axis == len(shape) - 1 and last - first > 2:
        first += 1  # [N, A, 5 + C], as `onnxcop.outputs.detections` reads it: box, objectness, classes
    return first, units[first:last]


def _obstacle(analysis: Analysis, wish: ClassWish) -> str:
    """Why the given outputs hold no removable classes."""
    outputs = [value.name for value in analysis.original.graph.output if wish.output in (None, value.name)]
    return "; ".join(f"{name!r}: {_reason(analysis, name)}" for name in outputs[:3])


def _reason(analysis: Analysis, output: str) -> str:
    """The reason why entries of an output cannot be removed: the nearest node before it that forbids it."""
    coupling = analysis.structure.coupling
    makers = {name: node for node in analysis.model.graph.node for name in node.output}
    names, seen = [output], {output}
    for name in names:
        atoms = [atoms for atoms in coupling.labels.get(name, ()) if atoms is not None and len(atoms) > 1]
        classes = sorted({int(index) for axis in atoms for index in coupling.classes.of[axis]})
        frozen = next((index for index in classes if coupling.classes.frozen[index]), None)
        if frozen is not None:
            return str(coupling.classes.reasons[frozen][0])
        before = [] if name not in makers or classes else [entry for entry in makers[name].input if entry not in seen]
        names += before
        seen.update(before)
    return "its entries are not made by filters of their own"


def _outputs(analysis: Analysis) -> str:
    return f"its outputs are {', '.join(value.name for value in analysis.original.graph.output)}"
