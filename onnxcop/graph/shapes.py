"""The shape and type of every tensor of a model, and its value if it is small and constant.

The graph is visited once in topological order, including bodies of control flow. Dynamic dimensions of the inputs get
concrete sizes first, so that every computed size (`Shape → Gather → Concat → Reshape`) folds to a number. Shapes come
from ONNX's own per-operator inference with those numbers. Those that it cannot determine (operators of other domains,
loops with a data-dependent end) come from one run of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.shape_inference import infer_node_outputs

from onnxcop._base.types import Array
from onnxcop.graph.control_flow import KINDS, Body, UnusualForm, bodies_of
from onnxcop.graph.tensor_info import (
    LARGEST_FOLDED,
    Shape,
    TensorInfo,
    constant_info,
    constant_node,
    foldable,
    from_type,
)
from onnxcop.graph.traits import Trait, traits

__all__ = [
    "LARGEST_FOLDED", "Array", "Shape", "ShapeMap", "TensorInfo", "evaluate", "has_dynamic_dims", "infer",
    "shape_value",
]  # fmt: skip

# Operators that move elements of their first input (Concat: of all).
_PICKING = {"Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
            "Transpose", "Unsqueeze"}  # fmt: skip
RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
)


@dataclass(slots=True)
class ShapeMap:
    """`TensorInfo` by tensor name, for a model with unique names.

    Attributes:
        infos: Info of every tensor.
        unknown: Tensors of the top-level graph whose shape could not be determined.
        trouble: Why the model could not be run to determine them.
    """

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    trouble: str = ""

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
        The map; `unknown` lists tensors whose shape could not be determined.
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
        self.depth = 0

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
            self.map.infos[node.output[0]] = constant_node(node)
            return
        if node.op_type in KINDS and self._control(node):
            return
        if not self._fold(node):
            self._infer(node)

    def _control(self, node: onnx.NodeProto) -> bool:
        """Visit the bodies of a node; return whether it has any that can be visited."""
        try:
            bodies = bodies_of(node, self.opsets[""])
        except UnusualForm:
            return False
        for body in bodies:
            self._body(node, body)
        infos = leaving(node, bodies, self.map)
        for name in node.output:
            if name:
                self._note(name, infos.get(name, _NOTHING))
        return True

    def _body(self, node: onnx.NodeProto, body: Body) -> None:
        """Visit a body; visit it again without the sizes of states that change from step to step."""
        infos = self.map.infos
        infos |= entering(node, body, self.map)
        infos |= {tensor.name: constant_info(tensor) for tensor in body.graph.initializer}
        self.depth += 1
        for _ in range(len(body.carried) + 1):
            for inner in body.graph.node:
                self.visit(inner)
            drifting = [a for a, b in body.carried if infos[a].shape not in (None, self.map[b].shape)]
            if not drifting:
                break
            infos |= {name: TensorInfo(infos[name].elem_type) for name in drifting}
        self.depth -= 1

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Evaluate the node if all of its inputs are known; return whether that was possible."""
        if node.domain not in ("", "ai.onnx") or any(a.type == a.GRAPH for a in node.attribute):
            return False
        inputs = [self.map[name] if name else None for name in node.input]
        if traits(node) & Trait.SIZES:
            source = inputs[0]
            if source is None or source.shape is None:
                return False
            result = shape_value(node, source.shape)
            self._store(node, [result], [np.ones(result.shape, np.bool_)])
            return True
        if not inputs or node.op_type in RANDOM:
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
        """Which elements of the results depend on the size of a runtime tensor, if any do."""
        if not any(info is not None and info.sized for info in inputs):
            return None
        data = inputs if traits(node) & Trait.JOINS else inputs[:1]
        if node.op_type in _PICKING and not any(info is not None and info.sized for info in inputs[len(data) :]):
            marks = [_marks(info) if place < len(data) else info.value if info else None
                     for place, info in enumerate(inputs)]  # fmt: skip
            outputs = evaluate(node, marks, self.opsets[""])
            if outputs is not None:
                return [mark.astype(np.bool_) for mark in outputs]
        return [np.ones(result.shape, np.bool_) for result in results]

    def _store(self, node: onnx.NodeProto, results: list[Array], varies: list[Array] | None) -> None:
        for place, (name, result) in enumerate(zip(node.output, results, strict=False)):
            if name:
                elem_type = onnx.helper.np_dtype_to_tensor_dtype(result.dtype)
                value = result if foldable(result.dtype, result.size) else None
                mark = None if varies is None else varies[place]
                self.map.infos[name] = TensorInfo(
                    elem_type=elem_type, shape=result.shape, value=value, sized=varies is not None, varies=mark
                )

    def _infer(self, node: onnx.NodeProto) -> None:
        types = self._inferred_types(node)
        for name in node.output:
            if not name:
                continue
            self._note(name, from_type(types.get(name)))

    def _note(self, name: str, info: TensorInfo) -> None:
        """Record a tensor that was not folded."""
        if name in self.known:
            info = TensorInfo(*self.known[name])
        self.map.infos[name] = info
        if info.shape is None and not self.depth:  # tensors of bodies are not visible in a run
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
    """1 for elements computed from a size, else 0."""
    if info is None or info.value is None:
        return None
    return np.zeros(info.value.shape, np.int64) if info.varies is None else info.varies.astype(np.int64)


def shape_value(node: onnx.NodeProto, shape: Shape) -> Array:
    """The result of a Shape or Size node for an input of this shape."""
    if node.op_type == "Size":
        return np.array(int(np.prod(shape)), dtype=np.int64)
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(shape[slice(bounds.get("start"), bounds.get("end"))], dtype=np.int64)


def evaluate(
    node: onnx.NodeProto, inputs: list[Array | None], opset: int, largest: int = LARGEST_FOLDED
) -> list[Array] | None:
    """Run one operator with ONNX's reference implementation; None if it has none, fails, or returns too much."""
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


def has_dynamic_dims(values: Iterable[onnx.ValueInfoProto]) -> bool:
    """Whether any of the values has a dimension without a fixed size."""
    return any(
        not dim.HasField("dim_value") or dim.dim_value < 0
        for value in values
        for dim in value.type.tensor_type.shape.dim
    )


class Infos(Protocol):
    """Infos of tensors, by name."""

    def __getitem__(self, name: str) -> TensorInfo: ...


def entering(node: onnx.NodeProto, body: Body, infos: Infos) -> dict[str, TensorInfo]:
    """Infos of a body's inputs at its first step, without values, which change from step to step."""
    entered: dict[str, TensorInfo] = {}
    for value in body.graph.input:
        declared = from_type(value.type)
        entered[value.name] = declared if declared.elem_type else TensorInfo()
    if node.op_type == "Loop":
        step, going = (value.name for value in body.graph.input[:2])
        entered[step] = TensorInfo(onnx.TensorProto.INT64, entered[step].shape or ())
        shape: Shape = entered[going].shape or ()
        start = infos[node.input[1]].value if node.input[1] else np.ones((), np.bool_)
        goes = start is not None and bool(np.all(start))
        entered[going] = TensorInfo(onnx.TensorProto.BOOL, shape, np.ones(shape, np.bool_) if goes else None)
    for passage in body.enters:
        info = infos[passage.outer]
        outer = info.shape
        if outer is not None and passage.axis is not None:
            axis = passage.axis % len(outer)
            outer = outer[:axis] + outer[axis + 1 :]
        entered[passage.inner] = TensorInfo(info.elem_type, outer)
    return entered


def leaving(node: onnx.NodeProto, bodies: Sequence[Body], infos: Infos) -> dict[str, TensorInfo]:
    """Infos of a node's outputs after its bodies have been visited."""
    outgoing: dict[str, TensorInfo] = {}
    taken = taken_branch(node, infos)
    for body in bodies:
        if taken is not None and body.attribute != taken:
            continue
        for passage in body.leaves:
            info = infos[passage.inner]
            shape = info.shape
            if shape is not None and passage.axis is not None:
                count = body_runs(node, body, infos)
                axis = passage.axis % (len(shape) + 1)
                shape = None if count is None else (*shape[:axis], count, *shape[axis:])
            other = outgoing.get(passage.outer)
            if other is not None and other.shape != shape:
                shape = None
            outgoing[passage.outer] = TensorInfo(info.elem_type, shape)
    return outgoing


def taken_branch(node: onnx.NodeProto, infos: Infos) -> str | None:
    """The branch that an If takes at the analysed sizes, None if the data decide."""
    if node.op_type != "If":
        return None
    value = infos[node.input[0]].value
    if value is None:
        return None
    return "then_branch" if bool(np.all(value)) else "else_branch"


def body_runs(node: onnx.NodeProto, body: Body, infos: Infos) -> int | None:
    """How often a body runs, None if that is not known before the run."""
    if node.op_type == "If":
        return 1
    if node.op_type == "Scan":
        for passage in body.enters:
            shape = infos[passage.outer].shape
            if passage.axis is not None and shape is not None:
                return shape[passage.axis % len(shape)]
        return None
    most = infos[node.input[0]].value if node.input[0] else None
    goes_on = infos[body.rigid[0]].value
    if most is None or goes_on is None or not bool(np.all(goes_on)):
        return None
    return int(np.asarray(most).reshape(-1)[0])
