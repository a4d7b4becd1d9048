"""Type, sizes and, if it is small, value of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop._base.types import Array

Shape = tuple[int, ...]

LARGEST_FOLDED = 4096  # elements of an integer tensor to evaluate; floats only up to 16
_LARGEST_FOLDED_FLOAT = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Facts about a tensor.

    Attributes:
        elem_type: `onnx.TensorProto` data type, 0 if unknown.
        shape: Concrete sizes, None if unknown.
        value: The tensor itself if it is small and does not depend on the data.
        sized: Whether `value` was computed from the size of a runtime tensor.
        varies: If so, bool like `value`: which of its elements were; the others are plain numbers.
    """

    elem_type: int = 0
    shape: Shape | None = None
    value: Array | None = None
    sized: bool = False
    varies: Array | None = None


def foldable(dtype: np.dtype[Any], size: int) -> bool:
    """Whether a constant of this type and size is evaluated."""
    if dtype.kind in "iub":
        return size <= LARGEST_FOLDED
    return dtype.kind == "f" and size <= _LARGEST_FOLDED_FLOAT


def constant_info(tensor: onnx.TensorProto) -> TensorInfo:
    """Describe an initializer, with its value if it is small."""
    shape = tuple(tensor.dims)
    size = int(np.prod(shape, dtype=np.int64))
    value = None
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if foldable(dtype, size) and tensor.data_location != onnx.TensorProto.EXTERNAL:
            value = numpy_helper.to_array(tensor)
    except (KeyError, ValueError, TypeError):
        value = None
    return TensorInfo(tensor.data_type, shape, value)


def constant_node(node: onnx.NodeProto) -> TensorInfo:
    """Describe the output of a Constant."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        return constant_info(attribute.t)
    if attribute.name in ("value_int", "value_float", "value_ints", "value_floats"):
        dtype = np.int64 if "int" in attribute.name else np.float32
        value = np.array(onnx.helper.get_attribute_value(attribute), dtype=dtype)
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return TensorInfo(elem_type, value.shape, value if foldable(value.dtype, value.size) else None)
    return TensorInfo()


def from_type(type_proto: onnx.TypeProto | None) -> TensorInfo:
    """The info that a declared type gives."""
    if type_proto is None or not type_proto.HasField("tensor_type"):
        return TensorInfo()
    tensor_type = type_proto.tensor_type
    if not tensor_type.HasField("shape"):
        return TensorInfo(tensor_type.elem_type)
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor_type.shape.dim]
    return TensorInfo(tensor_type.elem_type, None if any(d < 0 for d in dims) else tuple(dims))
