"""Applying a selection to a copy of the model, with onnx-graphsurgeon.

GraphSurgeon edits a light copy (without the weights that stay), and its result is merged into a copy
of the original, so that everything the pruning does not touch stays as it was, to the byte: weights,
node names, doc strings, metadata, opset, dynamic axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop.atoms import IntArray
from onnxcop.corrections import corrections
from onnxcop.errors import InternalError, ModelError
from onnxcop.groups import Structure
from onnxcop.ops.findings import AxesEdit, Edit, OrderEdit, SplitEdit
from onnxcop.shapes import Array, has_dynamic_dims
from onnxcop.values import Keep, Mend, attribute_values, keeper, mends, moved_orders, pruned_shape, remap, slice_label


def apply(model: onnx.ModelProto, structure: Structure, removed: IntArray) -> onnx.ModelProto:
    """Return a copy of `model` without the given units.

    Args:
        model: The traced model; it is not changed.
        structure: Its structure.
        removed: int64, numbers of the units to remove.

    Raises:
        ModelError: GraphSurgeon cannot represent the model.
    """
    keep = keeper(structure, removed)
    weights = sliced_constants(model, structure, keep)
    surgery = _Surgery(model, structure, keep, weights)
    return surgery.perform()


def sliced_constants(model: onnx.ModelProto, structure: Structure, keep: Keep) -> dict[str, Array]:
    """New values of every stored tensor that loses indices, by tensor name."""
    coupling = structure.coupling
    result: dict[str, Array] = {}
    for name, tensor in constant_tensors(model).items():
        label = coupling.labels.get(name) if name in coupling.constants else None
        if label is None or all(atoms is None or len(keep(atoms)) == len(atoms) for atoms in label):
            continue
        result[name] = slice_label(numpy_helper.to_array(tensor), label, keep)
    return result


def constant_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers and tensors of Constant nodes, by the name of the tensor in the graph."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


class _Surgery:
    """One application of a selection; `touched` counts original nodes that change."""

    def __init__(self, model: onnx.ModelProto, structure: Structure, keep: Keep, weights: Mapping[str, Array]) -> None:
        import onnx_graphsurgeon as gs

        self.gs = gs
        self.model, self.structure, self.keep, self.weights = model, structure, keep, dict(weights)
        try:
            self.graph = gs.import_onnx(_light_copy(model))
        except Exception as error:
            raise ModelError(f"onnx-graphsurgeon cannot read this model: {str(error).splitlines()[0]}") from error
        if len(self.graph.nodes) != len(model.graph.node):
            raise InternalError("onnx-graphsurgeon changed the number of nodes on import")
        self.original = {id(node): index for index, node in enumerate(self.graph.nodes)}
        self.nodes = list(self.graph.nodes)
        self.tensors = self.graph.tensors()
        self.touched: set[int] = set()
        self.dynamic = has_dynamic_dims(model.graph.input)
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.added: set[str] = set()

    def perform(self) -> onnx.ModelProto:
        """Run all edits and merge the result into a copy of the original."""
        idle = {id(node) for node in self.nodes if not _is_used(node, self.graph)}
        for name, values in self.weights.items():
            self._replace_constant(name, values)
        for mend in list(mends(self.model, self.structure, self.keep)):
            self._mend(mend)
        self._attributes()
        for edit in moved_orders(self.structure, self.keep):
            self._reorder(edit)
        self._drop_dead(idle)
        return self._merge()

    def _replace_constant(self, name: str, values: Array) -> None:
        tensor = self.tensors[name]
        if isinstance(tensor, self.gs.Constant):
            tensor.values = values
            return
        node = tensor.inputs[0]  # a Constant node
        node.attrs["value"] = self.gs.Constant(node.attrs["value"].name, values)
        self.touched.add(self.original[id(node)])

    def _attributes(self) -> None:
        by_node: dict[int, list[Edit]] = defaultdict(list)
        for edit in self.structure.coupling.findings.edits:
            by_node[edit.node].append(edit)
        for index, edits in by_node.items():
            node = self.nodes[index]
            new = attribute_values(edits, self.model.graph.node[index], self.keep)
            if new:
                node.attrs.update(new)
                self.touched.add(index)
            for edit in edits:
                if isinstance(edit, SplitEdit):
                    self._explicit_split(index, edit)
                elif isinstance(edit, AxesEdit):
                    self._explicit_axes(index, edit)

    def _explicit_axes(self, index: int, edit: AxesEdit) -> None:
        """A Squeeze of all axes of size 1 must not drop one that pruning made so."""
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
        """A Split into equal parts whose parts are no longer equal needs its sizes written down."""
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
        first, last = self.nodes[edit.chain[0]], self.nodes[edit.chain[-1]]
        source, result = first.inputs[0], last.outputs[0]
        order = self._constant(f"{result.name}_order", remap(edit.order, edit.atoms, self.keep))
        place = self.graph.nodes.index(last)
        for node in (self.nodes[index] for index in edit.chain):
            node.inputs.clear()
            node.outputs.clear()
            self.graph.nodes.remove(node)
        gather = self.gs.Node("Gather", last.name, {"axis": edit.axis}, [source, order], [result])
        self.graph.nodes.insert(place - len(edit.chain) + 1, gather)

    def _mend(self, mend: Mend) -> None:
        """Make one input of one node read the number it must."""
        if mend.node < 0:
            self._mend_output(mend)
            return
        node = self.nodes[mend.node]
        old = node.inputs[mend.input]
        info = self.structure.coupling.shapes[old.name]
        stored = isinstance(old, self.gs.Constant) or (old.inputs and old.inputs[0].op == "Constant")
        self.touched.add(mend.node)
        if stored and len(old.outputs) == 1 and old not in self.graph.outputs:
            self._replace_constant(old.name, mend.required)
            self.weights.setdefault(old.name, mend.required)
        elif stored or not (info.sized and self.dynamic) or mend.actual.shape != mend.required.shape:
            node.inputs[mend.input] = self._constant(f"{old.name}_pruned", mend.required)
        else:
            self._override(mend, old)

    def _override(self, mend: Mend, old: Any) -> None:
        """Replace some elements of a size that is computed at run time, and leave the others dynamic."""
        name = self._fresh(f"{old.name}_pruned")
        out = self.gs.Variable(name, dtype=old.dtype or mend.required.dtype, shape=mend.required.shape)
        place = self.graph.nodes.index(self.nodes[mend.node])
        self.graph.nodes[place:place] = self._replacing(mend, old, out)
        self.nodes[mend.node].inputs[mend.input] = out

    def _mend_output(self, mend: Mend) -> None:
        """Give out a size as it was, where its element changed."""
        output = self.graph.outputs[mend.input]
        maker = output.inputs[0]
        name = self._fresh(f"{output.name}_pruned")
        found = self.gs.Variable(name, dtype=output.dtype or mend.required.dtype, shape=mend.actual.shape)
        maker.outputs[maker.outputs.index(output)] = found
        self.touched.add(self.original[id(maker)])
        place = self.graph.nodes.index(maker) + 1
        self.graph.nodes[place:place] = self._replacing(mend, found, output)

    def _replacing(self, mend: Mend, old: Any, out: Any) -> list[Any]:
        """Nodes that make `out` of `old`, a number that is computed at run time, by putting it right."""
        name = out.name if out.name in self.added else old.name
        values, last = old, len(steps := corrections(mend, self.opset)) - 1
        nodes = []
        for place, step in enumerate(steps):
            result = out
            if place < last:
                result = self.gs.Variable(self._fresh(f"{name}_{step.name}"), mend.required.dtype, mend.required.shape)
            constants = [self._constant(f"{name}_{key}", array) for key, array in step.constants.items()]
            nodes.append(
                self.gs.Node(step.op_type, f"{name}_{step.name}", {}, step.inputs(values, constants), [result])
            )
            values = result
        return nodes

    def _constant(self, name: str, values: Array) -> Any:
        # numpy makes scalars of what is computed from arrays without axes
        return self.gs.Constant(self._fresh(name), np.asarray(values))

    def _fresh(self, name: str) -> str:
        taken, number = name, 1
        while taken in self.tensors or taken in self.added:
            number += 1
            taken = f"{name}_{number}"
        self.added.add(taken)
        return taken

    def _drop_dead(self, idle: set[int]) -> None:
        """Remove nodes that only served a size which is now written down."""
        for node in list(reversed(self.graph.nodes)):
            if id(node) not in idle and not _is_used(node, self.graph):
                node.inputs.clear()
                self.graph.nodes.remove(node)

    def _merge(self) -> onnx.ModelProto:
        exported = self.gs.export_onnx(self.graph)
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        exported_nodes = list(exported.graph.node)
        nodes = []
        for node, proto in zip(self.graph.nodes, exported_nodes, strict=True):
            index = self.original.get(id(node))
            if index is not None and index not in self.touched:
                nodes.append(self.model.graph.node[index])
                continue
            if index is not None:
                source = self.model.graph.node[index]
                if source.doc_string:
                    proto.doc_string = source.doc_string
                proto.metadata_props.extend(source.metadata_props)
                _restore_attributes(proto, source)
            nodes.append(proto)
        del graph.node[:]
        graph.node.extend(nodes)
        self._merge_initializers(graph, exported.graph)
        self._refresh_shapes(graph)
        return result

    def _merge_initializers(self, graph: onnx.GraphProto, exported: onnx.GraphProto) -> None:
        new = {tensor.name: tensor for tensor in exported.initializer}
        used = {name for node in graph.node for name in _reads(node)} | {v.name for v in graph.output}
        before = {name for node in self.model.graph.node for name in _reads(node)}
        keepers = []
        dropped = {t.name for t in graph.initializer if t.name in before and t.name not in used}
        for index in reversed(range(len(graph.input))):
            if graph.input[index].name in dropped:
                del graph.input[index]
        for tensor in graph.initializer:
            if tensor.name in dropped:
                continue
            if tensor.name in self.weights:
                _refill(tensor, new[tensor.name])
            keepers.append(tensor)
        known = {tensor.name for tensor in keepers}
        fresh = [new[name] for name in new if name in self.added and name not in known]
        keepers += fresh
        if self.model.ir_version < 4:  # where every initializer is an input too
            graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in fresh)
        if len(keepers) != len(graph.initializer) or any(t.name in self.added for t in keepers):
            kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in keepers]
            del graph.initializer[:]
            graph.initializer.extend(kept)

    def _refresh_shapes(self, graph: onnx.GraphProto) -> None:
        """Write the new sizes into value_info and into initializers listed as inputs."""
        live = {name for node in graph.node for name in (*node.output, *node.input)}
        for index in reversed(range(len(graph.value_info))):
            value = graph.value_info[index]
            if value.name not in live:
                del graph.value_info[index]
                continue
            self._resize(value)
        for value in graph.input:
            if value.name in self.weights:
                self._resize(value)

    def _resize(self, value: onnx.ValueInfoProto) -> None:
        if value.name in self.weights:
            shape = self.weights[value.name].shape
        else:
            found = pruned_shape(self.structure, value.name, self.keep)
            if found is None or value.name not in self.structure.coupling.labels:
                return
            shape = found
        before = self.structure.coupling.shapes[value.name].shape
        dims = value.type.tensor_type.shape.dim
        if before is None or len(dims) != len(shape):
            return
        for dim, old, size in zip(dims, before, shape, strict=True):
            if old != size:
                dim.dim_value = size


def _light_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the bytes of its initializers, for editing."""
    light = onnx.ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    light.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    return light


def _refill(tensor: onnx.TensorProto, new: onnx.TensorProto) -> None:
    """Give a tensor new values, and nothing else that it did not have: files must not grow."""
    doc = tensor.doc_string
    tensor.CopyFrom(new)
    tensor.ClearField("data_location")
    tensor.ClearField("doc_string")
    if doc:
        tensor.doc_string = doc


def _restore_attributes(proto: onnx.NodeProto, source: onnx.NodeProto) -> None:
    """Keep the original attribute messages (types, doc strings) where their value did not change."""
    originals = {attribute.name: attribute for attribute in source.attribute}
    for attribute in proto.attribute:
        original = originals.get(attribute.name)
        if original is None:
            continue
        if original.type in (original.GRAPH, original.GRAPHS) or (
            original.type not in (original.TENSOR, original.SPARSE_TENSOR)
            and onnx.helper.get_attribute_value(original) == onnx.helper.get_attribute_value(attribute)
        ):
            attribute.CopyFrom(original)


def _is_used(node: Any, graph: Any) -> bool:
    outputs = {id(tensor) for tensor in graph.outputs}
    return any(tensor.outputs or id(tensor) in outputs for tensor in node.outputs)


def _reads(node: onnx.NodeProto) -> list[str]:
    from onnxcop.tracing import captured

    return [name for name in node.input if name] + sorted(captured(node))
