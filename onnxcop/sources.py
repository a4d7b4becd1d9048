"""Where samples come from: files of arrays, folders of pictures, test data sets, iterables.

A *parcel* is one file or one object that holds arrays; a *store* gives the samples of one or many
parcels by number, reading what is asked for and no more.
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
import tempfile
import zipfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from onnxcop.arrays import Array, Feed
from onnxcop.errors import CalibrationError
from onnxcop.external import scratch_folder
from onnxcop.feeds import Binder, Binding, cast
from onnxcop.images import Preprocess
from onnxcop.specs import InputSpec

LARGEST_IN_MEMORY = 256 * 2**20  # bytes of arrays; beyond that they stay on disk
LARGEST_STREAM = 64 * 2**20  # bytes of samples kept from a stream; beyond that they go to disk
_OPEN_PARCELS = 2
_MAPPED = 32 * 2**20  # bytes read through maps after which the pages are handed back


class Parcel(Protocol):
    """Named arrays from one place; `origin` names it in messages."""

    origin: str

    def outline(self) -> Mapping[str, Array]:
        """Stand-ins for the arrays, true in shape and dtype and without memory behind them."""
        ...

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        """The arrays themselves, mapped from disk where that is possible."""
        ...


class Store(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Feed:
        """The arrays of one sample, in the inputs' ranks and dtypes (batch axis of size 1)."""
        ...


class HeldParcel:
    """Arrays in memory."""

    def __init__(self, arrays: Mapping[str, Array], origin: str) -> None:
        self.origin = origin
        self._arrays = arrays

    def outline(self) -> Mapping[str, Array]:
        return self._arrays

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        return {key: self._arrays[key] for key in keys}


class NpyParcel:
    """A .npy file: one array, under the file's name."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._path = path

    def outline(self) -> Mapping[str, Array]:
        with _named(self.origin), self._path.open("rb") as file:
            return {self._path.stem: _header(file).outline}

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        with _named(self.origin):
            array: Array = np.load(self._path, mmap_mode="r", allow_pickle=False)
            return dict.fromkeys(keys, array)


class NpzParcel:
    """A .npz file. Stored arrays are mapped from it; large compressed ones from a copy on disk."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._path = path

    def outline(self) -> Mapping[str, Array]:
        with _named(self.origin), zipfile.ZipFile(self._path) as archive:
            arrays = {}
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    with archive.open(member) as file:
                        arrays[member.filename.removesuffix(".npy")] = _header(file).outline
            return arrays

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        with _named(self.origin), zipfile.ZipFile(self._path) as archive:
            return {key: self._array(archive, archive.getinfo(key + ".npy")) for key in keys}

    def _array(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
        with archive.open(member) as file:
            header = _header(file)
            start = file.tell()
            if member.file_size <= LARGEST_IN_MEMORY and member.compress_type != zipfile.ZIP_STORED:
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
        if member.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as file, tempfile.TemporaryFile(prefix="onnxcop-") as copy:
                shutil.copyfileobj(file, copy, 2**20)
                return _mapped(copy, header, start)
        with self._path.open("rb") as raw:
            raw.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            return _mapped(raw, header, member.header_offset + 30 + name + extra + start)


class TestSetParcel:
    """A folder of `input_0.pb`, `input_1.pb` … as in ONNX's test data."""

    __test__ = False  # no test class, whatever its name begins with

    def __init__(self, folder: Path, specs: Sequence[InputSpec]) -> None:
        self.origin = str(folder)
        self._folder = folder
        self._specs = specs

    def outline(self) -> Mapping[str, Array]:
        return {key: np.broadcast_to(np.empty((), array.dtype), array.shape) for key, array in self._arrays().items()}

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        arrays = self._arrays()
        return {key: arrays[key] for key in keys}

    def _arrays(self) -> dict[str, Array]:
        paths = sorted(self._folder.glob("input_*.pb"), key=lambda path: (len(path.stem), path.stem))
        tensors = [_tensor_from_pb(path) for path in paths]
        names = [spec.name for spec in self._specs]
        if {name for name, _ in tensors} >= set(names):
            return dict(tensors)
        if len(tensors) < len(names):
            raise CalibrationError(
                f"{self.origin}: it holds {len(tensors)} inputs, but the model has {len(names)} "
                f"({', '.join(names)}); give input_0.pb to input_{len(names) - 1}.pb"
            )
        return {name: array for name, (_, array) in zip(names, tensors[: len(names)], strict=True)}


class ParcelStore:
    """The samples of many parcels."""

    def __init__(self, parcels: Sequence[Parcel], binder: Binder) -> None:
        self.parcels = parcels
        self._binder = binder
        self._bindings = [binder.bind(parcel.outline(), parcel.origin) for parcel in parcels]
        self._ends = list(accumulate(binding.count for binding in self._bindings))
        self._open: OrderedDict[int, Mapping[str, Array]] = OrderedDict()
        self._read = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def sample(self, index: int) -> Feed:
        place = bisect_right(self._ends, index)
        binding, parcel = self._bindings[place], self.parcels[place]
        first = self._ends[place] - binding.count
        arrays = self._arrays(place, binding, parcel)
        feed = self._binder.sample(binding, arrays, index - first, parcel.origin)
        self._read += sum(array.nbytes for array in feed.values())
        if self._read > _MAPPED:
            self._read = 0
            for opened in self._open.values():
                _hand_back(opened.values())
        return feed

    def _arrays(self, place: int, binding: Binding, parcel: Parcel) -> Mapping[str, Array]:
        if place not in self._open:
            if len(self._open) >= _OPEN_PARCELS:
                self._open.popitem(last=False)
            self._open[place] = parcel.load(set(binding.keys.values()))
        self._open.move_to_end(place)
        return self._open[place]


class ImageStore:
    """A list of pictures for a model whose only input is a picture."""

    def __init__(self, paths: Sequence[Path], spec: InputSpec, preprocess: Preprocess) -> None:
        self._paths = paths
        self._spec = spec
        self._preprocess = preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def sample(self, index: int) -> Feed:
        path = self._paths[index]
        pixels = self._preprocess.from_file(path)[None]
        return {self._spec.name: cast(pixels, self._spec, str(path))}


class SpilledStore:
    """Samples that were given once: in memory up to a limit, in a temporary folder beyond it."""

    def __init__(self) -> None:
        self._items: list[Feed | Path] = []
        self._names: list[str] = []
        self._held = 0
        self._folder: Path | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, place: int, feed: Feed) -> None:
        """Puts a sample at `place`, which may be one past the end."""
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


@dataclass(frozen=True, slots=True)
class _Header:
    """What the first bytes of a .npy stream say."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def outline(self) -> Array:
        return np.broadcast_to(np.empty((), self.dtype), self.shape)


def _header(file: Any) -> _Header:
    """Reads the header of a .npy stream, leaving the stream at the first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = _Header(*read(file))
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects")
    return header


def _hand_back(arrays: Iterable[Array]) -> None:
    """Lets go of the pages of mapped files, which would otherwise count as memory in use."""
    for array in arrays:
        pages = getattr(array, "_mmap", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)


def _mapped(file: Any, header: _Header, offset: int) -> Array:
    if 0 in header.shape:
        return np.empty(header.shape, header.dtype)
    order: Literal["F", "C"] = "F" if header.fortran else "C"
    return np.memmap(file, header.dtype, "r", offset, header.shape, order)


def _tensor_from_pb(path: Path) -> tuple[str, Array]:
    from onnx import TensorProto, numpy_helper

    tensor = TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        return tensor.name, numpy_helper.to_array(tensor)
    except Exception as error:  # protobuf's own errors have no public type
        raise CalibrationError(
            f"{path}: this is no ONNX tensor ({error}); only tensors are supported as inputs"
        ) from error


@contextlib.contextmanager
def _named(origin: str) -> Iterator[None]:
    """Errors while reading an array file name the file."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        text = " ".join(str(error).split())
        raise CalibrationError(
            f"{origin}: this array file cannot be read ({text}); save plain arrays with numpy"
        ) from error
