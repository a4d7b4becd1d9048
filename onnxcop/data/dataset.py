"""Chosen samples of a source, in batches that fit a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.inputs import BatchLayout
from onnxcop.data.stores import ArrayStore, ImageStore, Store
from onnxcop.errors import CalibrationError
from onnxcop.graph.shapes import Shape
from onnxcop.images.reader import ImageReader

_NAMED = 64  # samples to name in a line; a batch usually has no more
_READERS = max(1, min(8, os.cpu_count() or 1))  # threads that decode images

Item = tuple[int, int] | Feed
"""A batch on its way to a worker: the places of its samples, from the first to after the last, or the samples."""


@dataclass(frozen=True, slots=True)
class FedValues:
    """Values of one input of a model.

    Attributes:
        name: Name of the input.
        shape: Shape of a sample.
        dtype: Type of its elements.
        low: The smallest value; None for types without an order.
        high: The largest value.
        mean: Mean value; None unless floating point.
        deviation: Standard deviation, as `mean`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float | None
    high: float | None
    mean: float | None
    deviation: float | None

    def __str__(self) -> str:
        text = f"{self.name} {list(self.shape)}"
        if self.low is not None:
            text += f" from {self.low:.3g} to {self.high:.3g}"
        if self.mean is not None:
            text += f", mean {self.mean:.3g}, deviation {self.deviation:.3g}"
        return text


@dataclass(frozen=True, slots=True)
class DataRecord:
    """Record of the calibration data, for programs.

    Attributes:
        source: The file, folder, script or object.
        samples: Number of chosen samples.
        available: Number of available samples.
        images: How images were read, in words; None for other data.
        images_from: Source of that: "guess …", the model or a file beside it, or "" for the user.
    """

    source: str
    samples: int
    available: int
    images: str | None = None
    images_from: str | None = None


class CalibrationData:
    """Chosen samples of a source; may be iterated over more than once.

    Args:
        store: The store to read samples from.
        order: int64, numbers of the chosen samples.
        layout: As the attribute.
        batch_size: As the attribute.
        description: As the attribute.
        rest: int64, numbers of samples that were not chosen.

    Attributes:
        layout: The batch axis of every input, and the batch size if the model fixes it.
        batch_size: Samples per batch unless the model fixes it.
        description: Description in one line.
        origin: The file, folder, script or object that the samples come from.
    """

    def __init__(
        self,
        store: Store,
        order: Array,
        layout: BatchLayout,
        batch_size: int,
        description: str,
        rest: Array | None = None,
        origin: str = "",
    ) -> None:
        self._store = store
        self._rest = rest
        self._order = order[: len(order) - len(order) % (layout.size or 1)]
        self.layout = layout
        self.batch_size = batch_size
        self.description = description
        self.origin = origin

    @property
    def numbers(self) -> Array:
        """Numbers of these samples in the source, in order, int64 [samples]."""
        return np.asarray(self._order, np.int64).copy()

    @property
    def files(self) -> tuple[Path, ...]:
        """The image files of the source, in order; empty for other sources."""
        return self._store.paths if isinstance(self._store, ImageStore) else ()

    def named(self, places: IntArray) -> str:
        """Names of samples by their places here: their files, or their numbers in the source, counted from 0."""
        numbers = np.sort(self._order[places] % max(len(self._store), 1)).tolist()
        files = self.files
        some = [files[number].name if files else str(number) for number in numbers[:_NAMED]]
        more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
        return f"{'files' if files else 'samples'} {', '.join(some)}{more}"

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self._order)

    def spare(self) -> CalibrationData | None:
        """Samples of the same source that were not chosen; None if there are none."""
        if self._rest is None or len(self._rest) < (self.layout.size or 1):
            return None
        return self._with(self._rest, f"{len(self._rest)} others of: {self.description}")

    @property
    def image_reader(self) -> ImageReader | None:
        """The image reader, if the samples are images and feed one input; None otherwise."""
        readers = list(self._store.readers) if isinstance(self._store, ImageStore | ArrayStore) else []
        return readers[0] if len(readers) == 1 == len(self.layout.specs) else None

    def record(self) -> DataRecord:
        """Description of the data, for programs."""
        reader = self.image_reader
        images, origin = (None, None) if reader is None else (str(reader), reader.origin)
        return DataRecord(
            source=self.origin, samples=self.count, available=len(self._store), images=images, images_from=origin
        )

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """The samples in batches, arrays by input name.

        Samples of different shapes, or with different values of an input that has no batch axis,
        come in different batches. Such batches and the last one may be smaller.

        Args:
            batch_size: Samples per batch, None for :attr:`batch_size`; a model that fixes it wins.
        """
        size = self.layout.size or batch_size or self.batch_size
        if all(axis is None for axis in self.layout.axes.values()):
            size = 1
        pending: list[Feed] = []
        for sample in self._samples(2 * size):
            if pending and (len(pending) == size or not self._alike(pending[0], sample)):
                yield self._joined(pending)
                pending = []
            pending.append(sample)
        if pending:
            yield self._joined(pending)

    def ranges(self) -> list[tuple[int, int]] | None:
        """The samples of every batch, as places from the first to after the last; None if that depends on the samples.

        Batches follow from the number of samples if all inputs have a batch axis and samples of one shape.
        """
        axes, layout = self.layout.axes.values(), self.layout
        plain = type(self).batches is CalibrationData.batches and None not in axes
        if not plain or any(not isinstance(dim, int) for spec in layout.specs for dim in layout.sample_dims(spec)):
            return None
        size = layout.size or self.batch_size
        return [(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def items(self) -> Iterator[Item]:
        """The batches, as small as they can travel: places if workers can read the samples by them, else samples."""
        ranges = self.ranges()
        return self.batches() if ranges is None else iter(ranges)

    def feeds_of(self, item: Item) -> Iterator[Feed]:
        """The samples of a batch that travelled."""
        return self.part(*item).batches() if isinstance(item, tuple) else iter([item])

    def part(self, start: int, stop: int) -> CalibrationData:
        """The samples of some places."""
        return self._with(self._order[start:stop], self.description)

    def first(self, shapes: Mapping[str, Shape]) -> Feed | None:
        """The first samples as inputs of one run; None unless they have these shapes."""
        count = next((shapes[name][axis] for name, axis in self.layout.axes.items() if axis is not None), 1)
        feed = next(self.part(0, count).batches(count), None)
        alike = feed is not None and {name: array.shape for name, array in feed.items()} == dict(shapes)
        return feed if alike else None

    def values(self) -> tuple[FedValues, ...]:
        """Values of a model's inputs, from the first batch."""
        values = []
        for name, array in next(self.batches()).items():
            axis = self.layout.axes[name]
            shape = tuple(size for place, size in enumerate(array.shape) if place != axis)
            low = high = mean = deviation = None
            if array.size and array.dtype.kind in "fiu":
                known = array.astype(np.float64)
                low, high = float(known.min()), float(known.max())
                if array.dtype.kind == "f":
                    mean, deviation = float(known.mean()), float(known.std())
            values.append(
                FedValues(
                    name=name, shape=shape, dtype=array.dtype.name, low=low, high=high, mean=mean, deviation=deviation
                )
            )
        return tuple(values)

    def first_infinite(self) -> str:
        """Name the first sample that holds minus infinity, the only infinity allowed; empty if there is none."""
        for place, sample in enumerate(self._samples(1)):
            for name, array in sample.items():
                if array.dtype.kind == "f" and np.isinf(array).any():
                    return f"input '{name}' of sample {int(self._order[place]) + 1} holds minus infinity"
        return ""

    def in_batches_of(self, size: int) -> CalibrationData:
        """The same samples in batches of another size, unless the model fixes it."""
        again = copy(self)
        again.batch_size = size
        return again

    def one_by_one(self) -> CalibrationData:
        """The same samples for a model that takes one sample per run."""
        return CalibrationData(
            store=self._store,
            order=self._order,
            layout=replace(self.layout, size=1),
            batch_size=1,
            description=self.description,
            rest=self._rest,
            origin=self.origin,
        )

    def split(self, fraction: float, seed: int = 0) -> tuple[CalibrationData, CalibrationData]:
        """Two disjoint parts: the rest, and `fraction` of the samples held out.

        Raises:
            CalibrationError: There are too few samples for two parts.
        """
        unit = self.layout.size or 1
        groups = self.count // unit
        if not 0 < fraction < 1 or groups < 2:
            raise CalibrationError(
                f"cannot hold out a fraction of {fraction:g} of {self.count} samples "
                f"({self.description}); give a fraction between 0 and 1 and at least "
                f"{2 * unit} samples"
            )
        count = unit * min(max(round(fraction * groups), 1), groups - 1)
        chosen = np.zeros(self.count, np.bool_)
        chosen[np.random.default_rng(seed).permutation(self.count)[:count]] = True
        return self._with(self._order[~chosen]), self._with(self._order[chosen])

    def ordered(self, places: Array) -> CalibrationData:
        """The same samples in another order, int64 [count]."""
        return self._with(self._order[places], self.description)

    def take(self, count: int, seed: int = 0) -> CalibrationData:
        """`count` of the samples, chosen at random; all of them if there are fewer."""
        if count < 1:
            raise CalibrationError(f"{count} samples were asked for; give 1 or more")
        if count >= self.count:
            return self
        unit = self.layout.size or 1
        places = np.random.default_rng(seed).permutation(self.count)[: max(unit, count)]
        return self._with(self._order[np.sort(places)])

    def with_crops(self, views: int) -> CalibrationData:
        """Several views of each image of a folder; other data are returned unchanged."""
        if not isinstance(self._store, ImageStore) or views < 2:
            return self
        orders = [self._order + view * len(self._store) for view in range(views)]
        return self._with(np.concatenate(orders), f"{views} views of each of {self.description}")

    def _with(self, order: Array, description: str = "") -> CalibrationData:
        description = description or f"{len(order)} of: {self.description}"
        return CalibrationData(
            store=self._store,
            order=order,
            layout=self.layout,
            batch_size=self.batch_size,
            description=description,
            origin=self.origin,
        )

    def _samples(self, window: int) -> Iterator[Feed]:
        """All samples; several threads decode images, at most `window` ahead."""
        indices = map(int, self._order)
        if not isinstance(self._store, ImageStore):
            yield from map(self._store.sample, indices)
            return
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="onnxcop-images")
        try:
            waiting = [pool.submit(self._store.sample, i) for i in islice(indices, window)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(self._store.sample, i) for i in islice(indices, 1)]
        finally:
            pool.shutdown(cancel_futures=True)

    def _alike(self, one: Feed, other: Feed) -> bool:
        return all(
            array.shape == other[name].shape
            and (self.layout.axes[name] is not None or np.array_equal(array, other[name]))
            for name, array in one.items()
        )

    def _joined(self, samples: Sequence[Feed]) -> Feed:
        if self.layout.size not in (None, len(samples)):
            raise CalibrationError(
                f"{self.description}: samples of different shapes cannot share a batch, but the "
                f"model wants batches of {self.layout.size}; give samples of one shape"
            )
        return {
            name: first
            if (axis := self.layout.axes[name]) is None
            else np.concatenate([sample[name] for sample in samples], axis)
            for name, first in samples[0].items()
        }
