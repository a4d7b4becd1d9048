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
from onnxcop.runtime.bound import DeviceTensor, Live, on_host

LARGEST_HELD = 192 * 2**20  # bytes of one network's live tensors
LARGEST_RESIDENT = 2**30  # bytes of them that may stay on a device


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
        resident: Bytes that may stay on a device; whatever exceeds it is copied to the host.
    """

    def __init__(
        self, feeds: Sequence[Mapping[str, Array]], limit: int | None = None, resident: int = LARGEST_RESIDENT
    ) -> None:
        self._feeds = feeds
        self._items: list[dict[str, Array | _File | DeviceTensor] | None] = [None] * len(feeds)  # None: as given
        self._limit, self._resident = LARGEST_HELD if limit is None else limit, resident
        self._sizes, self._device_sizes = [0] * len(self._items), [0] * len(self._items)
        self._read: dict[str, Array | DeviceTensor] = {}  # of the batch read last, to know what has not changed
        self._last = -1
        self._folder: Path | None = None
        self._files = 0

    @classmethod
    def holding(cls, feeds: Iterable[Mapping[str, Array]], limit: int | None = None) -> LiveTensors:
        """Take batches over one by one, at most `limit` bytes of them in memory, and none on a device."""
        tensors = cls((), limit, resident=0)
        for feed in feeds:
            tensors._items.append({})
            tensors._sizes.append(0)
            tensors._device_sizes.append(0)
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
        feed = {name: on_host(value) for name, value in self.live(index).items()}
        self._read = {**feed}
        return feed

    def live(self, index: int) -> dict[str, Array | DeviceTensor]:
        """A batch; what is on a device stays there."""
        if index < 0:
            index += len(self)
        item = self._items[index]
        feed: dict[str, Array | DeviceTensor]
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

    def replace(self, index: int, feed: Live) -> None:
        """Replace the tensors of a batch; tensors that it has just returned stay in their file."""
        old = self._items[index] or {}
        known = self._read if self._last == index else {}
        kept = {name for name, value in feed.items() if name in old and known.get(name) is value}
        self._last, self._read = -1, {}
        for name, value in old.items():
            if isinstance(value, _File) and name not in kept:
                value.path.unlink(missing_ok=True)
        total = sum(self._sizes) - self._sizes[index]
        room = self._resident - sum(self._device_sizes) + self._device_sizes[index]
        item: dict[str, Array | _File | DeviceTensor] = {}
        size = resident = 0
        for name, given in feed.items():
            stays = isinstance(given, DeviceTensor) and resident + given.nbytes <= room
            resident += given.nbytes if stays else 0
            value = given if stays else on_host(given)
            spilled = old[name] if name in kept else None
            if isinstance(spilled, _File):
                item[name] = spilled
                continue
            if isinstance(value, np.ndarray) and not value.dtype.hasobject:
                spills = total + size + value.nbytes > self._limit
                item[name] = self._written(value) if spills else value
                size += 0 if spills else value.nbytes
            else:
                item[name] = value
        self._items[index], self._sizes[index], self._device_sizes[index] = item, size, resident

    def _written(self, array: Array) -> _File:
        if self._folder is None:
            self._folder, _ = scratch_folder(self)
        self._files += 1
        path = self._folder / f"{self._files}.bin"
        array.tofile(path)
        return _File(path, array.dtype, array.shape)
