"""Sources of samples: files of arrays, folders of images, test data sets, iterables.

An *array file* is one file or one object that holds arrays (:mod:`onnxcop.data.arrays`). A *store* returns the samples
of one or many array files by number and reads nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxcop._base.lookup import Recent
from onnxcop._base.scratch import scratch_folder
from onnxcop._base.types import Array, Feed
from onnxcop.data.arrays import ArrayFile, release_pages
from onnxcop.data.binding import Binder, cast
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.reader import ImageReader

LARGEST_STREAM = 64 * 2**20  # bytes of samples kept from a stream; more go to disk
_OPEN_FILES = 2
_MAPPED = 32 * 2**20  # bytes read through memory maps after which their pages are released


class Store(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    @property
    def in_runs(self) -> bool:
        """Whether it is quicker to read samples in the order of their numbers."""
        ...

    def sample(self, index: int) -> Feed:
        """The arrays of one sample, in the inputs' ranks and dtypes (batch axis of size 1)."""
        ...


class Copies(Protocol):
    """Copies of remote files; they exist as long as the store that reads them."""

    def reopened(self) -> tuple[Any, ...]:
        """What makes the store in another process, which may be on another machine: a function and its arguments."""
        ...


class _MayBeCopied:
    """A store of files that may be copies.

    Attributes:
        copies: These copies; None if the files are the user's.
    """

    copies: Copies | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.copies is None else self.copies.reopened()


class ArrayStore(_MayBeCopied):
    """The samples of many array files."""

    def __init__(self, array_files: Sequence[ArrayFile], binder: Binder) -> None:
        self.array_files = array_files
        self._binder = binder
        self._bindings = [binder.bind(array_file.outline(), array_file.origin) for array_file in array_files]
        self._ends = list(accumulate(binding.count for binding in self._bindings))
        self._open: Recent[int, Mapping[str, Array]] = Recent(_OPEN_FILES)
        self._read = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without open files."""
        return ArrayStore, (self.array_files, self._binder)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def in_runs(self) -> bool:
        """As :attr:`Store.in_runs`: files of many samples are opened once each."""
        return len(self) > len(self.array_files) > 1

    @property
    def readers(self) -> Collection[ImageReader]:
        """How to read arrays of bytes that are images."""
        return self._binder.readers.values()

    def sample(self, index: int) -> Feed:
        place = bisect_right(self._ends, index)
        binding, array_file = self._bindings[place], self.array_files[place]
        first = self._ends[place] - binding.count
        arrays = self._open.get(place, lambda: array_file.load(set(binding.keys.values())))
        feed = self._binder.sample(binding, arrays, index - first, array_file.origin)
        self._read += sum(array.nbytes for array in feed.values())
        if self._read > _MAPPED:
            self._read = 0
            for opened in self._open.values():
                release_pages(opened.values())
        return feed


class ImageStore(_MayBeCopied):
    """A list of images for a model whose only input is an image.

    Numbers from its length on are other views of the same images.
    """

    def __init__(self, paths: Sequence[Path], spec: InputSpec, reader: ImageReader) -> None:
        self._paths = paths
        self._spec = spec
        self._reader = reader

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, by number."""
        return tuple(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def in_runs(self) -> bool:
        """As :attr:`Store.in_runs`: each image is a file, or a part of one, that is read alone."""
        return False

    @property
    def readers(self) -> Collection[ImageReader]:
        """How to read the images."""
        return (self._reader,)

    def sample(self, index: int) -> Feed:
        view, place = divmod(index, len(self))
        pixels, name = self._pixels(place, view)
        return {self._spec.name: cast(pixels[None], self._spec, name)}

    def _pixels(self, place: int, view: int) -> tuple[Array, str]:
        """An image, and a name for messages."""
        path = self._paths[place]
        return self._reader.from_file(path, view), str(path)


class SpilledStore:
    """Samples that can be read only once: kept in memory up to a limit, in a temporary folder beyond it."""

    def __init__(self) -> None:
        self._items: list[Feed | Path] = []
        self._names: list[str] = []
        self._held = 0
        self._folder: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """With all samples in memory."""
        return vars(self) | {"_items": [self.sample(index) for index in range(len(self))], "_folder": None}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def in_runs(self) -> bool:
        """As :attr:`Store.in_runs`: samples are read alone."""
        return False

    def put(self, place: int, feed: Feed) -> None:
        """Put a sample at `place`, which may be one past the end."""
        size = sum(array.nbytes for array in feed.values())
        old = self._items[place] if place < len(self._items) else None
        if isinstance(old, dict):
            self._held -= sum(array.nbytes for array in old.values())
        item: Feed | Path = feed
        strings = any(array.dtype.hasobject for array in feed.values())
        if self._held + size > LARGEST_STREAM and not strings:
            item = self._folder_path() / f"{place}.npz"
            np.savez(item, *feed.values())
            self._names = list(feed)
        else:
            self._held += size
        self._items[place : place + 1] = [item]

    def sample(self, index: int) -> Feed:
        item = self._items[index]
        if isinstance(item, dict):
            return item
        with np.load(item, allow_pickle=False) as arrays:
            return {name: arrays[f"arr_{i}"] for i, name in enumerate(self._names)}

    def _folder_path(self) -> Path:
        if self._folder is None:
            self._folder, _ = scratch_folder(self)
        return self._folder
