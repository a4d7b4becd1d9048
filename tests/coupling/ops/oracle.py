"""The oracles: the real operator in ONNX Runtime against its rule.

`check_labels` runs an operator that moves elements on the numbers of its indices. `check_moves`
perturbs every slice of every operand and looks which slices of the outputs move. `check_removal`
takes units out of a small real graph and compares with the masked original.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper

from onnxcop.coupling.groups import Structure, structure_of
from onnxcop.coupling.result import Coupling
from onnxcop.coupling.tracing import trace
from onnxcop.graph.shapes import infer
from onnxcop.rewrite.apply import apply
from onnxcop.runtime.input_shapes import settle_shapes, shapes_of
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.verify import Verification, verify
from ops.embed import embed
from ops.sample import ANY, Array, Sample

CPU = EngineOptions("cpu", threads=1)
_NOWHERE = -1.0  # the number of an element that comes from no index


def trace_alone(sample: Sample) -> Coupling:
    """Trace the node with every operand stored, so that every axis is live, and nothing else."""
    model = sample.stored_model()
    shapes = infer(model, {})
    if shapes.unknown:
        results = Session(sample.fed_model([]), CPU, optimize=False).run({})
        kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in results.items()}
        shapes = infer(model, {}, {n: (kinds[n], a.shape) for n, a in results.items()})
    coupling = trace(model, shapes)
    assert not coupling.declined, coupling.declined
    return coupling


def check_labels(sample: Sample) -> None:
    """Removing any class must take out exactly the elements that come from its indices."""
    coupling = trace_alone(sample)
    data = [p for p in range(len(sample.inputs)) if sample.is_float(p) and sample.name(p) in coupling.labels]
    session = Session(sample.fed_model(data), CPU)
    of, frozen = coupling.classes.of, coupling.classes.frozen
    held: dict[str, Array] = {}  # by output: bool [classes, *shape], whether an element is of a class
    numbers: dict[str, list[Array]] = {}  # by output: the index that every element comes from
    for position in data:
        value = sample.inputs[position]
        assert value is not None
        for axis, atoms in enumerate(coupling.labels[sample.name(position)]):
            if atoms is None:
                continue
            feeds = {sample.name(p): _filled(sample.inputs[p]) for p in data}
            feeds[sample.name(position)] = _numbered(value, axis)
            for name, found in session.run(feeds).items():
                mask = held.setdefault(name, np.zeros((len(frozen), *found.shape), np.bool_))
                numbers.setdefault(name, []).append(found)
                ids = np.arange(len(frozen)).reshape(-1, *[1] * found.ndim)
                mask |= (found >= 0) & (of[atoms][found.astype(np.int64)] == ids)
    assert held, "no axis was live"
    stored = {int(index) for p in data for a in coupling.labels[sample.name(p)] if a is not None for index in of[a]}
    for name, mask in held.items():
        for index in np.flatnonzero(~frozen).tolist():
            if index in stored:
                covered = _covered(coupling, name, index, mask.shape[1:])
                known = np.any([found >= 0 for found in numbers[name]], axis=0)
                np.testing.assert_array_equal(covered & known, mask[index], f"{name}: {sample}")
        for axis, atoms in enumerate(coupling.labels.get(name, ())):
            if atoms is not None:
                _check_new(numbers[name], axis, ~frozen[of[atoms]] & ~np.isin(of[atoms], sorted(stored)))


def _check_new(numbers: list[Array], axis: int, new: Array) -> None:
    """Slices of classes that no operand has must hold no operand's elements, or copies of all others."""
    for found in numbers:
        slices = np.moveaxis(found, axis, 0)
        for position in np.flatnonzero(new):
            nothing = (slices[position] == _NOWHERE).all()
            assert nothing or (slices == slices[position]).all(), "a new class holds an operand's elements"


def _numbered(value: Array, axis: int) -> Array:
    shape = [1] * value.ndim
    shape[axis] = -1
    numbers = np.arange(value.shape[axis]).reshape(shape)
    return np.ascontiguousarray(np.broadcast_to(numbers, value.shape)).astype(value.dtype)


def _filled(value: Array | None) -> Array:
    assert value is not None
    return np.full(value.shape, _NOWHERE).astype(value.dtype)


def _covered(coupling: Coupling, name: str, index: int, shape: tuple[int, ...]) -> Array:
    """Elements of a tensor that go when a class is removed, as its label says."""
    result = np.zeros(shape, np.bool_)
    for axis, atoms in enumerate(coupling.labels.get(name, (None,) * len(shape))):
        if atoms is not None:
            hit = coupling.classes.of[atoms] == index
            assert hit.shape == (shape[axis],), f"label of {name} has another length than its axis"
            result |= hit.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return result


def check_moves(sample: Sample) -> None:
    """A slice may only move outputs of its own class, unless it is summed over, frozen or inexact."""
    coupling = trace_alone(sample)
    classes = coupling.classes
    summed = {
        int(index)
        for contraction in coupling.findings.contractions
        for operand in contraction.operands
        for index in np.unique(classes.of[operand.atoms])
    }
    fed = [p for p in range(len(sample.inputs)) if sample.is_float(p)]
    session = Session(sample.fed_model(fed), CPU, optimize=False)
    base = {sample.name(p): sample.inputs[p] for p in fed}
    before = session.run(base)  # type: ignore[arg-type]  # floats are never None
    for name, axis, position, index in _slices(sample, coupling, fed):
        if classes.frozen[index] or classes.inexact[index] or index in summed:
            continue
        changed = np.array(base[name])
        where = (slice(None),) * axis + (position,)
        changed[where] = changed[where] * 0.5 + 0.3
        after = session.run(base | {name: changed})  # type: ignore[arg-type]
        for output, old in before.items():
            moved = ~np.isclose(old, after[output], rtol=0, atol=0, equal_nan=True)
            stray = moved & ~_covered(coupling, output, index, old.shape)
            assert not stray.any(), f"{name}[{position}] on axis {axis} moves others of {output}: {sample}"


def _slices(sample: Sample, coupling: Coupling, fed: list[int]) -> Iterator[tuple[str, int, int, int]]:
    for p in fed:
        for axis, atoms in enumerate(coupling.labels.get(sample.name(p), ())):
            if atoms is not None:
                for position, index in enumerate(coupling.classes.of[atoms].tolist()):
                    yield sample.name(p), axis, position, index


def embedded(sample: Sample) -> onnx.ModelProto:
    """The sample between contractions, its output shapes read off a run."""
    fed = list(sample.data)
    session = Session(sample.fed_model(fed), CPU)
    results = session.run({sample.name(p): sample.inputs[p] for p in fed})  # type: ignore[misc]
    found = [results[name] for name in sample.output_names()]
    types = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in found]
    return embed(sample, [array.shape for array in found], types)


def check_removal(sample: Sample, seed: int = 0) -> None:
    """Pruned ≡ masked with the sample in the middle of a graph, for some units and for most."""
    model = embedded(sample)
    structure = analyse(model)
    units = len(structure.unit_class)
    what = f"{sample}\n{[str(r) for rs in structure.coupling.classes.reasons.values() for r in rs]}"
    if sample.units is None:
        assert units > 0, what
    elif sample.units != ANY:
        assert units == sample.units, f"{units} units: {what}"
    if sample.exact is not None:
        assert all(group.exact == sample.exact for group in structure.groups), what
    assert not structure.coupling.declined, structure.coupling.declined
    if units:
        prune_and_verify(model, structure, seed, sample.notes)


def analyse(model: onnx.ModelProto, inputs: dict[str, tuple[int, ...]] | None = None) -> Structure:
    """Trace a model and group its units."""
    shapes = shapes_of(model, settle_shapes(model, inputs, CPU), CPU)
    return structure_of(trace(model, shapes))


def prune_and_verify(
    model: onnx.ModelProto, structure: Structure, seed: int, allowed: tuple[str, ...] = ()
) -> list[Verification]:
    """Remove some units, then most, and compare with the masked original each time."""
    found = []
    for fraction in (0.4, 1.0):
        removed = draw_units(structure, fraction, seed)
        assert len(removed), "no unit can be removed"
        pruned = apply(model, structure, removed)
        result = verify(model, pruned, structure, removed, CPU, seed=seed)
        assert all(note.startswith(allowed) for note in result.notes), result.notes
        if result.exact_units:
            assert result.max_difference is not None
        found.append(result)
    return found


def draw_units(structure: Structure, fraction: float, seed: int) -> Array:
    """Random units, at most a fraction of them, that leave an index on every axis."""
    rng = np.random.default_rng(seed)
    rows = structure.incidence.toarray()[:, structure.limited_axes]
    left = structure.axis_sizes[structure.limited_axes].copy()
    most = max(1, round(fraction * len(rows)))
    removed: list[int] = []
    for unit in rng.permutation(len(rows)).tolist():
        if len(removed) < most and (left - rows[unit] >= 1).all():
            left -= rows[unit]
            removed.append(unit)
    return np.array(sorted(removed), dtype=np.int64)
