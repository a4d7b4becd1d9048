"""Opening of calibration data: from the user's path or object to batches for a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.arrays import ArraysInMemory
from onnxcop.data.binding import Binder
from onnxcop.data.dataset import CalibrationData
from onnxcop.data.guess_check import check_guess
from onnxcop.data.inputs import batch_layout, with_shapes
from onnxcop.data.options import DataOptions
from onnxcop.data.paths import script_data, store_from
from onnxcop.data.stores import ArrayStore, SpilledStore, Store
from onnxcop.data.text import TextData, with_tokenizer
from onnxcop.errors import CalibrationError, EngineError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.declared import Declared
from onnxcop.images.preprocess import Preprocess
from onnxcop.runtime.inputs import model_inputs
from onnxcop.runtime.session import EngineOptions, Session

__all__ = [
    "CalibrationData",
    "InputSpec",
    "Preprocess",
    "Source",
    "open_source",
]

log = logging.getLogger("onnxcop")

RESERVE = 256  # extra samples, to report figures on samples that no choice depended on
_SCANNED = 64  # at most this many times the needed samples are read from a stream, which may never end
_MANY = 10_000_000  # samples
_SAMPLES = 512  # default number of samples
_LOOKED_AT = 16  # samples to inspect before a run
_AFFORDABLE = 5e10  # multiply-accumulates over all samples, up to which more samples are used


class Source(Protocol):
    """Types accepted from Python: feed dicts of single samples or of batches, once or repeatedly."""

    def __iter__(self) -> Iterator[Mapping[str, Array]]: ...


def open_source(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None = None,
    samples: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    settled_shapes: Mapping[str, Sequence[int]] | None = None,
    declared: Declared | None = None,
    log_reading: bool = True,
) -> CalibrationData:
    """Open calibration data and choose samples at random from all of it.

    Args:
        data: A folder of images; .tar or .parquet files of images; a .npz or .npy file or a folder of those; a URL
            of any of these; a folder of ONNX test data; a script, `script.py:load_data`; an array or a dict of arrays;
            an iterable of feed dicts or a callable that returns one; a `CalibrationDataReader` of ONNX Runtime.
        inputs: The model's inputs.
        preprocess: Preprocessing of images; open fields are as declared, else guessed from the input's shape.
        samples: How many samples to choose.
        batch_size: Samples per batch unless the model fixes it.
        seed: Random seed of the choice.
        input_shapes: Sizes for dynamic axes, by input name: samples must have them.
        settled_shapes: Sizes that images are read at, by input name, if `input_shapes` does not give them.
        declared: Preprocessing that the model declares.
        log_reading: Whether to log how images are read.

    Raises:
        CalibrationError: The data cannot be read or do not fit the inputs.
    """
    if isinstance(data, CalibrationData):
        return data
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"{name} is {value}; give 1 or more")
    layout = batch_layout(with_shapes(inputs, input_shapes))
    if not layout.specs:
        raise CalibrationError("the model has no inputs, so it cannot be calibrated")
    texts = data if isinstance(data, TextData) else None
    if texts is not None:
        data = texts.arrays(layout.specs)
    binder = Binder(layout, preprocess, declared, settled_shapes)
    store, total, origin = _open(data, binder, samples + RESERVE, seed)
    origin = origin if texts is None else str(texts.path)
    unit = layout.size or 1
    _require_enough(total, unit, origin)
    order, rest = np.split(_chosen(len(store), max(samples, unit) + RESERVE, seed), [max(samples, unit)])
    if store.in_runs:
        order.sort()
    sentences = [reader.sentence(layout.spec(name)) for name, reader in binder.readers.items()]
    if log_reading:
        for sentence in sentences:
            log.info(sentence)
    description = f"{len(order)} of {total} samples from {origin}" + "".join(f" ({one})" for one in sentences)
    return CalibrationData(
        store=store, order=order, layout=layout, batch_size=batch_size, description=description, rest=rest,
        origin=origin,
    )  # fmt: skip


def _require_enough(total: int, unit: int, origin: str) -> None:
    """Refuse data that do not fill one batch of the model."""
    if total < unit:
        raise CalibrationError(
            f"{origin}: it holds {total} samples, but the model wants batches of {unit}; give at least {unit}"
            if total
            else f"{origin}: it holds no samples; give at least {unit}"
        )


def _chosen(count: int, needed: int, seed: int) -> Array:
    """Choose different samples in random order."""
    rng = np.random.default_rng(seed)
    if count > _MANY and needed < count:  # a permutation of all samples would take more memory than the chosen ones
        return rng.choice(count, needed, replace=False)
    return rng.permutation(count)[:needed]


def _open(data: Any, binder: Binder, samples: int, seed: int) -> tuple[Store, int, str]:
    """A store, the number of samples in its source, and the source's name."""
    if isinstance(data, str | os.PathLike):
        text = os.fspath(data)
        with script_data(text) as result:
            if result is not None:
                store, total, _ = _open(result, binder, samples, seed)
                return store, total, text
        store = store_from(text, binder)
        return store, len(store), text
    if hasattr(data, "get_next"):
        return _streamed(iter(data.get_next, None), binder, samples, seed, type(data).__name__)
    if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        data = {"array": np.asarray(data)}
    if isinstance(data, Mapping):
        arrays = ArraysInMemory(_feed(data, binder, "the arrays"), "the arrays")
        store = ArrayStore([arrays], binder)
        return store, len(store), "arrays in memory"
    if isinstance(data, list | tuple):
        array_files = [
            ArraysInMemory(_feed(item, binder, f"item {place}"), f"item {place}") for place, item in enumerate(data)
        ]
        store = ArrayStore(array_files, binder)
        return store, len(store), f"a {type(data).__name__} of feeds"
    if isinstance(data, Iterable):
        return _streamed(iter(data), binder, samples, seed, f"a {type(data).__name__}")
    if callable(data):
        return _open(data(), binder, samples, seed)
    raise CalibrationError(
        f"data of type {type(data).__name__} cannot be calibrated on; give a path, arrays, "
        "an iterable of feed dicts, or a callable that returns one"
    )


def _streamed(items: Iterator[Any], binder: Binder, samples: int, seed: int, origin: str) -> tuple[Store, int, str]:
    """Keep `samples` of a stream, each with equal probability whatever the stream's length."""
    store, rng, seen = SpilledStore(), np.random.default_rng(seed), 0
    needed = max(samples, binder.layout.size or 1)
    for number, item in enumerate(items):
        name = f"item {number} of {origin}"
        arrays = _feed(item, binder, name)
        binding = binder.bind(arrays, name)
        for index in range(binding.count):
            place = seen if seen < needed else int(rng.integers(seen + 1))
            if place < needed:
                store.put(place, binder.sample(binding, arrays, index, name))
            seen += 1
        if seen >= _SCANNED * needed:
            log.info("%s: stopped reading after %d samples", origin, seen)
            break
    return store, seen, origin


def _feed(item: Any, binder: Binder, origin: str) -> dict[str, Array]:
    """An item of an iterable as arrays by input name."""
    specs = binder.layout.specs
    if isinstance(item, list | tuple) and not all(np.isscalar(value) for value in item):
        # A tuple lists the inputs in order; extra items, such as labels, are ignored.
        item = {spec.name: value for spec, value in zip(specs, item, strict=False)}
    elif not isinstance(item, Mapping) and hasattr(item, "__array__"):
        item = {specs[0].name if len(specs) == 1 else "array": item}
    if not isinstance(item, Mapping):
        raise CalibrationError(f"{origin}: it is of type {type(item).__name__}; give a dict of arrays by input name")
    try:
        return {str(key): np.asarray(value) for key, value in item.items()}
    except Exception as error:  # a foreign tensor may raise anything
        raise CalibrationError(f"{origin}: it is not a dict of arrays ({error})") from error


def fit_batch_size(model: onnx.ModelProto, source: CalibrationData) -> CalibrationData:
    """Batches of the size that the model takes: one sample if it mixes samples or cannot run with two."""
    layout = source.layout
    if layout.size is not None or all(axis is None for axis in layout.axes.values()):
        return source
    two, one = (next(source.batches(size), {}) for size in (2, 1))
    if not _same_shapes(two, one) and not _takes(model, two, one):
        log.info("the model declares a batch of any size, but runs with one sample only: samples run one by one")
        return source.one_by_one()
    return source


def _takes(model: onnx.ModelProto, two: Feed, one: Feed) -> bool:
    """Whether the model accepts two samples and then returns more than for one; also true if it does not run at all."""
    try:
        with Session(model, EngineOptions(provider="cpu")) as session:
            alone = session.run(one)
            try:
                return not _same_shapes(session.run(two), alone)
            except EngineError:
                return False
    except EngineError as error:  # the code that needs it to run will report it
        log.debug("trying two samples in a run: %s", error)
        return True


def _same_shapes(first: Feed, second: Feed) -> bool:
    return all(np.shape(array) == np.shape(second[name]) for name, array in first.items())


log = logging.getLogger("onnxcop")


def input_specs(analysis: Analysis) -> list[InputSpec]:
    """The inputs that the model must be fed."""
    return [
        InputSpec(
            value.name,
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            tuple(
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
                for dim in value.type.tensor_type.shape.dim
            ),
        )
        for value in model_inputs(analysis.original)
    ]


def open_data(
    analysis: Analysis, options: DataOptions, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> CalibrationData | None:
    """Open the user's data; None if there is none.

    Args:
        analysis: The model.
        options: The data, and how to read them.
        input_shapes: Sizes for dynamic axes, by input name.

    Raises:
        CalibrationError: The data cannot be read or do not fit the inputs.
    """
    requested = options.preprocess
    if isinstance(requested, str):
        requested = Preprocess.named(requested)  # an unknown name is refused even without data
    if options.data is None:
        return None
    data = with_tokenizer(options.data, options.tokenizer)

    def opened(preprocess: Preprocess | None, samples: int, declared: Declared | None, log: bool) -> CalibrationData:
        return open_source(
            data, input_specs(analysis), preprocess=preprocess, samples=samples,
            batch_size=options.batch_size, seed=options.seed, input_shapes=input_shapes,
            settled_shapes=analysis.input_shapes, declared=declared, log_reading=log,
        )  # fmt: skip

    def reopened(preprocess: Preprocess, samples: int) -> CalibrationData:
        return opened(preprocess, samples, None, log=False)

    samples = default_samples(analysis) if options.samples is None else options.samples
    source = fit_batch_size(analysis.original, opened(requested, samples, analysis.images, log=True))
    doubt = emptiness(source)
    if doubt:
        log.warning("the calibration data carry no information: %s; give representative samples", doubt)
    doubt = check_guess(analysis, source, reopened) if isinstance(data, str | os.PathLike | np.ndarray) else ""
    if doubt:
        log.warning("%s", doubt)
    return source


def emptiness(source: CalibrationData) -> str:
    """Explain why statistics of the data would be meaningless, judged on some samples; empty if they are fine."""
    taken = source.take(_LOOKED_AT)
    samples = [{name: array for name, array in feed.items() if array.dtype.kind in "biuf"} for feed in taken.batches(1)]
    real = [array for feed in samples for array in feed.values() if array.dtype.kind == "f" and array.size > 1]
    if real and all(array.min() == array.max() for array in real):
        return f"each of {taken.count} samples looked at is one number throughout"
    first, *others = samples
    if (
        first
        and others
        and all(np.array_equal(array, other[name]) for other in others for name, array in first.items())
    ):
        return f"the {taken.count} samples looked at are all the same"
    return ""


def default_samples(analysis: Analysis) -> int:
    """The default number of samples: more for a network that runs quickly."""
    macs = max(float(analysis.cost.original()[0]), 1.0)
    return int(np.clip(_AFFORDABLE / macs, _SAMPLES, 2 * _SAMPLES))
