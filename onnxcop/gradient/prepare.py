"""Preparation of a model for its backward graph: a recent opset, plain operators, weights as stored tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import version_converter

from onnxcop._base.types import Array
from onnxcop.errors import ModelError
from onnxcop.gradient.builder import FLOATS, Size
from onnxcop.graph.edit import copied, opset_of, replace_all
from onnxcop.graph.shapes import ShapeMap
from onnxcop.runtime.input_shapes import settle_shapes, shapes_of
from onnxcop.runtime.session import EngineOptions

OPSET = 18  # the first in which all reductions take their axes as an input, and scattering can add up
_DOMAIN = "onnxcop.inlined"


def raised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at opset 18 or later; unchanged if it is.

    Raises:
        ModelError: ONNX cannot convert it.
    """
    opset = opset_of(model)
    if opset >= OPSET:
        return model
    try:
        converted = version_converter.convert_version(model, OPSET)
        onnx.checker.check_model(converted)
    except Exception as error:  # the C++ side raises many types, all of them about this model
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"the model cannot be raised from opset {opset} to {OPSET} for its gradient: {cause}"
        ) from None
    converted.ir_version = max(converted.ir_version, 8)
    return converted


def store_constants(model: onnx.ModelProto) -> None:
    """Turn Constant nodes of floating-point tensors into stored tensors of the same names, in place."""
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None and value.data_type in FLOATS:
            stored = model.graph.initializer.add()
            stored.CopyFrom(value)
            stored.name = node.output[0]
        else:
            kept.append(node)
    replace_all(model.graph.node, kept)


def inline_functions(
    model: onnx.ModelProto, shapes: ShapeMap, ruled: Container[tuple[str, str]]
) -> onnx.ModelProto | None:
    """Replace operators that have no rule but a function body in the ONNX specification.

    Args:
        model: The model; not changed.
        shapes: Types of its tensors.
        ruled: Operators that have rules.

    Returns:
        The model with their function bodies in place, None if there are none.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    inlined = copied(model)
    for number, node in enumerate(inlined.graph.node):
        if (node.domain.removeprefix("ai.onnx"), node.op_type) in ruled:
            continue
        body = _function(node, opsets, shapes)
        if body is None:
            continue
        body.domain, body.name = _DOMAIN, f"{node.op_type}_{number}"
        replace_all(body.opset_import, model.opset_import)
        inlined.functions.append(body)
        node.domain, node.op_type = _DOMAIN, body.name
    if not inlined.functions:
        return None
    inlined.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    from onnx import inliner

    inlined = inliner.inline_local_functions(inlined)
    kept = [entry for entry in inlined.opset_import if entry.domain != _DOMAIN]
    replace_all(inlined.opset_import, kept)
    return inlined


def _function(node: onnx.NodeProto, opsets: Mapping[str, int], shapes: ShapeMap) -> onnx.FunctionProto | None:
    """The function body of an operator, for its opset and types; attributes get their defaults."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    opset = opsets.get(domain, 1)
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, domain)  # its type information lacks functions
    except onnx.defs.SchemaError:
        return None
    given = {attribute.name for attribute in node.attribute}
    node.attribute.extend(
        attribute.default_value
        for name, attribute in schema.attributes.items()
        if name not in given and attribute.default_value.name
    )
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        return _parsed(schema.get_function_with_opset_version(max(versions))) if versions else None
    if not schema.has_context_dependent_function:
        return None
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    types = [
        (onnx.helper.make_tensor_type_proto(shapes[name].elem_type, shapes[name].shape) if name else onnx.TypeProto())
        for name in node.input
    ]
    if not versions:
        return None
    described = node.SerializeToString(), [kind.SerializeToString() for kind in types]
    return _parsed(schema.get_context_dependent_function_with_opset_version(max(versions), *described))


def _parsed(data: bytes) -> onnx.FunctionProto | None:
    return onnx.FunctionProto.FromString(data) if data else None


@dataclass(frozen=True, slots=True)
class Known:
    """Shapes and values of the tensors of a model.

    Attributes:
        shapes: Element types and ranks, from one concrete shape of the inputs.
        sizes: Sizes that hold for all inputs, where inference finds them.
    """

    shapes: ShapeMap
    sizes: Mapping[str, tuple[Size, ...]]

    @classmethod
    def of(
        cls, model: onnx.ModelProto, options: EngineOptions, input_shapes: Mapping[str, Sequence[int]] | None = None
    ) -> Known:
        """Infer them."""
        concrete = shapes_of(model, settle_shapes(model, input_shapes, options), options)
        try:
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except Exception:  # the C++ side raises many types; unknown sizes are the honest answer
            inferred = model
        sizes: dict[str, tuple[Size, ...]] = {}
        for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
            if value.type.tensor_type.HasField("shape"):
                sizes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                    for dim in value.type.tensor_type.shape.dim
                )
        sizes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        return cls(concrete, sizes)

    def shape(self, name: str) -> tuple[Size, ...] | None:
        """The sizes of a tensor, None if not even its rank is known."""
        shape, sizes = self.shapes[name].shape, self.sizes.get(name)
        if shape is None:
            return sizes
        return sizes if sizes is not None and len(sizes) == len(shape) else (None,) * len(shape)

    def value(self, name: str) -> Array | None:
        """The value of a tensor, if it is small and the same for all inputs."""
        info = self.shapes[name]
        return None if info.value is None or (info.varies is not None and info.varies.any()) else info.value
