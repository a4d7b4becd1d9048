"""Concrete sizes for the inputs of a model, and the shapes that follow from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx

from onnxcop._base.types import Feed
from onnxcop.errors import EngineError, ModelError
from onnxcop.graph.edit import copied
from onnxcop.graph.shapes import Shape, ShapeMap, infer
from onnxcop.runtime.inputs import _batch_names, declared, log, model_inputs, random_feeds
from onnxcop.runtime.session import EngineOptions, Session

_IMAGES = ((224, 224), (256, 256), (320, 320), (640, 640), (48, 320), (32, 320), (64, 64), (512, 512))


_LENGTHS = (128, 512, 576, 16000, 1024, 64, 256, 16)
_SHORT = 64  # tokens, and as many in a cache


def settle_shapes(
    model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None = None,
    options: EngineOptions = EngineOptions(), images: tuple[int, int] | None = None,
) -> dict[str, Shape]:  # fmt: skip
    """Choose a concrete shape for every graph input.

    Args:
        model: The model.
        given: Shapes the user asked for, by input name.
        options: How to run the model if sizes have to be tried.
        images: Height and width of images that the model declares, which are tried first.

    Raises:
        ModelError: A given shape does not fit, or an input is not a tensor.
    """
    given = dict(given or {})
    names = {value.name for value in model.graph.input}
    for name in given:
        if name not in names:
            raise ModelError(f"the model has no input {name!r}; its inputs are {', '.join(sorted(names))}")
    candidates = list(_candidates(model, given, images))
    if len(candidates) == 1:
        return candidates[0]
    session: Session | None = None
    possible: dict[str, Shape] | None = None
    try:
        session = Session(model, options)
        for shapes in candidates:
            try:
                results = session.run(random_feeds(model, shapes, seed=0))
            except EngineError:
                continue
            if _varied(results):
                return _logged(model, shapes)
            possible = possible or shapes
        if possible is None:
            possible = _first_that_runs(model, session, _of_caches(model, candidates[0]))
    except EngineError as error:
        log.debug("trying input shapes: %s", error)
    finally:
        if session is not None:
            session.close()
    return _logged(model, possible or candidates[0])


def _first_that_runs(
    model: onnx.ModelProto, session: Session, candidates: Iterator[dict[str, Shape]]
) -> dict[str, Shape] | None:
    for shapes in candidates:
        with contextlib.suppress(EngineError):
            session.run(random_feeds(model, shapes, seed=0))
            return shapes
    return None


def _of_caches(model: onnx.ModelProto, usual: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """Sizes by name, one of them the sum of two others: a mask covers the tokens of a cache and the new ones."""
    names = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model_inputs(model)}
    known = _batch_names(model) | {""}
    for longest in sorted({name for dims in names.values() for name in dims} - known):
        yield {
            value: tuple(
                size if name in known else 2 * _SHORT if name == longest else _SHORT
                for size, name in zip(shape, names.get(value, [""] * len(shape)), strict=True)
            )
            for value, shape in usual.items()
        }


def _logged(model: onnx.ModelProto, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Return the chosen shapes after logging them."""
    for value in model_inputs(model):
        if None in declared(value)[1:]:
            sizes = ",".join(map(str, shapes[value.name]))
            log.info(
                "dynamic sizes are assumed: --input-shape %s:%s; give the sizes that you use if they differ",
                value.name,
                sizes,
            )
    return shapes


def _varied(results: Feed) -> bool:
    """Whether any output holds different finite numbers (not if a signal is too short for the model)."""
    arrays = [np.asarray(a) for a in results.values() if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    return not arrays or any(a.size and np.isfinite(a).all() and a.min() < a.max() for a in arrays)


def _candidates(
    model: onnx.ModelProto, given: Mapping[str, Sequence[int]], images: tuple[int, int] | None
) -> Iterator[dict[str, Shape]]:
    fixed: dict[str, Shape] = {}
    open_values: list[tuple[str, tuple[int | None, ...]]] = []
    stored = {tensor.name for tensor in model.graph.initializer}
    batches = _batch_names(model)
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input {value.name!r} is not a tensor; only tensor inputs are supported")
        if value.name in given:
            fixed[value.name] = _fit(value.name, declared(value), given[value.name])
            continue
        sizes = tuple(
            1 if size is None and dim.dim_param in batches else size
            for size, dim in zip(declared(value), value.type.tensor_type.shape.dim, strict=True)
        )
        if None not in sizes[1:] or value.name in stored:
            fixed[value.name] = tuple(1 if size is None else size for size in sizes)
        else:
            open_values.append((value.name, sizes))
    if not open_values:
        yield fixed
        return
    usual = list(zip(_IMAGES, _LENGTHS, strict=True))
    for image, length in usual if images is None else [(images, _LENGTHS[0]), *usual]:
        yield fixed | {name: _fill(sizes, image, length) for name, sizes in open_values}


def _fill(sizes: tuple[int | None, ...], image: tuple[int, int], length: int) -> Shape:
    filled = list(sizes)
    if filled[0] is None:
        filled[0] = 1
    elif len(filled) == 3 and filled[1] is None:
        filled[1] = 1  # a recurrent state: layers, batch, width
    unknown = [axis for axis, size in enumerate(filled) if size is None]
    if len(sizes) == 4 and len(unknown) == 2:
        for axis, size in zip(unknown, image, strict=True):
            filled[axis] = size
    elif len(sizes) == 4 and len(unknown) == 1:
        filled[unknown[0]] = image[1]
    return tuple(length if size is None else size for size in filled)


def _fit(name: str, sizes: tuple[int | None, ...], given: Sequence[int]) -> Shape:
    shape = tuple(int(size) for size in given)
    if len(shape) != len(sizes) or any(s is not None and s != g for s, g in zip(sizes, shape, strict=True)):
        declared_sizes = ",".join("?" if size is None else str(size) for size in sizes)
        raise ModelError(
            f"input {name!r} cannot have the shape {','.join(map(str, shape))}; the model declares {declared_sizes}"
        )
    return shape


def fed_shapes(model: onnx.ModelProto, feed: Feed) -> dict[str, Shape]:
    """Shapes of the inputs of a model that is run with a feed, with those of weights that are listed as inputs."""
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes = {value.name: stored[value.name] for value in model.graph.input if value.name in stored}
    return shapes | {name: array.shape for name, array in feed.items()}


def shapes_of(model: onnx.ModelProto, inputs: Mapping[str, Shape], options: EngineOptions) -> ShapeMap:
    """Infer all shapes; those that inference cannot determine come from a run of the model, or else from value_info."""
    shapes = infer(model, inputs)
    if not shapes.unknown:
        return shapes
    try:
        known, trouble = _observe(model, inputs, shapes.unknown, options), ""
    except EngineError as error:
        log.debug("%d shapes stay unknown: %s", len(shapes.unknown), error)
        known, trouble = _noted(model, inputs, shapes.unknown), str(error)
    if known:
        shapes = infer(model, inputs, known)
    shapes.trouble = trouble
    return shapes


def _noted(model: onnx.ModelProto, inputs: Mapping[str, Shape], names: list[str]) -> dict[str, tuple[int, Shape]]:
    """Types and shapes that the model declares for tensors, if its inputs settle all sizes."""
    sizes = {
        dim.dim_param: size
        for value in model_inputs(model)
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True)
        if dim.dim_param
    }
    noted = {}
    for value in model.graph.value_info:
        kind = value.type.tensor_type
        if value.name in names and kind.HasField("shape") and kind.elem_type:
            shape = tuple(dim.dim_value or sizes.get(dim.dim_param, 0) for dim in kind.shape.dim)
            if all(shape):
                noted[value.name] = (int(kind.elem_type), shape)
    return noted


def _observe(
    model: onnx.ModelProto, inputs: Mapping[str, Shape], names: list[str], options: EngineOptions
) -> dict[str, tuple[int, Shape]]:
    exposed = copied(model)
    observed = {value.name for value in exposed.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in observed)
    with Session(exposed, options, optimize=False) as session:
        results = session.run(random_feeds(model, inputs, seed=0), names)
    known: dict[str, tuple[int, Shape]] = {}
    for name, result in results.items():
        if isinstance(result, np.ndarray):
            known[name] = (int(onnx.helper.np_dtype_to_tensor_dtype(result.dtype)), result.shape)
    return known
