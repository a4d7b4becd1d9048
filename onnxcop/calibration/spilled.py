"""Moments of many wide tensors, in files of a temporary folder; each is read on access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.scratch import scratch_folder
from onnxcop.calibration.statistics import Moments


@dataclass(frozen=True, slots=True)
class _Stored:
    """Moments with second moments in a file."""

    count: float
    mean: np.ndarray[tuple[int], np.dtype[np.float64]]
    path: Path


class SpilledMoments(Mapping[str, Moments]):
    """Moments by tap that use memory only while they are in use."""

    def __init__(self) -> None:
        self._folder, _ = scratch_folder(self)
        self._stored: dict[str, _Stored] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as moments in memory, which are mapped from the files here and from the pickle elsewhere."""
        return dict, ({key: self._mapped(stored) for key, stored in self._stored.items()},)

    @staticmethod
    def _mapped(stored: _Stored) -> Moments:
        size = len(stored.mean)
        return Moments(stored.count, stored.mean, np.memmap(stored.path, np.float64, "r", shape=(size, size)))

    def __setitem__(self, key: str, moments: Moments) -> None:
        """Add the moments of a tap."""
        path = self._folder / f"{len(self._stored)}.bin"
        moments.scatter.tofile(path)
        self._stored[key] = _Stored(moments.count, moments.mean, path)

    def __getitem__(self, key: str) -> Moments:
        stored = self._stored[key]
        scatter = np.fromfile(stored.path, np.float64).reshape(len(stored.mean), len(stored.mean))
        return Moments(stored.count, stored.mean, scatter)

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class ChangedMoments(Mapping[str, Moments]):
    """Moments by tap, with some replaced, added or left out."""

    def __init__(self, base: Mapping[str, Moments], changed: Mapping[str, Moments], dropped: frozenset[str]) -> None:
        self._base, self._changed = base, changed
        self._keys = [key for key in dict.fromkeys([*base, *changed]) if key not in dropped]

    def __getitem__(self, key: str) -> Moments:
        if key not in self._keys:
            raise KeyError(key)
        return self._changed[key] if key in self._changed else self._base[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
