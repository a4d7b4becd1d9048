"""Removal of selected units from a copy of the model, with onnx-graphsurgeon.

Every graph of the model, including bodies of control flow, is edited separately (:mod:`onnxcop.rewrite.edit`) and
merged into a copy of the original. Everything that pruning does not touch stays identical to the byte: weights, node
names, doc strings, metadata, opset, dynamic axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager

import onnx

from onnxcop._base.types import Array, IntArray
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import Edit
from onnxcop.errors import ModelError
from onnxcop.graph.check import byte_size
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.io import EXTERNAL, VALUES, WeightFile, inlined, without_initializers
from onnxcop.graph.serialize import copy_fields
from onnxcop.graph.subgraphs import Scopes, initializers_are_inputs
from onnxcop.rewrite.blocks import Blocks, Remains, emptied
from onnxcop.rewrite.constants import take_out
from onnxcop.rewrite.edit import GraphEditor
from onnxcop.rewrite.merge import Merger
from onnxcop.rewrite.sizes import FixedSizes, Keep, Sliced, kept_by_axis, kept_positions, moved_orders, size_fixes

_LARGE = 2**20  # bytes; larger tensors are cut one by one when the copy receives them


def apply(
    model: onnx.ModelProto, structure: Structure, removed: IntArray, file: WeightFile | None = None
) -> onnx.ModelProto:
    """Return a copy of `model` without the given units.

    Args:
        model: The traced model; it is not changed.
        structure: Its structure.
        removed: int64, numbers of the units to remove.
        file: File for large matrices and kernels, to keep them out of memory; the one of `model` if its weights are in
            one.

    Raises:
        ModelError: GraphSurgeon cannot represent the model, or nothing is left of an axis that is needed.
    """
    keep = kept_positions(structure, removed)
    blocks = emptied(structure, removed)
    remains = Blocks(model, structure).without(blocks) if blocks else Remains()
    if remains is None:
        raise ModelError("groups cannot be removed whole: without them an output no longer depends on the inputs")
    idle = {*remains.ends, *remains.constant, *remains.joins, *remains.dead}
    weights = sliced_constants(model, structure, keep)
    scopes, fixes = Scopes.of(model), [fix for fix in size_fixes(model, structure, keep) if fix.node not in idle]
    orders = moved_orders(structure, keep)
    edits: dict[int, list[Edit]] = defaultdict(list)
    for edit in structure.coupling.findings.edits:
        if edit.node not in idle:
            edits[edit.node].append(edit)
    result = _copy_without(model, weights, file)
    taken, fixed = scopes.names(), FixedSizes(model, structure.coupling.shapes)
    copies = Scopes.of(result).all
    with _quiet_surgeon():
        for index in reversed(range(len(copies))):  # bodies before the graph that holds them
            scope = scopes.all[index]
            own = range(scope.first, scope.first + len(scope.graph.node))
            solver = GraphEditor(
                model=model, scope=scope, structure=structure, keep=keep, weights=weights, fixed=fixed, taken=taken
            )
            solver.perform(
                [fix for fix in fixes if (fix.scope == index if fix.node is None else fix.node in own)],
                {number: facts for number, facts in edits.items() if number in own},
                [order for order in orders if order.node in own and order.node not in idle],
            )
            listed = initializers_are_inputs(model)
            Merger(solver, copies[index].graph, top=not index, inputs_listed=listed, file=file).merge()
    if blocks:
        take_out(result, model, remains)
    return result


@contextmanager
def _quiet_surgeon() -> Iterator[None]:
    """Keep GraphSurgeon's log off standard output, which is for results; its errors are raised."""
    from onnx_graphsurgeon.logger.logger import G_LOGGER

    with G_LOGGER.suppress():
        yield


def _copy_without(model: onnx.ModelProto, names: Container[str], file: WeightFile | None) -> onnx.ModelProto:
    """A copy of a model without the values of some initializers, which are filled in later."""
    result = without_initializers(model)
    for tensor in model.graph.initializer:
        copy = result.graph.initializer.add()
        if tensor.name in names:
            copy_fields(tensor, copy, VALUES | EXTERNAL)
        elif file is not None and _is_large(tensor):
            copy.CopyFrom(file.detach(tensor))
        else:
            copy.CopyFrom(inlined(tensor))
    return result


def _is_large(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is a large matrix or kernel; vectors stay at hand, because they may be merged again."""
    return sum(size > 1 for size in tensor.dims) > 1 and (byte_size(tensor) or 0) > _LARGE


def sliced_constants(model: onnx.ModelProto, structure: Structure, keep: Keep) -> dict[str, Array | Sliced]:
    """New values of every stored tensor that loses indices, by tensor name."""
    coupling = structure.coupling
    result: dict[str, Array | Sliced] = {}
    for name, tensor in constant_tensors(model).items():
        label = coupling.labels.get(name) if name in coupling.constants else None
        if label is None or not kept_by_axis(label, keep):
            continue
        sliced = Sliced(tensor, label, keep)
        result[name] = sliced if (byte_size(tensor) or 0) > _LARGE else sliced.values()
    return result
