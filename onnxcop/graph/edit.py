"""Small edits of ONNX messages that many modules make."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, TypeVar

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import numpy_helper

from onnxcop._base.types import Array

M = TypeVar("M", bound=Message)

_NEGLIGIBLE = 2.0**-100  # products with smaller float32 weights may be denormal, which takes a hundred times as long


def copied(message: M) -> M:
    """A copy of a model, a node or a tensor."""
    copy: M = type(message)()
    copy.CopyFrom(message)
    return copy


def replace_all(field: Any, entries: Iterable[Message]) -> None:
    """Replace the entries of a repeated field, in place; the new ones may be among the old ones."""
    saved = [copied(entry) for entry in entries]
    del field[:]
    field.extend(saved)


def drop(field: Any, names: Container[str]) -> None:
    """Remove the entries of some names from a repeated field, in place; nothing is copied, since weights are large."""
    for place in reversed(range(len(field))):
        if field[place].name in names:
            del field[place]


def computed_weights(name: str, values: Array, data_type: int) -> onnx.TensorProto:
    """A stored tensor of computed weights in an element type of ONNX; negligible float32 values become 0."""
    stored = np.ascontiguousarray(values.astype(onnx.helper.tensor_dtype_to_np_dtype(data_type)))
    if stored.dtype == np.float32:
        stored = np.where(np.abs(stored) < _NEGLIGIBLE, np.float32(0), stored)
    return numpy_helper.from_array(stored, name)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def fresh_name(stem: str, taken: set[str]) -> str:
    """A name that begins with `stem` and is not in `taken`; it is added to `taken`."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name
