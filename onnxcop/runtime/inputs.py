"""Inputs of a model: declared sizes, random values, and shapes to try for dynamic axes.

The analysis needs a concrete size for every dynamic axis. If the user gives none, a few common sizes are tried in turn,
and the first with which the model runs is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from onnxcop._base.types import Feed
from onnxcop.errors import ModelError
from onnxcop.graph.shapes import Shape

log = logging.getLogger("onnxcop")


# Sizes for (height, width) of images and for the length of sequences, most common first.


def model_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a user feeds: graph inputs that are not initializers."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def declared(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Declared sizes of a value, None for dynamic ones."""
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in value.type.tensor_type.shape.dim
    )


def _batch_names(model: onnx.ModelProto) -> set[str]:
    """Names of dynamic sizes that stand for the batch: first axes of inputs."""
    leading = {
        value.type.tensor_type.shape.dim[0].dim_param
        for value in model.graph.input
        if len(value.type.tensor_type.shape.dim)
    }
    return leading - {""}


def other_shapes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """Shapes unlike the given ones, for a second check of a model with dynamic sizes.

    Args:
        model: The model.
        shapes: Concrete shapes of its inputs.

    Yields:
        Shapes that differ in every dynamic axis, then in the batch alone, then in all but the batch; nothing if all
        sizes are fixed. Axes of one name or of one size stay equal. The model may not run with all of them.
    """
    leading, seen = batch_axes(model), [dict(shapes)]
    for batch, rest in ((True, True), (True, False), (False, True)):
        other = dict(shapes)
        for value in model_inputs(model):
            lead = leading[value.name]
            other[value.name] = tuple(
                _other_size(size, axis in lead) if fixed is None and (batch if axis in lead else rest) else size
                for axis, (fixed, size) in enumerate(zip(declared(value), shapes[value.name], strict=True))
            )
        if other not in seen:
            seen.append(other)
            yield other


def batch_axes(model: onnx.ModelProto) -> dict[str, set[int]]:
    """The dynamic axes of every input that seem to carry samples: the first ones, and others of their names."""
    batches = _batch_names(model)
    return {
        value.name: {
            axis
            for axis, (size, dim) in enumerate(zip(declared(value), value.type.tensor_type.shape.dim, strict=True))
            if size is None and (axis == 0 or dim.dim_param in batches)
        }
        for value in model_inputs(model)
    }


def _other_size(size: int, batch: bool) -> int:
    """Another size: images in steps of 32, since networks halve them up to five times."""
    if batch or size == 1:
        return size + 1
    return size - 32 if size > 64 else 2 * size


def random_feeds(model: onnx.ModelProto, shapes: Mapping[str, Shape], seed: int) -> Feed:
    """Random inputs: standard normal floats, small non-negative integers, random booleans."""
    rng = np.random.default_rng(seed)
    feeds: Feed = {}
    for value in model_inputs(model):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shapes[value.name]
        if dtype.kind == "b":
            feeds[value.name] = np.asarray(rng.random(shape) < 0.5)
        elif dtype.kind == "u" and dtype.itemsize == 1:
            feeds[value.name] = np.asarray(rng.integers(0, 256, shape)).astype(dtype)
        elif dtype.kind in "iu":
            feeds[value.name] = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
        elif dtype.kind == "O":
            raise ModelError(f"input {value.name!r} holds strings; random inputs cannot be drawn for it")
        else:
            feeds[value.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return feeds
