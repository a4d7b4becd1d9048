"""Merges an edited graph into a copy of the original.

Unchanged nodes and initializers are taken from the original, so that names, doc strings, metadata and bytes survive.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array
from onnxcop.graph.edit import copied, replace_all
from onnxcop.graph.io import WeightFile
from onnxcop.graph.subgraphs import captured
from onnxcop.rewrite.edit import GraphEditor
from onnxcop.rewrite.sizes import Sliced, pruned_shape


class Merger:
    """Merges an edited graph into a copy of the graph that it was made from.

    Args:
        solver: The editor with its result.
        graph: A copy of the graph, whose own bodies are already cut.
        top: Whether it is the top-level graph, whose inputs and outputs stay as they are.
        inputs_listed: Whether the model lists initializers as inputs too, as old ones must.
        file: File for large matrices and kernels; None to hold them in the graph.
    """

    def __init__(
        self, solver: GraphEditor, graph: onnx.GraphProto, *, top: bool, inputs_listed: bool, file: WeightFile | None
    ) -> None:
        self.solver, self.graph, self.top, self.inputs_listed = solver, graph, top, inputs_listed
        self.file = file
        self.structure, self.keep, self.weights = solver.structure, solver.keep, solver.weights

    def merge(self) -> None:
        """Change the copy."""
        exported = self.solver.gs.export_onnx(self.solver.graph).graph
        self._merge_nodes(exported)
        self._merge_initializers(exported)
        self._refresh_shapes()

    def _merge_nodes(self, exported: onnx.GraphProto) -> None:
        source = self.solver.source
        holders = {
            index: copied(node)
            for index, node in enumerate(self.graph.node)
            if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)
        }
        nodes = []
        for node, proto in zip(self.solver.graph.nodes, exported.node, strict=True):
            index = self.solver.original.get(id(node))
            if index in holders:
                holder = holders[index]
                holder.ClearField("input")
                holder.ClearField("output")
                holder.input.extend(proto.input)
                holder.output.extend(proto.output)
                nodes.append(holder)
            elif index is None:
                nodes.append(proto)
            elif index in self.solver.touched:
                nodes.append(_restored(proto, source.node[index]))
            else:
                nodes.append(source.node[index])
        replace_all(self.graph.node, nodes)

    def _merge_initializers(self, exported: onnx.GraphProto) -> None:
        graph, added = self.graph, self.solver.added
        new = {tensor.name: tensor for tensor in exported.initializer}
        used = {name for node in graph.node for name in _reads(node)} | {v.name for v in graph.output}
        before = {name for node in self.solver.source.node for name in _reads(node)}
        dropped = {t.name for t in graph.initializer if t.name in before and t.name not in used}
        for entries in (graph.input, graph.initializer):
            for index in reversed(range(len(entries))):
                if entries[index].name in dropped:
                    del entries[index]
        for tensor in graph.initializer:
            values = self.weights.get(tensor.name)
            if isinstance(values, Sliced):
                refill(tensor, values.values(), self.file)
            elif values is not None:  # not among the exported ones if only bodies read it
                _replace(tensor, new.get(tensor.name) or numpy_helper.from_array(values, tensor.name))
        known = {tensor.name for tensor in graph.initializer}
        fresh = [new[name] for name in new if name in added and name not in known]
        graph.initializer.extend(fresh)
        if self.top and self.inputs_listed:
            graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in fresh)

    def _refresh_shapes(self) -> None:
        """Write the new sizes into value_info, initializers listed as inputs, and inputs and outputs of a body."""
        graph = self.graph
        live = {name for node in graph.node for name in (*node.output, *node.input)}
        for index in reversed(range(len(graph.value_info))):
            value = graph.value_info[index]
            if value.name not in live:
                del graph.value_info[index]
                continue
            self._resize(value)
        for value in graph.input if self.top else (*graph.input, *graph.output):
            if value.name in self.weights or not self.top:
                self._resize(value)

    def _resize(self, value: onnx.ValueInfoProto) -> None:
        if value.name in self.weights:
            shape = self.weights[value.name].shape
        else:
            resized = pruned_shape(self.structure, value.name, self.keep)
            if resized is None or value.name not in self.structure.coupling.labels:
                return
            shape = resized
        before = self.structure.coupling.shapes[value.name].shape
        dims = value.type.tensor_type.shape.dim
        if before is None or len(dims) != len(shape):
            return
        for dim, old, size in zip(dims, before, shape, strict=True):
            if old != size:
                dim.dim_value = size


def refill(tensor: onnx.TensorProto, values: Array, file: WeightFile | None) -> None:
    """Give a large tensor new values of its type, with as few copies of them as there can be."""
    if file is not None and sum(size > 1 for size in values.shape) > 1:
        _replace(tensor, file.tensor(tensor.name, values))
        return
    if values.dtype.kind not in "biufc":
        _replace(tensor, numpy_helper.from_array(values, tensor.name))
        return
    _replace(tensor, onnx.TensorProto(name=tensor.name, dims=values.shape, data_type=tensor.data_type))
    data = values.tobytes()
    del values
    tensor.raw_data = data


def _replace(tensor: onnx.TensorProto, new: onnx.TensorProto) -> None:
    """Replace a tensor, except its description, and add no other fields: files must not grow."""
    doc = tensor.doc_string
    tensor.CopyFrom(new)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        tensor.ClearField("data_location")
    tensor.ClearField("doc_string")
    if doc:
        tensor.doc_string = doc


def _restored(proto: onnx.NodeProto, source: onnx.NodeProto) -> onnx.NodeProto:
    """Restore the original's description of a node, and its attribute messages with unchanged values."""
    if source.doc_string:
        proto.doc_string = source.doc_string
    proto.metadata_props.extend(source.metadata_props)
    originals = {attribute.name: attribute for attribute in source.attribute}
    for attribute in proto.attribute:
        original = originals.get(attribute.name, attribute)
        stored = original.type in (original.TENSOR, original.SPARSE_TENSOR)
        if not stored and onnx.helper.get_attribute_value(original) == onnx.helper.get_attribute_value(attribute):
            attribute.CopyFrom(original)
    return proto


def _reads(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.input if name] + sorted(captured(node))
