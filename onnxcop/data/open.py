"""Calibration data: from what the user gives to batches that a model can be fed with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxcop._base.types import Array, Feed
from onnxcop.data.arrays import HeldParcel
from onnxcop.data.binding import Binder
from onnxcop.data.dataset import CalibrationData
from onnxcop.data.inputs import BatchLayout, batch_layout, with_shapes
from onnxcop.data.paths import script_data, store_from_path
from onnxcop.data.stores import ParcelStore, SpilledStore, Store
from onnxcop.data.text import TextData
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.declared import Declared
from onnxcop.images.preprocess import Preprocess
from onnxcop.images.reader import DEFAULT_SIZE, image_layout

__all__ = [
    "CalibrationData",
    "InputSpec",
    "Preprocess",
    "Source",
    "open_source",
    "random_source",
]

log = logging.getLogger("onnxcop")

RESERVE = 256  # samples beyond those that are asked for, to report on what no choice has seen
_SCANNED = 64  # a stream is read up to this many times the samples wanted: it may never end
_MANY = 10_000_000  # samples
_DEFAULT_LENGTH = 512  # of random inputs along a dynamic axis that nothing is known of


class Source(Protocol):
    """What may be given from Python: feed dicts of single samples or of batches, once or often."""

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
    """Opens calibration data and chooses samples from the whole of it, at random.

    Args:
        data: A folder of pictures; a .npz or .npy file or a folder of those; a folder of ONNX test
            data; a script, `script.py:load_data`; an array or a dict of arrays; an iterable of feed
            dicts or a callable that returns one; a `CalibrationDataReader` of ONNX Runtime.
        inputs: The model's inputs.
        preprocess: What is done to images; what it leaves open is as declared, else guessed from the input's shape.
        samples: How many samples to choose.
        batch_size: How many go into a batch where the model leaves it open.
        seed: Of the choice.
        input_shapes: Sizes for dynamic axes, by input name: samples must have them.
        settled_shapes: Sizes that images are read at, by input name, where `input_shapes` says nothing.
        declared: What the model says about its images.
        log_reading: Whether the log says how images are read.

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
    if total < unit:
        raise CalibrationError(
            f"{origin}: it holds {total} samples, but the model wants batches of {unit}; give at least {unit}"
            if total
            else f"{origin}: it holds no samples; give at least {unit}"
        )
    order, rest = np.split(_chosen(len(store), max(samples, unit) + RESERVE, seed), [max(samples, unit)])
    if isinstance(store, ParcelStore) and len(store) > len(store.parcels) > 1:
        order.sort()  # so that files of many samples are opened once each
    description = f"{len(order)} of {total} samples from {origin}"
    for name, reader in binder.readers.items():
        sentence = reader.sentence(layout.spec(name))
        if log_reading:
            log.info(sentence)
        description += f" ({sentence})"
    return CalibrationData(
        store=store,
        order=order,
        layout=layout,
        batch_size=batch_size,
        description=description,
        rest=rest,
        origin=origin,
    )


def _chosen(count: int, wanted: int, seed: int) -> Array:
    """Different samples of many, in random order."""
    rng = np.random.default_rng(seed)
    if count > _MANY and wanted < count:  # a permutation of all would take more memory than the samples
        return rng.choice(count, wanted, replace=False)
    return rng.permutation(count)[:wanted]


def _open(data: Any, binder: Binder, samples: int, seed: int) -> tuple[Store, int, str]:
    """A store, the number of samples in its source, and the source's name."""
    if isinstance(data, str | os.PathLike):
        text = os.fspath(data)
        with script_data(text) as result:
            if result is not None:
                store, total, _ = _open(result, binder, samples, seed)
                return store, total, text
        store = store_from_path(Path(text), binder)
        return store, len(store), text
    if hasattr(data, "get_next"):
        return _streamed(iter(data.get_next, None), binder, samples, seed, type(data).__name__)
    if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        data = {"array": np.asarray(data)}
    if isinstance(data, Mapping):
        held = HeldParcel(_feed(data, binder, "the arrays"), "the arrays")
        store = ParcelStore([held], binder)
        return store, len(store), "arrays in memory"
    if isinstance(data, list | tuple):
        parcels = [HeldParcel(_feed(item, binder, f"item {place}"), f"item {place}") for place, item in enumerate(data)]
        store = ParcelStore(parcels, binder)
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
    """Keeps `samples` of a stream, each with the same chance whatever the stream's length."""
    store, rng, seen = SpilledStore(), np.random.default_rng(seed), 0
    wanted = max(samples, binder.layout.size or 1)
    for number, item in enumerate(items):
        name = f"item {number} of {origin}"
        arrays = _feed(item, binder, name)
        binding = binder.bind(arrays, name)
        for index in range(binding.count):
            place = seen if seen < wanted else int(rng.integers(seen + 1))
            if place < wanted:
                store.put(place, binder.sample(binding, arrays, index, name))
            seen += 1
        if seen >= _SCANNED * wanted:
            log.info("%s: stopped reading after %d samples", origin, seen)
            break
    return store, seen, origin


def _feed(item: Any, binder: Binder, origin: str) -> dict[str, Array]:
    """An item of an iterable as arrays by input name."""
    specs = binder.layout.specs
    if isinstance(item, list | tuple) and not all(np.isscalar(value) for value in item):
        # A tuple lists the inputs in order; what follows them, as labels do, is left out.
        item = {spec.name: value for spec, value in zip(specs, item, strict=False)}
    elif not isinstance(item, Mapping) and hasattr(item, "__array__"):
        item = {specs[0].name if len(specs) == 1 else "array": item}
    if not isinstance(item, Mapping):
        raise CalibrationError(f"{origin}: it is of type {type(item).__name__}; give a dict of arrays by input name")
    try:
        return {str(key): np.asarray(value) for key, value in item.items()}
    except Exception as error:  # whatever a foreign tensor raises
        raise CalibrationError(f"{origin}: it is no dict of arrays ({error})") from error


class _RandomStore:
    """Random samples, the same ones whenever they are asked for."""

    def __init__(self, specs: Sequence[InputSpec], layout: BatchLayout, count: int, seed: int):
        self._specs, self._layout, self._count, self._seed = specs, layout, count, seed

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Feed:
        feed = {}
        for place, spec in enumerate(self._specs):
            shared = self._layout.axes[spec.name] is None
            rng = np.random.default_rng([self._seed, place, 0 if shared else index])
            feed[spec.name] = _random_array(spec, rng)
        return feed


def random_source(
    inputs: Sequence[InputSpec],
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 16,
) -> CalibrationData:
    """Random inputs of the right shapes: floats standard normal, integers 0..9 (bytes 0..255).

    Dynamic axes that `input_shapes` leaves open get 224 in pictures and 512 elsewhere; the
    description says so.
    """
    layout = batch_layout(with_shapes(inputs, input_shapes))
    guessed: dict[str, int] = {}
    concrete = []
    for spec in layout.specs:
        shape = []
        for axis, size in enumerate(spec.shape):
            if axis == layout.axes[spec.name]:
                shape.append(1)
            elif isinstance(size, int):
                shape.append(size)
            else:
                unclear = size is None and layout.size == 1 and layout.axes[spec.name] is None
                guess = DEFAULT_SIZE if image_layout(spec) else 1 if unclear else _DEFAULT_LENGTH
                name = size or f"axis {axis} of {spec.name}"
                shape.append(guessed.setdefault(name, guess))
        concrete.append(InputSpec(spec.name, spec.dtype, tuple(shape)))
    store = _RandomStore(concrete, layout, max(samples, layout.size or 1), seed)
    description = f"{len(store)} random samples"
    if guessed:
        listed = ", ".join(f"{name}={size}" for name, size in guessed.items())
        description += f" (assumed {listed}; give the input's shape if that is wrong)"
    return CalibrationData(
        store=store, order=np.arange(len(store)), layout=layout, batch_size=batch_size, description=description
    )


def _random_array(spec: InputSpec, rng: np.random.Generator) -> Array:
    shape = [size for size in spec.shape if isinstance(size, int)]
    kind = spec.dtype.kind
    if kind == "O":
        return np.full(shape, "", object)
    if kind == "b":
        return rng.integers(0, 2, shape).astype(spec.dtype)
    if kind in "iu":
        return rng.integers(0, 256 if spec.dtype == np.uint8 else 10, shape).astype(spec.dtype)
    return np.asarray(rng.standard_normal(shape, np.float32)).astype(spec.dtype)
