"""Edits of one graph of a model, with onnx-graphsurgeon.

GraphSurgeon edits a light copy, without unchanged weights and without bodies of control flow. The result is merged into
a copy of the original (:mod:`onnxcop.rewrite.merge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array
from onnxcop.coupling.groups import Structure
from onnxcop.coupling.ops.facts import AxesEdit, Edit, OrderEdit, SplitEdit
from onnxcop.errors import InternalError, ModelError
from onnxcop.graph.edit import fresh_name, opset_of
from onnxcop.graph.shapes import has_dynamic_dims
from onnxcop.graph.subgraphs import Scope, captured, made
from onnxcop.rewrite.sizes import (
    FixedSizes,
    Keep,
    SizeFix,
    Sliced,
    attribute_values,
    corrections,
    remap,
)


class GraphEditor:
    """Applies a selection to one graph, but not to bodies inside it.

    Args:
        model: The model the graph belongs to.
        scope: The graph.
        structure: The model's structure.
        keep: The positions to keep.
        weights: New values of stored tensors of the whole model.
        fixed: The sizes that do not depend on the dynamic sizes of the inputs.
        taken: Names of tensors anywhere in the model; new ones are added.

    Attributes:
        graph: The graph being edited.
        original: Position in the original graph of every node that comes from there, by its id.
        touched: Positions of original nodes that change.
        weights: New values of tensors that this graph stores.
        added: Names of new stored tensors.

    Raises:
        ModelError: GraphSurgeon cannot represent the graph.
    """

    def __init__(
        self, model: onnx.ModelProto, scope: Scope, structure: Structure, keep: Keep,
        weights: Mapping[str, Array | Sliced], fixed: FixedSizes, taken: set[str],
    ) -> None:  # fmt: skip
        import onnx_graphsurgeon as gs

        self.gs = gs
        self.source, self.first, self.structure, self.keep = scope.graph, scope.first, structure, keep
        own = made(scope.graph)
        self.weights = {name: values for name, values in weights.items() if name in own}
        try:
            self.graph = gs.import_onnx(_light_copy(model, scope.graph))
        except Exception as error:
            raise ModelError(f"onnx-graphsurgeon cannot read this model: {str(error).splitlines()[0]}") from error
        if len(self.graph.nodes) != len(scope.graph.node):
            raise InternalError("onnx-graphsurgeon changed the number of nodes on import")
        for tensor in (*self.graph.inputs, *self.graph.outputs):
            tensor.dtype = tensor.dtype or np.float32  # bodies need not state it, but GraphSurgeon requires it
        self.held = {name for node in scope.graph.node for name in captured(node)}
        self.fixed, self.taken = fixed, taken
        self.original = {id(node): index for index, node in enumerate(self.graph.nodes)}
        self.nodes = list(self.graph.nodes)
        self.tensors = self.graph.tensors()
        self.touched: set[int] = set()
        self.dynamic = has_dynamic_dims(model.graph.input)
        self.opset = opset_of(model)
        self.added: set[str] = set()

    def perform(
        self, fixes: Sequence[SizeFix], edits: Mapping[int, Sequence[Edit]], orders: Sequence[OrderEdit]
    ) -> None:
        """Apply all edits.

        Args:
            fixes: Numbers that the graph's nodes (and outputs) must read.
            edits: Facts that rules state about the graph's nodes, by number.
            orders: Shuffles in the graph that lose indices.
        """
        idle = {id(node) for node in self.nodes if not self._is_used(node)}
        for name, values in self.weights.items():
            if name in self.tensors:  # not if only bodies read it
                self._replace_constant(name, values)
        for fix in fixes:
            if fix.node is None:
                self._fix_output(fix)
            else:
                self._fix(fix, fix.node - self.first)
        for number, changes in edits.items():
            self._edit(number - self.first, changes)
        for edit in orders:
            self._reorder(edit)
        self._drop_dead(idle)

    def _replace_constant(self, name: str, values: Array | Sliced) -> None:
        tensor = self.tensors[name]
        large = isinstance(values, Sliced)
        if isinstance(tensor, self.gs.Constant):
            tensor.values = np.empty(0, np.float32) if large else values  # the merger fills in large ones
            return
        node = tensor.inputs[0]  # a Constant node
        node.attrs["value"] = self.gs.Constant(
            node.attrs["value"].name, values.values() if isinstance(values, Sliced) else values
        )
        self.touched.add(self.original[id(node)])

    def _edit(self, index: int, edits: Sequence[Edit]) -> None:
        node = self.nodes[index]
        new = attribute_values(list(edits), self.source.node[index], self.keep)
        if new:
            node.attrs.update(new)
            self.touched.add(index)
        for edit in edits:
            if isinstance(edit, SplitEdit):
                self._explicit_split(index, edit)
            elif isinstance(edit, AxesEdit):
                self._explicit_axes(index, edit)

    def _explicit_axes(self, index: int, edit: AxesEdit) -> None:
        """Write the axes of a Squeeze that drops all axes of size 1, so that it drops none that pruning made so."""
        if all(len(self.keep(axis)) > 1 for axis in edit.live):
            return
        node = self.nodes[index]
        self.touched.add(index)
        if self.opset < 13:
            node.attrs["axes"] = list(edit.axes)
        else:
            name = f"{node.outputs[0].name}_axes"
            while len(node.inputs) > 1:
                node.inputs.pop()
            node.inputs.append(self._constant(name, np.array(edit.axes, np.int64)))

    def _explicit_split(self, index: int, edit: SplitEdit) -> None:
        """Write the sizes of a Split into equal parts if its parts are no longer equal."""
        node = self.nodes[index]
        sizes = [len(self.keep(section)) for section in edit.sections]
        if sizes == [len(section) for section in edit.sections] or len(node.inputs) > 1 or "split" in node.attrs:
            return
        self.touched.add(index)
        node.attrs.pop("num_outputs", None)
        if self.opset < 13:
            node.attrs["split"] = sizes
        else:
            node.inputs.append(self._constant(f"{node.outputs[0].name}_split", np.array(sizes, np.int64)))

    def _reorder(self, edit: OrderEdit) -> None:
        """Replace a shuffle of an axis, which only fits its original size, by a Gather."""
        first, last = self.nodes[edit.chain[0] - self.first], self.nodes[edit.chain[-1] - self.first]
        source, result = first.inputs[0], last.outputs[0]
        order = self._constant(f"{result.name}_order", remap(edit.order, edit.atoms, self.keep))
        place = self.graph.nodes.index(last)
        for node in (self.nodes[number - self.first] for number in edit.chain):
            node.inputs.clear()
            node.outputs.clear()
            self.graph.nodes.remove(node)
        gather = self.gs.Node("Gather", last.name, {"axis": edit.axis}, [source, order], [result])
        self.graph.nodes.insert(place - len(edit.chain) + 1, gather)

    def _fix(self, fix: SizeFix, index: int) -> None:
        """Make one input of one node read the required number."""
        node = self.nodes[index]
        old = node.inputs[fix.input]
        info = self.structure.coupling.shapes[old.name]
        stored = isinstance(old, self.gs.Constant) or (old.inputs and old.inputs[0].op == "Constant")
        self.touched.add(index)
        alone = len(old.outputs) == 1 and old not in self.graph.outputs and old.name not in self.held
        if stored and alone:
            self._replace_constant(old.name, fix.required)
            self.weights.setdefault(old.name, fix.required)
        elif stored or not (info.sized and self.dynamic) or self._is_fixed(fix, old):
            node.inputs[fix.input] = self._constant(f"{old.name}_pruned", fix.required)
        elif not self._joined_anew(fix, old, node):
            self._override(fix, old, node)

    def _is_fixed(self, fix: SizeFix, old: Any) -> bool:
        """Whether a computed size can be replaced by a constant."""
        return fix.actual.shape != fix.required.shape or bool(self.fixed(old.name).all())

    def _joined_anew(self, fix: SizeFix, old: Any, node: Any) -> bool:
        """Replace the fixed parts of a size that a Concat joins; return whether that corrects all of it.

        ONNX Runtime fuses a Concat of sizes and numbers with its Reshape, but not arithmetic in between.
        """
        if not old.inputs or old.inputs[0].op != "Concat" or fix.required.ndim != 1:
            return False
        wrong, parts, start = fix.actual != fix.required, list(old.inputs[0].inputs), 0
        name = f"{old.name}_pruned"
        for place, part in enumerate(parts):
            shape = self.structure.coupling.shapes[part.name].shape
            if shape is None:
                return False
            stop = start + int(np.prod(shape))
            if wrong[start:stop].any():
                if not self._is_written_down(part):
                    return False
                parts[place] = fix.required[start:stop]
            start = stop
        parts = [self._constant(f"{name}_part", part) if isinstance(part, np.ndarray) else part for part in parts]
        out = self.gs.Variable(self._fresh(name), dtype=old.dtype or fix.required.dtype, shape=fix.required.shape)
        joined = self.gs.Node("Concat", f"{out.name}_concat", {"axis": 0}, parts, [out])
        self.graph.nodes.insert(self.graph.nodes.index(node), joined)
        node.inputs[fix.input] = out
        return True

    def _is_written_down(self, part: Any) -> bool:
        """Whether a part of a size is constant, or computed but independent of dynamic sizes."""
        if isinstance(part, self.gs.Constant) or (part.inputs and part.inputs[0].op == "Constant"):
            return True
        info = self.structure.coupling.shapes[part.name]
        return info.value is not None and (not info.sized or bool(self.fixed(part.name).all()))

    def _override(self, fix: SizeFix, old: Any, node: Any) -> None:
        """Replace some elements of a size computed at run time, and leave the others dynamic."""
        name = self._fresh(f"{old.name}_pruned")
        out = self.gs.Variable(name, dtype=old.dtype or fix.required.dtype, shape=fix.required.shape)
        place = self.graph.nodes.index(node)
        self.graph.nodes[place:place] = self._replacing(fix, old, out)
        node.inputs[fix.input] = out

    def _fix_output(self, fix: SizeFix) -> None:
        """Return a size that is an output unchanged, although its element changed."""
        output = self.graph.outputs[fix.input]
        name = self._fresh(f"{output.name}_pruned")
        maker = output.inputs[0]  # a node of this graph: ONNX Runtime accepts no body that gives out a captured tensor
        fixed = self.gs.Variable(name, dtype=output.dtype or fix.required.dtype, shape=fix.actual.shape)
        maker.outputs[maker.outputs.index(output)] = fixed
        self.touched.add(self.original[id(maker)])
        place = self.graph.nodes.index(maker) + 1
        self.graph.nodes[place:place] = self._replacing(fix, fixed, output)

    def _replacing(self, fix: SizeFix, old: Any, out: Any) -> list[Any]:
        """Nodes that compute `out` from `old`, a number computed at run time, by correcting it."""
        name = out.name if out.name in self.added else old.name
        values, last = old, len(steps := corrections(fix, self.opset)) - 1
        nodes = []
        for place, step in enumerate(steps):
            result = out
            if place < last:
                result = self.gs.Variable(self._fresh(f"{name}_{step.name}"), fix.required.dtype, fix.required.shape)
            constants = [self._constant(f"{name}_{key}", array) for key, array in step.constants.items()]
            nodes.append(
                self.gs.Node(step.op_type, f"{name}_{step.name}", {}, step.inputs(values, constants), [result])
            )
            values = result
        return nodes

    def _constant(self, name: str, values: Array) -> Any:
        # numpy makes scalars when it computes with arrays without axes
        return self.gs.Constant(self._fresh(name), np.asarray(values))

    def _fresh(self, name: str) -> str:
        fresh = fresh_name(name, self.taken)
        self.added.add(fresh)
        return fresh

    def _drop_dead(self, idle: set[int]) -> None:
        """Remove nodes that only served a size that is now constant."""
        for node in list(reversed(self.graph.nodes)):
            if id(node) not in idle and not self._is_used(node):
                node.inputs.clear()
                self.graph.nodes.remove(node)

    def _is_used(self, node: Any) -> bool:
        outputs = {id(tensor) for tensor in self.graph.outputs}
        return any(t.outputs or id(t) in outputs or t.name in self.held for t in node.outputs)


def _light_copy(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    """A graph without the bytes of its initializers and without its bodies, as a model for editing."""
    light = onnx.ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.graph.name = graph.name
    for node in graph.node:
        copy = light.graph.node.add()
        copy.CopyFrom(node)
        for place in reversed(range(len(copy.attribute))):
            if copy.attribute[place].type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                del copy.attribute[place]
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    for tensor in graph.initializer:
        light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    light.graph.sparse_initializer.extend(graph.sparse_initializer)
    return light
