"""Samples in memory, and views of them: mirrored and shifted images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, Feed, IntArray
from onnxcop.data.dataset import CalibrationData
from onnxcop.errors import CalibrationError
from onnxcop.images.reader import image_layout

MOST_BYTES = 4 * 2**30  # of samples that are kept in memory
_SHIFT = 1 / 8  # of an image's side, by which views are moved at most


@dataclass(frozen=True, slots=True)
class ImageView:
    """One look at an image.

    Attributes:
        mirrored: Left and right exchanged.
        down: Pixels by which it is moved down, or up if negative; the border is reflected.
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


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples of one shape, all in memory.

    Attributes:
        arrays: By input name.
        axes: The batch axis of every input, None for one that all samples share.
        count: How many there are.
        image: Name of the input that holds images, with the axes of height and width; None without one.
    """

    arrays: Mapping[str, Array]
    axes: Mapping[str, int | None]
    count: int
    image: tuple[str, tuple[int, int]] | None = None

    @classmethod
    def of(cls, source: CalibrationData) -> SampleSet:
        """Read all samples of a source.

        Raises:
            CalibrationError: They are of different shapes, or too many for the memory.
        """
        axes = source.layout.axes
        feeds: list[Feed] = []
        held = 0
        for feed in source.batches():
            if feeds and any(_rest(feed[n], axes[n]) != _rest(feeds[0][n], axes[n]) for n in feed):
                raise CalibrationError(
                    f"{source.description}: samples of different shapes cannot be trained on together; "
                    "give samples of one shape"
                )
            held += sum(array.nbytes for array in feed.values())
            if held > MOST_BYTES:
                raise CalibrationError(
                    f"{source.description}: more than {MOST_BYTES >> 30} GB of samples; give fewer with --samples"
                )
            feeds.append(feed)
        arrays = {
            name: array if (axis := axes[name]) is None else np.concatenate([feed[name] for feed in feeds], axis)
            for name, array in feeds[0].items()
        }
        return cls(arrays, axes, source.count, _image(source, arrays))

    def batch(self, indices: IntArray, view: ImageView = PLAIN) -> Feed:
        """Some of the samples in one view."""
        feed = {
            name: array if (axis := self.axes[name]) is None else array.take(indices, axis)
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
    """Views to train on: the images as they are, and moved and mirrored at random; one where there are no images."""
    if samples.image is None:
        return [PLAIN]
    name, axes = samples.image
    most = [max(1, int(samples.arrays[name].shape[axis] * _SHIFT)) for axis in axes]
    rng = np.random.default_rng([seed, 1])
    found = [PLAIN]
    while len(found) < count:
        moves = [int(rng.integers(-m, m + 1)) for m in most]
        found.append(ImageView(len(found) % 2 == 1, *moves))
    return found
