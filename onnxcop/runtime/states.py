"""Live tensors of many batches: in memory up to a limit, in files of a temporary folder beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from onnxcop._base.scratch import scratch_folder
from onnxcop._base.types import Array, Feed

LARGEST_HELD = 192 * 2**20  # bytes of one network's live tensors


@dataclass(frozen=True, slots=True)
class _File:
    """An array in a file."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Array:
        return np.fromfile(self.path, self.dtype).reshape(self.shape)


class LiveTensors(Sequence[Feed]):
    """The tensors that cross a cut, batch by batch; each batch is read on demand.

    Args:
        feeds: The first tensors; they belong to the caller, and do not count towards the limit.
        limit: Bytes to keep in memory.
    """

    def __init__(self, feeds: Sequence[Mapping[str, Array]], limit: int | None = None) -> None:
        self._feeds = feeds
        self._items: list[dict[str, Array | _File] | None] = [None] * len(feeds)  # None: as it was given
        self._limit = LARGEST_HELD if limit is None else limit
        self._sizes = [0] * len(self._items)
        self._read: dict[str, Array] = {}  # of the batch read last, to recognize tensors that have not changed
        self._last = -1
        self._folder: Path | None = None
        self._files = 0

    @classmethod
    def holding(cls, feeds: Iterable[Mapping[str, Array]], limit: int | None = None) -> LiveTensors:
        """Take batches over one by one, so that never more than `limit` bytes of them are in memory."""
        tensors = cls((), limit)
        for feed in feeds:
            tensors._items.append({})
            tensors._sizes.append(0)
            tensors.replace(len(tensors) - 1, feed)
        return tensors

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Feed: ...

    @overload
    def __getitem__(self, index: slice) -> list[Feed]: ...

    def __getitem__(self, index: int | slice) -> Feed | list[Feed]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        item = self._items[index]
        if item is None:
            feed = dict(self._feeds[index])
        else:
            feed = {name: value.read() if isinstance(value, _File) else value for name, value in item.items()}
        self._last, self._read = index, feed
        return dict(feed)

    def __iter__(self) -> Iterator[Feed]:
        return (self[index] for index in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of all batches, in memory or in files."""
        return sum(getattr(value, "nbytes", 0) for item in self._items for value in (item or {}).values())

    def shape_of(self, index: int) -> dict[str, tuple[int, ...] | None]:
        """Shapes of a batch's arrays by name, without reading them; None for anything else."""
        item = self._items[index]
        if item is None and isinstance(self._feeds, LiveTensors):
            return self._feeds.shape_of(index)
        feed = self._feeds[index] if item is None else item
        return {name: getattr(value, "shape", None) for name, value in feed.items()}

    def replace(self, index: int, feed: Mapping[str, Array]) -> None:
        """Replace the tensors of a batch; tensors that it has just returned stay in their file."""
        old = self._items[index] or {}
        known = self._read if self._last == index else {}
        kept = {name for name, value in feed.items() if name in old and known.get(name) is value}
        self._last, self._read = -1, {}
        for name, value in old.items():
            if isinstance(value, _File) and name not in kept:
                value.path.unlink(missing_ok=True)
        total = sum(self._sizes) - self._sizes[index]
        item: dict[str, Array | _File] = {}
        size = 0
        for name, value in feed.items():
            spilled = old[name] if name in kept else None
            if isinstance(spilled, _File):
                item[name] = spilled
                continue
            plain = isinstance(value, np.ndarray) and not value.dtype.hasobject
            if plain and total + size + value.nbytes > self._limit:
                item[name] = self._written(value)
            else:
                item[name] = value
                size += value.nbytes if plain else 0
        self._items[index], self._sizes[index] = item, size

    def _written(self, array: Array) -> _File:
        if self._folder is None:
            self._folder, _ = scratch_folder(self)
        self._files += 1
        path = self._folder / f"{self._files}.bin"
        array.tofile(path)
        return _File(path, array.dtype, array.shape)
