"""Numbers stored in a graph that depend on pruned sizes: their required and their current values.

A size reaches an operator in one of three ways: as a constant, computed from the size of a runtime tensor (`Shape →
Gather → Concat`), or mixed. Computed sizes often follow the pruning by themselves. So for every number that an operator
reads, this module computes the value that it *must* have and the value that it *would* have. The rewriter corrects the
difference and leaves the rest alone.

A number computed at run time may be a count of channels, a dynamic size, or a product of both. A wrong one is scaled,
which is correct for all dynamic sizes. Only numbers that cannot be scaled are overwritten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, BoolArray, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import Edit, IndexEdit, OrderEdit, PinEdit, RatioEdit, SizeEdit, SplitEdit
from onnxcop.graph.edit import opset_of
from onnxcop.graph.io import values_of
from onnxcop.graph.shapes import Shape, ShapeMap, evaluate, infer, shape_value
from onnxcop.graph.subgraphs import Scopes
from onnxcop.graph.traits import Trait, traits
from onnxcop.runtime.inputs import model_inputs, other_shapes

Keep = Callable[[IntArray], IntArray]


@dataclass(frozen=True, slots=True)
class SizeFix:
    """Input `input` of node `node` reads `actual` after pruning but must read `required`.

    Node None stands for a graph whose outputs are read: that of number `scope` in
    :class:`onnxcop.graph.subgraphs.Scopes`.
    """

    node: int | None
    input: int
    required: Array
    actual: Array
    scope: int = 0


def kept_positions(structure: Structure, removed: IntArray) -> Keep:
    """Return a function from the atoms of an axis to its kept positions."""
    is_removed = np.zeros(len(structure.unit_class) + 1, dtype=np.bool_)
    is_removed[removed] = True
    alive = ~is_removed[structure.class_unit]
    of = structure.coupling.classes.of

    def keep(atoms: IntArray) -> IntArray:
        return np.flatnonzero(alive[of[atoms]])

    return keep


def pruned_shape(structure: Structure, name: str, keep: Keep) -> Shape | None:
    """Shape of a tensor after pruning."""
    shape = structure.coupling.shapes[name].shape
    label = structure.coupling.labels.get(name)
    if shape is None or label is None:
        return shape
    return tuple(size if atoms is None else len(keep(atoms)) for size, atoms in zip(shape, label, strict=True))


@dataclass(frozen=True, slots=True)
class Sliced:
    """The kept part of a stored tensor, cut on access so that large tensors are not in memory twice."""

    tensor: onnx.TensorProto
    label: tuple[IntArray | None, ...]
    keep: Keep

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        sizes = zip(self.tensor.dims, self.label, strict=True)
        return tuple(size if atoms is None else len(self.keep(atoms)) for size, atoms in sizes)

    def values(self) -> Array:
        """Its values."""
        return slice_label(values_of(self.tensor), self.label, self.keep)


def slice_label(values: Array, label: tuple[IntArray | None, ...], keep: Keep) -> Array:
    """Cut a tensor down to the kept indices of its label."""
    for axis, kept in kept_by_axis(label, keep).items():
        values = np.take(values, kept, axis=axis)
    return np.ascontiguousarray(values)


def kept_by_axis(label: Sequence[IntArray | None], keep: Keep) -> dict[int, IntArray]:
    """Kept positions of the axes that lose some, by axis."""
    found = {axis: (len(atoms), keep(atoms)) for axis, atoms in enumerate(label) if atoms is not None}
    return {axis: kept for axis, (size, kept) in found.items() if len(kept) < size}


def attribute_values(edits: list[Edit], node: onnx.NodeProto, keep: Keep) -> dict[str, float | list[int]]:
    """New values of a node's attributes."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type in (a.INT, a.INTS)}
    result: dict[str, float | list[int]] = {}
    for edit in edits:
        if isinstance(edit, PinEdit):
            if len(keep(edit.atoms)) < len(edit.atoms):
                result[edit.name] = edit.value
        elif isinstance(edit, RatioEdit):
            per = edit.per if isinstance(edit.per, int) else len(keep(edit.per))
            result[edit.name] = len(keep(edit.atoms)) // per
        elif isinstance(edit, SizeEdit) and isinstance(edit.where, str):
            count = len(keep(edit.atoms))
            old = result.get(edit.where, given.get(edit.where))
            if isinstance(old, list):
                changed = [int(v) for v in old]
                old_number = changed[edit.element]
                if old_number > 0 or (edit.where != "shape" and _stale(edit, old_number, keep)):
                    changed[edit.element] = count
                result[edit.where] = changed
            else:
                result[edit.where] = count
        elif isinstance(edit, SplitEdit) and "split" in given:
            result["split"] = [len(keep(section)) for section in edit.sections]
    return {name: value for name, value in result.items() if value != given.get(name)}


def size_fixes(model: onnx.ModelProto, structure: Structure, keep: Keep) -> Iterator[SizeFix]:
    """Every number that would be wrong after the weights have been cut."""
    coupling = structure.coupling
    shapes = coupling.shapes
    by_node: dict[int, list[Edit]] = defaultdict(list)
    for edit in coupling.findings.edits:
        by_node[edit.node].append(edit)
    replaced = {index for edit in moved_orders(structure, keep) for index in edit.chain}
    scopes = Scopes.of(model)
    sources = {t.name for scope in scopes.all for t in scope.graph.initializer}
    opset = opset_of(model)
    changed: dict[str, Array] = {}
    for index in scopes.order():
        node = scopes.nodes[index]
        if node.op_type == "Constant":
            sources.add(node.output[0])
            continue
        if index in replaced:
            continue
        folded = node.output and all(shapes[name].value is not None for name in node.output if name)
        if folded and not by_node.get(index):
            changed |= _refold(node, structure, keep, changed, opset)
            continue
        for position, name in enumerate(node.input):
            value = shapes[name].value if name else None
            if value is None:
                continue
            required = _required(node, position, value, by_node.get(index, []), structure, keep)
            actual = changed.get(name, value)
            if name in sources and name in coupling.constants:
                actual = slice_label(value, coupling.labels[name], keep)
            if actual.shape != required.shape or not np.array_equal(actual, required):
                yield SizeFix(index, position, required, actual)
    for place, scope in enumerate(scopes.all):
        for position, output in enumerate(scope.graph.output):
            if output.name in changed:
                required = np.asarray(shapes[output.name].value)
                yield SizeFix(None, position, required, changed[output.name], scope=place)


def moved_orders(structure: Structure, keep: Keep) -> list[OrderEdit]:
    """The shuffles that lose indices and must be replaced by a Gather."""
    edits = [edit for edit in structure.coupling.findings.edits if isinstance(edit, OrderEdit)]
    return [edit for edit in edits if any(a is not None and len(keep(a)) < len(a) for a in edit.label)]


def _refold(
    node: onnx.NodeProto, structure: Structure, keep: Keep, changed: dict[str, Array], opset: int
) -> dict[str, Array]:
    """Evaluate a size computation again on the pruned sizes."""
    shapes = structure.coupling.shapes
    if traits(node) & Trait.SIZES:
        shape = pruned_shape(structure, node.input[0], keep)
        if shape is None or shape == shapes[node.input[0]].shape:
            return {}
        return {node.output[0]: shape_value(node, shape)}
    if not any(name in changed for name in node.input):
        return {}
    inputs = [changed.get(name, shapes[name].value) if name else None for name in node.input]
    results = evaluate(node, inputs, opset)
    if results is None:
        return {}
    return {
        name: result
        for name, result in zip(node.output, results, strict=False)
        if name and not np.array_equal(result, np.asarray(shapes[name].value))
    }


def _required(
    node: onnx.NodeProto, position: int, value: Array, edits: list[Edit], structure: Structure, keep: Keep
) -> Array:
    """The value that an input must have after pruning."""
    label = structure.coupling.labels.get(node.input[position])
    required = value if label is None else slice_label(value, label, keep)
    for edit in edits:
        if isinstance(edit, SizeEdit) and edit.where == position:
            count = len(keep(edit.atoms))
            copies = node.op_type == "Reshape" and required.reshape(-1)[edit.element] <= 0
            if not copies and _stale(edit, int(required.reshape(-1)[edit.element]), keep):
                required = required.copy()
                required.reshape(-1)[edit.element] = count
        elif isinstance(edit, IndexEdit) and edit.input == position:
            required = remap(required, edit.atoms, keep, edit.axis)
        elif isinstance(edit, SplitEdit) and position == 1:
            required = np.array([len(keep(section)) for section in edit.sections], dtype=value.dtype)
    return required


def _stale(edit: SizeEdit, number: int, keep: Keep) -> bool:
    """Whether a constant size is no longer correct."""
    axis = edit.whole if edit.whole is not None and number < 0 else edit.atoms
    return len(keep(axis)) < len(axis)


def remap(indices: Array, atoms: IntArray, keep: Keep, axis: int = 0) -> Array:
    """Indices into the kept part of an axis; indices of removed positions are dropped along the indices' `axis`."""
    kept = keep(atoms)
    if len(kept) == len(atoms):
        return indices
    rank = np.full(len(atoms), -1, dtype=np.int64)
    rank[kept] = np.arange(len(kept))
    remapped = rank[indices]
    if indices.ndim:
        there = (np.moveaxis(remapped, axis, 0).reshape(indices.shape[axis], -1) >= 0).all(axis=1)
        remapped = np.compress(there, remapped, axis=axis)
    return remapped.astype(indices.dtype)


class FixedSizes:
    """Which numbers computed from sizes do not depend on the dynamic sizes of the inputs.

    An example is the head size behind the √d of attention, although it is read from a tensor with a dynamic batch. The
    model's sizes are inferred again with two other sets of input sizes; numbers that stay the same are fixed.

    Args:
        model: The traced model.
        shapes: Shapes and values of its tensors.
    """

    def __init__(self, model: onnx.ModelProto, shapes: ShapeMap) -> None:
        self._model, self._shapes = model, shapes
        self._known: dict[str, BoolArray] = {}

    def __call__(self, name: str) -> BoolArray:
        """Whether the elements of a tensor are fixed, bool like its value."""
        fixed = self._known.get(name)
        if fixed is None:
            fixed = self._known[name] = self._compared(name)
        return fixed

    def _compared(self, name: str) -> BoolArray:
        value = self._shapes[name].value
        if value is None:
            return np.zeros(0, np.bool_)
        equal = np.full(value.shape, bool(self._others))
        for other in self._others:
            its = other[name].value
            equal &= its is not None and its.shape == value.shape and its == value
        return equal

    @cached_property
    def _others(self) -> list[ShapeMap]:
        shapes = {value.name: self._shapes[value.name].shape for value in model_inputs(self._model)}
        given = {name: shape for name, shape in shapes.items() if shape is not None}
        others = []
        for _ in range(2):
            other = next(other_shapes(self._model, given), None) if len(given) == len(shapes) else None
            if other is None:
                return []
            given = other
            others.append(infer(self._model, given))
        return others


_WHERE_SINCE = 9  # the opset


@dataclass(frozen=True, slots=True)
class Correction:
    """A node that reads the number (or the result of the node before it) and constants.

    Attributes:
        op_type: Its operator.
        name: Purpose, used in its name.
        constants: Its other inputs, by a name for each.
    """

    op_type: str
    name: str
    constants: Mapping[str, Array]

    def inputs(self, values: Any, constants: Sequence[Any]) -> list[Any]:
        """The node's inputs in order; Where has the values last."""
        return [*constants, values] if self.op_type == "Where" else [values, *constants]


def corrections(fix: SizeFix, opset: int) -> list[Correction]:
    """The nodes that turn the number that is read into the required one, in order."""
    required = fix.required
    actual = np.asarray(np.broadcast_to(fix.actual, required.shape))
    wrong = np.asarray(actual != required)
    if required.dtype.kind in "if" and np.isfinite(actual[wrong]).all() and (actual[wrong] != 0).all():
        return _scaled(required, actual, wrong)
    if opset >= _WHERE_SINCE:
        return [Correction("Where", "where", {"mask": wrong, "value": required})]
    kept = np.asarray(~wrong).astype(required.dtype)
    written = np.where(wrong, required, 0).astype(required.dtype)
    return [Correction("Mul", "clear", {"mask": kept}), Correction("Add", "write", {"value": written})]


def _scaled(required: Array, actual: Array, wrong: Array) -> list[Correction]:
    upper, lower = np.where(wrong, required, 1), np.where(wrong, actual, 1)
    if required.dtype.kind == "f":
        return [Correction("Mul", "scale", {"factor": np.asarray(upper / lower).astype(required.dtype)})]
    common = np.gcd(upper, lower)
    factor, divisor = (np.asarray(part // common).astype(required.dtype) for part in (upper, lower))
    steps = [Correction("Mul", "scale", {"factor": factor})]
    return steps if (divisor == 1).all() else [*steps, Correction("Div", "divide", {"divisor": divisor})]
