"""Conditions for analysing a model: every name has one producer, and weights are complete.

The ONNX checker asks for more (e.g. that it knows every operator) and refuses models that run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from onnxcop.errors import ModelError
from onnxcop.graph.subgraphs import given, made

_TYPED: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.INT64: "int64_data",
    onnx.TensorProto.UINT64: "uint64_data",
    onnx.TensorProto.UINT32: "uint64_data",
    onnx.TensorProto.STRING: "string_data",
}
_PACKED = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def check(model: onnx.ModelProto, where: str) -> None:
    """Refuse a model whose graph or weights are broken.

    Args:
        model: The model, its weights in memory.
        where: Name of the model in messages.

    Raises:
        ModelError: It imports no operator set, a name has no producer or several, nodes are not in topological order,
            or a weight has fewer or more values than its shape.
    """
    domains = {opset.domain for opset in model.opset_import}
    if not domains & {"", "ai.onnx"} and any(not node.domain for node in model.graph.node):
        raise ModelError(f"{where} imports no version of the ONNX operators; export it again")
    _check_names(model.graph, [], where)
    known = made(model.graph)
    for value in model.graph.output:
        if value.name not in known:
            raise ModelError(f"{where}: no node produces the graph output {value.name!r}; export it again")
    for tensor in tensors(model.graph):
        _check_values(tensor, where)


def check_text(message: Any, where: str, what: str = "the model") -> None:
    """Refuse names and other texts that are not UTF-8; protobuf accepts them and returns bytes.

    Args:
        message: A part of a model.
        where: Name of the model in messages.
        what: Name of the part.

    Raises:
        ModelError: One of its texts is not UTF-8.
    """
    for entry, value in message.ListFields():
        if entry.message_type is not None:
            kind = entry.name.replace("_", " ")
            for part in [value] if hasattr(value, "ListFields") else value:
                check_text(part, where, what if entry.name == "graph" else kind)
        elif entry.type == entry.TYPE_STRING:
            for text in [value] if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes):
                    raise ModelError(
                        f"{where}: the {entry.name.replace('_', ' ')} {text[:60]!r} of {_called(message, what)} is not "
                        "UTF-8 text; export the model again"
                    )


def _called(message: Any, what: str) -> str:
    """A part of a model with its name, if it has a readable one."""
    name = getattr(message, "name", "")
    return f"{what} {name!r}" if isinstance(name, str) and name else what


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors stored in a graph or in the bodies of its control flow."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors(attribute.g)
            for inner in attribute.graphs:
                yield from tensors(inner)


def byte_size(tensor: onnx.TensorProto) -> int | None:
    """Bytes that a tensor's raw data must have; None for types that pack or have no fixed size."""
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return None
    if tensor.data_type == onnx.TensorProto.STRING or tensor.data_type in _PACKED:
        return None
    if tensor.data_type > onnx.TensorProto.FLOAT8E5M2FNUZ:
        return None
    return int(_count(tensor) * itemsize)


def _count(tensor: onnx.TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count


def _check_names(graph: onnx.GraphProto, outer: list[set[str]], where: str) -> None:
    known = given(graph)
    scopes = [known, *outer]
    later: set[str] | None = None
    for node in graph.node:
        label = f"node {(node.name or node.op_type or ', '.join(node.output))!r}"
        if not node.op_type:
            raise ModelError(f"{where}: {label} has no operator type; export the model again")
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                later = later or {output for other in graph.node for output in other.output}
                cause = (
                    "which only a later node produces; sort the nodes topologically"
                    if name in later
                    else "which no node produces; export the model again"
                )
                raise ModelError(f"{where}: {label} reads {name!r}, {cause}")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _check_names(attribute.g, scopes, where)
            for inner in attribute.graphs:
                _check_names(inner, scopes, where)
        for name in node.output:
            if name in known:
                raise ModelError(
                    f"{where}: {label} makes {name!r}, which another node produces; export the model again"
                )
            if name:
                known.add(name)


def _check_values(tensor: onnx.TensorProto, where: str) -> None:
    count = _count(tensor)
    if tensor.HasField("raw_data"):
        have, want, unit = len(tensor.raw_data), byte_size(tensor), "bytes"
    else:
        field = _TYPED.get(tensor.data_type, "int32_data")
        have, unit = len(getattr(tensor, field)), "values"
        plain = byte_size(tensor) is not None or tensor.data_type == onnx.TensorProto.STRING
        complex_type = tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
        want = count if plain and not complex_type else None
    if min(tensor.dims, default=0) < 0 or (want is not None and have != want):
        raise ModelError(
            f"{where}: tensor {tensor.name!r} of shape {list(tensor.dims)} holds {have} of {want} "
            f"{unit}; the file is damaged, export or download it again"
        )
