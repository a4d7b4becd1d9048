"""Whether a model treats the samples of a batch apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnxcop.errors import EngineError
from onnxcop.graph.shapes import Shape
from onnxcop.runtime.inputs import batch_axes, random_feeds
from onnxcop.runtime.session import EngineOptions, Session

_CLOSE = 1e-3  # of the largest value


def mixes_samples(
    model: onnx.ModelProto, shapes: Mapping[str, Shape], other: Mapping[str, Shape], options: EngineOptions
) -> bool:
    """Whether samples come out differently when copies of them fill a larger batch.

    So it is where a batch of one is written down (`Reshape` to `[1, C, -1]`), yet others run: what they
    give means nothing.

    Args:
        model: The model.
        shapes: Shapes of its inputs.
        other: Shapes with a larger batch.
        options: How it is run.
    """
    axes = batch_axes(model)
    few = {
        name: tuple(shapes[name][axis] if axis in axes[name] else size for axis, size in enumerate(shape))
        for name, shape in other.items()
    }
    alone = random_feeds(model, few, 0)
    together = dict(alone)
    for name, wanted in other.items():
        for axis in axes[name]:
            copies = np.arange(wanted[axis]) % few[name][axis]
            together[name] = np.take(together[name], copies, axis=axis)
    try:
        with Session(model, options) as session:
            one, many = session.run(alone), session.run(together)
    except EngineError:
        return False
    return any(isinstance(found, np.ndarray) and not _begins_with(many[name], found) for name, found in one.items())


def _begins_with(many: Any, one: Any) -> bool:
    if many.ndim != one.ndim or any(large < small for large, small in zip(many.shape, one.shape, strict=True)):
        return False
    first = many[tuple(slice(size) for size in one.shape)]
    if one.dtype.kind != "f":
        return bool(np.array_equal(first, one))
    return bool(np.allclose(first, one, rtol=0, atol=_CLOSE * float(np.abs(one).max(initial=0.0)), equal_nan=True))
