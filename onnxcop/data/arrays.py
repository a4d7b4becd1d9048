"""Files and objects that hold arrays, read only as far as needed."""

from __future__ import annotations

import contextlib
import math
import mmap
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from onnxcop._base.files import DAMAGE
from onnxcop._base.types import Array
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec

LARGEST_IN_MEMORY = 256 * 2**20  # bytes of arrays; larger ones stay on disk


_MOST_UNPACKED = 200  # times its packed size that a large array may have; real data compress to a tenth at best


class ArrayFile(Protocol):
    """Named arrays from one source; `origin` names it in messages."""

    origin: str

    def outline(self) -> Mapping[str, Array]:
        """Stand-ins for the arrays with their shapes and dtypes but no memory."""
        ...

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        """The arrays themselves, memory-mapped if possible."""
        ...


class ArraysInMemory:
    """Arrays in memory."""

    def __init__(self, arrays: Mapping[str, Array], origin: str) -> None:
        self.origin = origin
        self._arrays = arrays

    def outline(self) -> Mapping[str, Array]:
        return self._arrays

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        return {key: self._arrays[key] for key in keys}


class NpyFile:
    """A .npy file: one array, under the file's name."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._path = path

    def outline(self) -> Mapping[str, Array]:
        with _named(self.origin), self._path.open("rb") as file:
            header = _header(file)
            _check_length(header, file.tell(), self._path.stat().st_size)
            return {self._path.stem: header.outline}

    def load(self, keys: Iterable[str]) -> Mapping[str, Array]:
        with _named(self.origin):
            array: Array = np.load(self._path, mmap_mode="r", allow_pickle=False)
            return dict.fromkeys(keys, array)


class NpzFile:
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
                        header = _header(file)
                        _check_length(header, file.tell(), member.file_size)
                    arrays[member.filename.removesuffix(".npy")] = header.outline
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
            self._check_unpacked(member)
            with archive.open(member) as file, tempfile.TemporaryFile(prefix="onnxcop-") as copy:
                shutil.copyfileobj(file, copy, 2**20)
                return _mapped(copy, header, start)
        with self._path.open("rb") as raw:
            raw.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            return _mapped(raw, header, member.header_offset + 30 + name + extra + start)

    def _check_unpacked(self, member: zipfile.ZipInfo) -> None:
        """Refuse archives that unpack to hundreds of times their size, or to more than the temporary folder holds."""
        large, room = member.file_size, shutil.disk_usage(tempfile.gettempdir()).free
        if large > _MOST_UNPACKED * max(member.compress_size, 1) or large > room:
            raise CalibrationError(
                f"{self.origin}: '{member.filename}' unpacks from {member.compress_size / 1e6:.3g} MB to "
                f"{large / 1e9:.3g} GB; save the samples that count, with numpy.savez"
            )


class TestDataFolder:
    """A folder of `input_0.pb`, `input_1.pb` … as in ONNX's test data."""

    __test__ = False  # not a test class, although its name begins like one

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


@dataclass(frozen=True, slots=True)
class _Header:
    """Header of a .npy stream."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def outline(self) -> Array:
        return np.broadcast_to(np.empty((), self.dtype), self.shape)


def _header(file: Any) -> _Header:
    """Read the header of a .npy stream, leaving the stream at the first value."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = _Header(*read_header(file))
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects")
    return header


def _check_length(header: _Header, start: int, size: int) -> None:
    """Refuse a header that claims more values than follow it."""
    claimed = start + math.prod(header.shape) * header.dtype.itemsize
    if min(header.shape, default=0) < 0 or claimed > size:
        raise ValueError(f"its header claims {claimed} bytes, but it holds {size}: it is damaged or cut short")


def release_pages(arrays: Iterable[Array]) -> None:
    """Release the pages of mapped files, which would otherwise count as used memory."""
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
            f"{path}: this is not an ONNX tensor ({error}); only tensors are supported as inputs"
        ) from error


@contextlib.contextmanager
def _named(origin: str) -> Iterator[None]:
    """Add the name of the file to errors while an array file is read."""
    try:
        yield
    except CalibrationError:
        raise
    except DAMAGE as error:
        text = " ".join(str(error).split())
        raise CalibrationError(
            f"{origin}: this array file cannot be read ({text}); save plain arrays with numpy"
        ) from error
