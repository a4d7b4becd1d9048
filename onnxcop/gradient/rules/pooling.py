"""Gradients of pooling, of local response normalization and of interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcop.gradient.builder import INT64, NoGradient, Tensor, concat, padded, zeros
from onnxcop.gradient.node import Node, Vjp
from onnxcop.gradient.rules.convolution import Window, fitted
from onnxcop.gradient.rules.reduction import extreme


def max_pool(
    g: Tensor, y: Tensor, x: Tensor, *, node: Node, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, auto_pad: str = "NOTSET",
    ceil_mode: int = 0, storage_order: int = 0,
) -> Tensor:  # fmt: skip
    """Every element goes to the place in the input that its index names."""
    if storage_order:
        raise NoGradient("its storage_order is 1")
    flat = zeros(x.op("Size", elem_type=INT64).reshape([1]), g)
    places = node.extra(1, INT64).reshape([-1])
    return flat.op("ScatterElements", places, g.reshape([-1]), axis=0, reduction="add").reshape(x.dims())


def average_pool(
    g: Tensor, y: Tensor, x: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, auto_pad: str = "NOTSET",
    ceil_mode: int = 0, count_include_pad: int = 0,
) -> Tensor:  # fmt: skip
    """Every element, over the number of those that it is the mean of, goes to all of them.

    That number is the window's sum over an image of ones, divided by its average.
    """
    window = Window.of(x, kernel_shape, strides, dilations, pads, auto_pad)
    build, axes = g.builder, len(kernel_shape)
    single = concat([build.ints(1, 1), x.op("Shape", elem_type=INT64, start=2)], 0)
    ones = build.constant(1.0, g.elem_type).expand(single)
    kernel = build.constant(np.ones([1, 1, *kernel_shape]), g.elem_type)
    settings: dict[str, Any] = {
        "strides": list(window.strides), "pads": window.pads,
        "dilations": list(window.dilations) if max(window.dilations) > 1 else None,  # an attribute of opset 19
    }  # fmt: skip
    average = ones.op("AveragePool", kernel_shape=list(kernel_shape), ceil_mode=ceil_mode,
                      count_include_pad=count_include_pad, **settings)  # fmt: skip
    if ceil_mode:
        long = window_length(average, window)
        ones = fitted_to(ones, list(window.begin), long, axes)
        settings["pads"] = [0] * (2 * axes)
    share = average / ones.op("Conv", kernel, **settings)
    # Channels are samples here: all of them meet the same window.
    folded = (g * share).reshape(concat([build.ints(-1, 1), g.op("Shape", elem_type=INT64, start=2)], 0))
    full = folded.op("ConvTranspose", kernel, strides=list(window.strides), dilations=settings["dilations"])
    return fitted(full, x, [-begin for begin in window.begin], axes).reshape(x.dims())


def window_length(positions: Tensor, window: Window) -> Tensor:
    """How many elements the window passes over from its first to its last position, int64 [axes]."""
    build = positions.builder
    count = positions.op("Shape", elem_type=INT64, start=2)
    return (count - build.ints(1)) * build.ints(*window.strides) + build.ints(*(r + 1 for r in window.reach))


def fitted_to(x: Tensor, before: list[int], sizes: Tensor, axes: int) -> Tensor:
    """Zeros before and behind the last axes, to given sizes."""
    start = x.builder.ints(*before)
    after = sizes - x.op("Shape", elem_type=INT64, start=2) - start
    return padded(x, start, after, 2, 0)


def global_mean(g: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """1 / n to every element."""
    count = y.op("Size", elem_type=INT64).cast(g) / x.op("Size", elem_type=INT64).cast(g)
    return (g * count).expand(x.dims())


def global_max(g: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """To the largest."""
    return extreme(g, y, x, g.builder.ints(*range(2, x.rank)))


def local_response(
    g: Tensor, y: Tensor, x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Of x d ** -beta with d = bias + alpha / size Σ x² over neighbouring channels."""
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    scale = bias + alpha / size * neighbours(x * x, x, size, before, after)
    passed = neighbours(g * y / scale, x, size, after, before)
    return g * scale**-beta - (2 * alpha * beta / size) * x * passed


def neighbours(values: Tensor, x: Tensor, size: int, before: int, after: int) -> Tensor:
    """Sums over `before` channels before each and `after` behind it."""
    columns = values.reshape(concat([x.dim(0), values.builder.ints(1), x.dim(1), values.builder.ints(-1)], 0))
    means = columns.op("AveragePool", kernel_shape=[size, 1], pads=[before, 0, after, 0], count_include_pad=1)
    return (means * size).reshape(x.dims())


def resize(
    g: Tensor, y: Tensor, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None,
    sizes: Tensor | None = None, *, node: Node, axes: Sequence[int] | None = None, antialias: int = 0,
    coordinate_transformation_mode: str = "half_pixel", cubic_coeff_a: float = -0.75, exclude_outside: int = 0,
    extrapolation_value: float = 0.0, keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:  # fmt: skip
    """The transposed interpolation matrix of every axis, found by resizing the identity."""
    if coordinate_transformation_mode == "tf_crop_and_resize" or keep_aspect_ratio_policy != "stretch" or antialias:
        raise NoGradient("it crops, keeps the aspect ratio or has antialias")
    settings: dict[str, Any] = {
        "coordinate_transformation_mode": coordinate_transformation_mode, "cubic_coeff_a": cubic_coeff_a,
        "exclude_outside": exclude_outside, "mode": mode, "nearest_mode": nearest_mode,
    }  # fmt: skip
    build = g.builder
    listed = list(range(x.rank)) if axes is None else [axis % x.rank for axis in axes]
    for place, axis in enumerate(listed):
        factors = None if scales is None else node.values(scales.name)
        if (factors is not None and len(factors) and factors[place] == 1) or (
            x.sizes[axis] is not None and x.sizes[axis] == y.sizes[axis]
        ):
            continue
        eye = identity(x.dim(axis), g)  # [1, size, 1, size]: one row of the matrix per channel
        if scales is not None and scales.sizes != (0,):
            own = scales.op("Slice", build.ints(place), build.ints(place + 1), build.ints(0))
            ones = build.constant(np.ones(3), scales.elem_type)
            matrix = eye.op("Resize", None, concat([ones, own], 0), **settings)
        else:
            goal = concat([build.ints(1), x.dim(axis), build.ints(1), y.dim(axis)], 0)
            matrix = eye.op("Resize", None, None, goal, **settings)
        rows = matrix.reshape(concat([x.dim(axis), y.dim(axis)], 0))  # [size of x, size of y]
        last = x.rank - 1
        order = [axis if a == last else last if a == axis else a for a in range(x.rank)]
        g = (g.transpose(order) @ rows.swap(2)).transpose(order)
    return g


def identity(size: Tensor, like: Tensor) -> Tensor:
    """The identity as [1, size, 1, size]."""
    build = like.builder
    square = zeros(concat([size, size], 0), like).op("EyeLike", dtype=like.elem_type)
    return square.reshape(concat([build.ints(1), size, build.ints(1), size], 0))


POOLINGS: dict[str, tuple[Vjp | None, ...]] = {
    "AveragePool": (average_pool,),
    "GlobalAveragePool": (global_mean,),
    "GlobalMaxPool": (global_max,),
    "LRN": (local_response,),
    "MaxPool": (max_pool,),
    "Resize": (resize, None, None, None),
}
