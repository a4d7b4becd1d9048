"""Difference on random inputs of two models that should be equal.

The compared tensors must show a fault without amplified noise. So activations are compared without rounding, and
outputs of squashing functions are compared before the function. If outputs do not react to the inputs at all
(detections below a threshold, an argmax of noise), inner tensors are compared as well. If the data decide between
branches, both branches are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.errors import EngineError
from onnxcop.graph.edit import copied, fresh_name
from onnxcop.graph.shapes import Shape, ShapeMap
from onnxcop.graph.subgraphs import Scopes
from onnxcop.graph.traits import Trait, traits
from onnxcop.rewrite.sizes import kept_positions
from onnxcop.runtime.inputs import batch_axes, random_feeds
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.verification.dequantize import rounds, unrounded

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
_MOST_WITNESSES = 16
_CLOSE = 1e-3  # of the largest value; samples agree to this in batches of two sizes

# Largest relative difference that rounding explains, by the type of the tensor.
TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "float16": 2e-2}
_USUAL_TOLERANCE = 1e-4

Cuts = tuple[IntArray | None, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference, relative to the largest absolute value of its tensor.

    Attributes:
        worst: The difference; None if no tensor held finite numbers.
        tensor: Tensor with the largest difference.
        limit: Largest difference that the type of that tensor allows.
        reacts: Whether any compared tensor depends on the inputs.
        shapes: Shapes of the inputs.
    """

    worst: float | None = None
    tensor: str = ""
    limit: float = _USUAL_TOLERANCE
    reacts: bool = False
    shapes: Mapping[str, Shape] | None = None

    @property
    def excessive(self) -> bool:
        """Whether the difference is more than rounding explains."""
        return self.worst is not None and self.worst > self.limit


def difference(
    reference: onnx.ModelProto,
    context: onnx.ModelProto,
    structure: Structure,
    removed: IntArray,
    *,
    shapes: Mapping[str, Shape],
    others: Sequence[Mapping[str, Shape]] = (),
    options: EngineOptions,
    seed: int = 0,
) -> Difference:
    """Compare a pruned model with the masked original.

    Args:
        reference: The masked original, with all tensors at their original sizes.
        context: The pruned model and its names.
        structure: The original's structure.
        removed: Units that the subject lacks.
        shapes: Shapes of the inputs.
        others: Other shapes to compare with too, as far as both run with them.
        options: How to run both.
        seed: Seed of the random inputs; two sets are drawn, and one for each of `others`.

    Raises:
        EngineError: One of the two does not run.
    """
    if rounds(reference):
        reference, context = unrounded(reference), unrounded(context)
    names: dict[str, Cuts] = dict.fromkeys(comparable_outputs(reference), ())
    how: dict[str, Any] = {"shapes": shapes, "others": others, "options": options, "seed": seed}
    largest = _largest(reference, context, names, **how)
    inner = {} if largest.reacts else witnesses(reference, context, structure, removed)
    if inner:
        names |= inner
        largest = _largest(reference, context, names, **how)
    free = conditions(reference, structure.coupling.shapes)
    for branch in (True, False) if free else ():
        with suppress(EngineError):  # a branch that does not fit the inputs cannot be compared
            other = _largest(forced(reference, free, branch), forced(context, free, branch), names, **how)
            largest = _worse(largest, other)
    return largest


def _worse(one: Difference, other: Difference) -> Difference:
    reacts = one.reacts or other.reacts
    if other.worst is None or (one.worst is not None and one.worst / one.limit >= other.worst / other.limit):
        return replace(one, reacts=reacts)
    return replace(other, reacts=reacts)


def _largest(
    reference: onnx.ModelProto, context: onnx.ModelProto, names: Mapping[str, Cuts], *, shapes: Mapping[str, Shape],
    others: Sequence[Mapping[str, Shape]], options: EngineOptions, seed: int,
) -> Difference:  # fmt: skip
    requested = list(names)
    sizes = [shapes, shapes, *others]
    expected, actual = (_runs(model, reference, requested, sizes, options, seed) for model in (reference, context))
    worst = Difference()
    for number, (one, two) in enumerate(zip(expected, actual, strict=True)):
        if one is None or two is None:
            continue  # an exposed or unrounded model may accept fewer sizes than the model itself
        if number < 2 or not worst.excessive:
            worst = _worse(worst, _gap(one, two, names, sizes[number]))
    first, second = expected[0] or {}, expected[1] or {}
    reacts = any(_finite(second[name]) and not np.array_equal(first[name], second[name]) for name in names)
    return replace(worst, reacts=reacts)


def _runs(
    model: onnx.ModelProto, reference: onnx.ModelProto, requested: list[str], sizes: Sequence[Mapping[str, Shape]],
    options: EngineOptions, seed: int,
) -> list[Feed | None]:  # fmt: skip
    """Run a model on inputs of several sizes; the result is None for sizes that it rejects, except the first two.

    Models run one after the other, so that only one is in memory.
    """
    results: list[Feed | None] = []
    with Session(_exposing(model, requested), options, optimize=False) as session:
        for number, shapes in enumerate(sizes):
            try:
                results.append(session.run(random_feeds(reference, shapes, seed + number), requested))
            except EngineError:
                if number < 2:
                    raise
                results.append(None)
    return results


def _gap(expected: Feed, actual: Feed, names: Mapping[str, Cuts], shapes: Mapping[str, Shape]) -> Difference:
    worst = Difference()
    for name, cuts in names.items():
        gap = relative_difference(_cut(expected[name], cuts), actual[name])
        if gap is not None:
            worst = _worse(worst, Difference(gap, name, tolerance(expected[name]), shapes=shapes))
    return worst


def tolerance(values: Array) -> float:
    """Largest relative difference that rounding explains, by the type of a tensor."""
    return TOLERANCE.get(str(values.dtype), _USUAL_TOLERANCE)


def _finite(values: Any) -> bool:
    return relative_difference(values, values) is not None


def comparable_outputs(model: onnx.ModelProto) -> list[str]:
    """The tensors to compare: the outputs, or the argument of the Sigmoid, Softmax … that makes one.

    Squashing functions saturate. They turn a wrong large number into the right 1, and the noise of a large negative
    number into a large part of a tiny probability.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    names = []
    for value in model.graph.output:
        name = value.name
        while name in makers and traits(makers[name]) & Trait.SQUASHES and makers[name].input[0] in makers:
            name = makers[name].input[0]
        names.append(name)
    return list(dict.fromkeys(names))


def witnesses(
    reference: onnx.ModelProto, context: onnx.ModelProto, structure: Structure, removed: IntArray
) -> dict[str, Cuts]:
    """Results of the last layers, with the positions that the pruned model keeps on every axis."""
    coupling, keep = structure.coupling, kept_positions(structure, removed)
    present = {name for node in context.graph.node for name in node.output}
    names: dict[str, Cuts] = {}
    for node in reversed([node for node in reference.graph.node if node.output]):
        name = node.output[0]
        if len(names) == _MOST_WITNESSES:
            break
        if name in present and coupling.shapes[name].elem_type in _FLOATS and traits(node) & Trait.PRODUCT:
            label = coupling.labels.get(name, ())
            names[name] = tuple(None if atoms is None else keep(atoms) for atoms in label)
    return names


def _cut(values: Any, cuts: Cuts) -> Any:
    if not isinstance(values, np.ndarray):
        return values
    for axis, kept in enumerate(cuts):
        if kept is not None:
            values = np.take(values, kept, axis=axis)
    return values


def _exposing(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Return a copy with the given tensors among its outputs."""
    copy = copied(model)
    known = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return copy


def relative_difference(expected: Any, actual: Any) -> float | None:
    """max |expected - found| / max |expected|; None if `expected` holds no finite numbers."""
    if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fiub" or expected.size == 0:
        return None
    if expected.shape != actual.shape:
        return float("inf")
    a: Array = expected.astype(np.float64)
    b: Array = actual.astype(np.float64)
    if not np.isfinite(a).all():
        return None
    scale = float(np.abs(a).max())
    gap = float(np.abs(a - b).max())
    if not np.isfinite(gap):
        return float("inf")
    return gap / scale if scale > 0 else gap


def mixes_samples(
    model: onnx.ModelProto, shapes: Mapping[str, Shape], other: Mapping[str, Shape], options: EngineOptions
) -> bool:
    """Whether results of samples change if copies of them fill a larger batch.

    This happens if a batch of one is stored in the graph (`Reshape` to `[1, C, -1]`) but other batches run. Their
    results mean nothing.

    Args:
        model: The model.
        shapes: Shapes of its inputs.
        other: Shapes with a larger batch.
        options: How to run it.
    """
    axes = batch_axes(model)
    few = {
        name: tuple(shapes[name][axis] if axis in axes[name] else size for axis, size in enumerate(shape))
        for name, shape in other.items()
    }
    alone = random_feeds(model, few, 0)
    together = dict(alone)
    for name, target in other.items():
        for axis in axes[name]:
            copies = np.arange(target[axis]) % few[name][axis]
            together[name] = np.take(together[name], copies, axis=axis)
    try:
        with Session(model, options) as session:
            one, many = session.run(alone), session.run(together)
    except EngineError:
        return False
    return any(isinstance(result, np.ndarray) and not _begins_with(many[name], result) for name, result in one.items())


def _begins_with(many: Any, one: Any) -> bool:
    if many.ndim != one.ndim or any(large < small for large, small in zip(many.shape, one.shape, strict=True)):
        return False
    first = many[tuple(slice(size) for size in one.shape)]
    if one.dtype.kind != "f":
        return bool(np.array_equal(first, one))
    return bool(np.allclose(first, one, rtol=0, atol=_CLOSE * float(np.abs(one).max(initial=0.0)), equal_nan=True))


def conditions(model: onnx.ModelProto, shapes: ShapeMap) -> set[str]:
    """Names of the conditions that depend on data, not only on sizes."""
    named = {node.input[0] for node in Scopes.of(model).nodes if node.op_type == "If"}
    return {name for name in named if shapes[name].value is None}


def forced(model: onnx.ModelProto, free: Set[str], branch: bool) -> onnx.ModelProto:
    """Return a copy in which the If nodes with these conditions take a fixed branch.

    Args:
        model: The model; it is not changed.
        free: Names of conditions.
        branch: True for the then_branch.
    """
    result = copied(model)
    scopes = Scopes.of(result)
    name = fresh_name("forced_branch", scopes.names())
    for node in scopes.nodes:
        if node.op_type == "If" and node.input[0] in free:
            node.input[0] = name
    result.graph.initializer.append(numpy_helper.from_array(np.array(branch), name))
    return result
