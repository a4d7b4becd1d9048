"""Samples for training, and views of them: mirrored and shifted images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.scratch import scratch_folder
from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.arrays import release_pages
from onnxcop.data.dataset import CalibrationData
from onnxcop.errors import CalibrationError
from onnxcop.images.reader import image_layout

MOST_BYTES = 64 * 2**20  # bytes of arrays to keep in memory; larger ones are in a temporary file
_MAPPED = 16 * 2**20  # bytes written to mapped files after which their pages are released
_SHIFT = 1 / 8  # share of an image's side by which views are shifted at most


@dataclass(frozen=True, slots=True)
class ImageView:
    """A view of an image.

    Attributes:
        mirrored: Whether left and right are exchanged.
        down: Pixels of the shift down, or up if negative; the border is reflected.
        right: The same to the right.
    """

    mirrored: bool = False
    down: int = 0
    right: int = 0

    def of(self, images: Array, axes: tuple[int, int]) -> Array:
        """Images in this view; `axes` are those of height and width."""
        if self.mirrored:
            images = np.flip(images, axes[1])
        if self.down or self.right:
            margin = [(0, 0)] * images.ndim
            for axis, move in zip(axes, (self.down, self.right), strict=True):
                margin[axis] = (max(move, 0), max(-move, 0))
            padded = np.pad(images, margin, mode="reflect")
            window = [slice(None)] * images.ndim
            for axis, move in zip(axes, (self.down, self.right), strict=True):
                window[axis] = slice(max(-move, 0), max(-move, 0) + images.shape[axis])
            images = padded[tuple(window)]
        return np.ascontiguousarray(images)


PLAIN = ImageView()


class LargeArrays:
    """Arrays in memory or, if they are large, in temporary files whose pages are released again and again.

    Attributes:
        arrays: By name.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self._folder: Path | None = None
        self._written = 0

    def make(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, in_file: bool) -> Array:
        """A new array; its values are arbitrary."""
        if in_file:
            if self._folder is None:
                self._folder, _ = scratch_folder(self)
            path = self._folder / f"{len(self.arrays)}.npy"
            self.arrays[name] = np.lib.format.open_memmap(path, "w+", dtype, shape)
        else:
            self.arrays[name] = np.empty(shape, dtype)
        return self.arrays[name]

    def take(self, name: str, indices: IntArray, axis: int) -> Array:
        """Some entries along an axis; rows of a file are read, because mapped pages would count as used memory."""
        array = self.arrays[name]
        if not isinstance(array, np.memmap) or axis:
            return array.take(indices, axis)
        taken = np.empty((len(indices), *array.shape[1:]), array.dtype)
        with open(str(array.filename), "rb", buffering=0) as file:
            for row, index in zip(taken.reshape(len(indices), -1).view(np.uint8), indices.tolist(), strict=True):
                file.seek(array.offset + index * row.nbytes)
                file.readinto(row.data)
        return taken

    def note(self, size: int) -> None:
        """Note that so many bytes were written."""
        self._written += size
        if self._written > _MAPPED:
            self._written = 0
            release_pages(self.arrays.values())


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples of one shape: in memory, or in a temporary file if there are more than 64 MB of them.

    Attributes:
        axes: The batch axis of every input, None for one that all samples share.
        count: Number of samples.
        image: Name of the input that holds images, with the axes of height and width; None if there is none.
        store: The arrays; a temporary file is removed with it.
    """

    axes: Mapping[str, int | None]
    count: int
    image: tuple[str, tuple[int, int]] | None = None
    store: LargeArrays = field(kw_only=True)

    @classmethod
    def of(cls, source: CalibrationData, share: float = 1.0) -> SampleSet:
        """Read all samples of a source.

        Args:
            source: The samples.
            share: Share of the memory for samples that these may take.

        Raises:
            CalibrationError: They are of different shapes.
        """
        axes = source.layout.axes
        store: _Store | None = None
        for feed in source.batches():
            if store is None:
                store = _Store(feed, axes, source.count, share * MOST_BYTES)
            elif any(_rest(feed[n], axes[n]) != _rest(store.arrays[n], axes[n]) for n in feed):
                raise CalibrationError(
                    f"{source.description}: samples of different shapes cannot be trained on together; "
                    "give samples of one shape"
                )
            store.add(feed)
        assert store is not None
        return cls(axes, source.count, _image(source, store.arrays), store=store.large)

    @property
    def arrays(self) -> Mapping[str, Array]:
        """All samples, by input name."""
        return self.store.arrays

    def batch(self, indices: IntArray, view: ImageView = PLAIN) -> Feed:
        """Some of the samples in one view."""
        feed = {
            name: array if (axis := self.axes[name]) is None else self.store.take(name, indices, axis)
            for name, array in self.arrays.items()
        }
        if view != PLAIN and self.image is not None:
            name, axes = self.image
            feed[name] = view.of(feed[name], axes)
        return feed

    def batches(self, size: int, view: ImageView = PLAIN) -> Iterator[Feed]:
        """All samples in order."""
        for start in range(0, self.count, size):
            yield self.batch(np.arange(start, min(start + size, self.count)), view)


class _Store:
    """Arrays that are filled batch by batch.

    Args:
        feed: The first batch.
        axes: The batch axis of every input, None for one that all samples share.
        count: Total number of samples.
        most: Bytes to keep in memory.
    """

    def __init__(self, feed: Feed, axes: Mapping[str, int | None], count: int, most: float) -> None:
        self._axes, self._filled = axes, 0
        shapes = {name: _with_size(array.shape, axes[name], count) for name, array in feed.items()}
        size = sum(math.prod(shape) * feed[name].itemsize for name, shape in shapes.items())
        self.large = LargeArrays()
        self.arrays = self.large.arrays
        for name, shape in shapes.items():
            in_file = size > most and not feed[name].dtype.hasobject
            self.large.make(name, shape, feed[name].dtype, in_file=in_file)

    def add(self, feed: Feed) -> None:
        """Append a batch."""
        taken = 0
        for name, array in feed.items():
            axis = self._axes[name]
            if axis is None:
                self.arrays[name][...] = array
                continue
            taken = array.shape[axis]
            place = (slice(None),) * axis + (slice(self._filled, self._filled + taken),)
            self.arrays[name][place] = array
            self.large.note(array.nbytes)
        self._filled += taken


def _with_size(shape: tuple[int, ...], axis: int | None, size: int) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], size, *shape[axis + 1 :])


def _rest(array: Array, axis: int | None) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(array.shape) if place != axis)


def _image(source: CalibrationData, arrays: Mapping[str, Array]) -> tuple[str, tuple[int, int]] | None:
    """The input that holds images of floating-point pixels."""
    for spec in source.layout.specs:
        layout = image_layout(spec)
        if layout is not None and source.layout.axes[spec.name] == 0 and arrays[spec.name].dtype.kind == "f":
            axes = (2, 3) if layout == "nchw" else (1, 2)
            if min(arrays[spec.name].shape[axis] for axis in axes) >= 16:
                return spec.name, axes
    return None


def views_of(samples: SampleSet, count: int, seed: int) -> Sequence[ImageView]:
    """Views for training: the plain images, then randomly shifted and mirrored ones; one view without images."""
    if samples.image is None:
        return [PLAIN]
    name, axes = samples.image
    most = [max(1, int(samples.arrays[name].shape[axis] * _SHIFT)) for axis in axes]
    rng = np.random.default_rng([seed, 1])
    views = [PLAIN]
    while len(views) < count:
        moves = [int(rng.integers(-m, m + 1)) for m in most]
        views.append(ImageView(len(views) % 2 == 1, *moves))
    return views
