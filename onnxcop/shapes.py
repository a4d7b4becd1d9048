"""The shape, type and, where it is small and constant, the value of every tensor of a graph.

One walk in topological order. Dynamic dimensions of the graph inputs are given concrete sizes first,
so that every computed size (`Shape → Gather → Concat → Reshape`) folds to a number. Shapes come from
ONNX's own per-operator inference with those numbers at hand; what it cannot tell (operators of other
domains, control flow) comes from one run of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.shape_inference import infer_node_outputs

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

LARGEST_FOLDED = 4096  # elements of an integer tensor that is evaluated; floats only up to 16
_LARGEST_FOLDED_FLOAT = 16
# They move elements of their first input (Concat: of all).
_PICKING = {"Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
            "Transpose", "Unsqueeze"}  # fmt: skip
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor.

    Attributes:
        elem_type: `onnx.TensorProto` data type, 0 if unknown.
        shape: Concrete sizes, None if unknown.
        value: The tensor itself where it is small and does not depend on the data.
        sized: Whether `value` was computed from the size of a runtime tensor.
        varies: Where it was, bool like `value`, which of its elements were; the others are plain numbers.
    """

    elem_type: int = 0
    shape: Shape | None = None
    value: Array | None = None
    sized: bool = False
    varies: Array | None = None


@dataclass(slots=True)
class ShapeMap:
    """`TensorInfo` by tensor name, for the top-level graph of a model."""

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.infos.get(name, _NOTHING)


_NOTHING = TensorInfo()


def infer(
    model: onnx.ModelProto,
    input_shapes: Mapping[str, Shape],
    known: Mapping[str, tuple[int, Shape]] | None = None,
) -> ShapeMap:
    """Infer shapes and fold small constants, for the given input shapes.

    Args:
        model: The model; weights must be loaded, or at least declare their dims.
        input_shapes: A concrete shape for every graph input.
        known: Element type and shape of tensors that inference cannot see (from a run).

    Returns:
        The map; `unknown` lists tensors whose shape could not be told.
    """
    walker = _Walker(model, dict(known or {}))
    walker.seed(input_shapes)
    for node in model.graph.node:
        walker.visit(node)
    return walker.map


class _Walker:
    def __init__(self, model: onnx.ModelProto, known: dict[str, tuple[int, Shape]]) -> None:
        self.model = model
        self.known = known
        self.map = ShapeMap()
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.opsets.setdefault("", self.opsets.get("ai.onnx", 1))
        self.opset_protos = list(model.opset_import)

    def seed(self, input_shapes: Mapping[str, Shape]) -> None:
        infos = self.map.infos
        for value in self.model.graph.input:
            elem_type = value.type.tensor_type.elem_type
            shape = input_shapes.get(value.name)
            infos[value.name] = TensorInfo(elem_type, tuple(shape) if shape is not None else None)
        for tensor in self.model.graph.initializer:
            infos[tensor.name] = constant_info(tensor)
        for sparse in self.model.graph.sparse_initializer:
            infos[sparse.values.name] = TensorInfo(sparse.values.data_type, tuple(sparse.dims))

    def visit(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            self.map.infos[node.output[0]] = _constant_node(node)
            return
        if not self._fold(node):
            self._infer(node)

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Evaluate the node if everything it reads is known; return whether that was possible."""
        if node.domain not in ("", "ai.onnx") or any(a.type == a.GRAPH for a in node.attribute):
            return False
        inputs = [self.map[name] if name else None for name in node.input]
        if node.op_type in ("Shape", "Size"):
            source = inputs[0]
            if source is None or source.shape is None:
                return False
            result = shape_value(node, source.shape)
            self._store(node, [result], [np.ones(result.shape, np.bool_)])
            return True
        if not inputs or node.op_type in _RANDOM:
            return False
        if any(info is not None and info.value is None for info in inputs):
            return False
        results = evaluate(node, [None if i is None else i.value for i in inputs], self.opsets[""])
        if results is None:
            return False
        self._store(node, results, self._varying(node, inputs, results))
        return True

    def _varying(
        self, node: onnx.NodeProto, inputs: list[TensorInfo | None], results: list[Array]
    ) -> list[Array] | None:
        """Which elements of the results were computed from the size of a runtime tensor, if any were."""
        if not any(info is not None and info.sized for info in inputs):
            return None
        data = inputs if node.op_type == "Concat" else inputs[:1]
        if node.op_type in _PICKING and not any(info is not None and info.sized for info in inputs[len(data) :]):
            marks = [_marks(info) if place < len(data) else info.value if info else None
                     for place, info in enumerate(inputs)]  # fmt: skip
            found = evaluate(node, marks, self.opsets[""])
            if found is not None:
                return [mark.astype(np.bool_) for mark in found]
        return [np.ones(result.shape, np.bool_) for result in results]

    def _store(self, node: onnx.NodeProto, results: list[Array], varies: list[Array] | None) -> None:
        for place, (name, result) in enumerate(zip(node.output, results, strict=False)):
            if name:
                elem_type = onnx.helper.np_dtype_to_tensor_dtype(result.dtype)
                value = result if _foldable(result.dtype, result.size) else None
                mark = None if varies is None else varies[place]
                self.map.infos[name] = TensorInfo(elem_type, result.shape, value, varies is not None, mark)

    def _infer(self, node: onnx.NodeProto) -> None:
        found = self._inferred_types(node)
        for name in node.output:
            if not name:
                continue
            if name in self.known:
                elem_type, shape = self.known[name]
                self.map.infos[name] = TensorInfo(elem_type, shape)
                continue
            info = _from_type(found.get(name))
            self.map.infos[name] = info
            if info.shape is None:
                self.map.unknown.append(name)

    def _inferred_types(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return {}
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for name in node.input:
            info = self.map[name]
            if not name or not info.elem_type:
                continue
            types[name] = onnx.helper.make_tensor_type_proto(info.elem_type, info.shape)
            if info.value is not None:
                data[name] = numpy_helper.from_array(info.value, name)
        try:
            return infer_node_outputs(
                schema, node, types, data, opset_imports=self.opset_protos, ir_version=self.model.ir_version
            )
        except Exception:  # the C++ side raises many types; an unknown shape is the honest answer
            return {}


def _marks(info: TensorInfo | None) -> Array | None:
    """1 where an element was computed from a size, 0 where not."""
    if info is None or info.value is None:
        return None
    return np.zeros(info.value.shape, np.int64) if info.varies is None else info.varies.astype(np.int64)


def shape_value(node: onnx.NodeProto, shape: Shape) -> Array:
    """What a Shape or Size node yields for an input of this shape."""
    if node.op_type == "Size":
        return np.array(int(np.prod(shape)), dtype=np.int64)
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(shape[slice(bounds.get("start"), bounds.get("end"))], dtype=np.int64)


def evaluate(
    node: onnx.NodeProto, inputs: list[Array | None], opset: int, largest: int = LARGEST_FOLDED
) -> list[Array] | None:
    """Run one operator with ONNX's reference implementation; None if it has none, fails, or yields too much."""
    from onnx.reference.ops import load_op

    def silent(*_: object) -> None:
        return None

    try:
        kernel = load_op("", node.op_type, opset)
        run_params = {
            "log": silent, "opsets": {"": opset}, "verbose": 0, "new_ops": None, "evaluator_cls": None,
        }  # fmt: skip
        with np.errstate(all="ignore"):
            results = kernel(node, run_params).run(*inputs)
    except Exception:
        return None
    if not all(isinstance(result, np.ndarray) for result in results):
        results = tuple(np.asarray(result) for result in results)
    if any(result.size > largest for result in results):
        return None
    return list(results)


def _foldable(dtype: np.dtype[Any], size: int) -> bool:
    if dtype.kind in "iub":
        return size <= LARGEST_FOLDED
    return dtype.kind == "f" and size <= _LARGEST_FOLDED_FLOAT


def constant_info(tensor: onnx.TensorProto) -> TensorInfo:
    """Describe an initializer, with its value where it is small."""
    shape = tuple(tensor.dims)
    size = int(np.prod(shape, dtype=np.int64))
    value = None
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if _foldable(dtype, size) and tensor.data_location != onnx.TensorProto.EXTERNAL:
            value = numpy_helper.to_array(tensor)
    except (KeyError, ValueError, TypeError):
        value = None
    return TensorInfo(tensor.data_type, shape, value)


def _constant_node(node: onnx.NodeProto) -> TensorInfo:
    attribute = node.attribute[0]
    if attribute.name == "value":
        return constant_info(attribute.t)
    if attribute.name in ("value_int", "value_float", "value_ints", "value_floats"):
        dtype = np.int64 if "int" in attribute.name else np.float32
        value = np.array(onnx.helper.get_attribute_value(attribute), dtype=dtype)
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return TensorInfo(elem_type, value.shape, value if _foldable(value.dtype, value.size) else None)
    return TensorInfo()


def _from_type(type_proto: onnx.TypeProto | None) -> TensorInfo:
    if type_proto is None or not type_proto.HasField("tensor_type"):
        return TensorInfo()
    tensor_type = type_proto.tensor_type
    if not tensor_type.HasField("shape"):
        return TensorInfo(tensor_type.elem_type)
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor_type.shape.dim]
    return TensorInfo(tensor_type.elem_type, None if any(d < 0 for d in dims) else tuple(dims))


def has_dynamic_dims(values: Iterable[onnx.ValueInfoProto]) -> bool:
    """Whether any of the values has a dimension without a fixed size."""
    return any(
        not dim.HasField("dim_value") or dim.dim_value < 0
        for value in values
        for dim in value.type.tensor_type.shape.dim
    )
