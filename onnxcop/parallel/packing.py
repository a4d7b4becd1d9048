"""Values as bytes that other processes read: a pickle, and large arrays and weights beside it.

A packed value is one file. A process on the same machine maps it, so that all workers share one copy of its arrays; on
another machine the same bytes are read from memory. Writing to an array changes neither the file nor other workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from onnxcop._base.scratch import scratch_folder
from onnxcop.graph.check import tensors
from onnxcop.graph.io import inlined, without_initializers
from onnxcop.graph.serialize import copy_fields

_SMALL = 1 << 12  # bytes; smaller buffers stay in the pickle
_ALIGNED = 64  # bytes, of the start of an array
_NUMBER = 8  # bytes
_LARGEST_PIECE = 1 << 24  # bytes that are hashed at once


class _Pickler(pickle.Pickler):
    """Stores the weights of ONNX messages as buffers, and those of a shared weight file by value."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, onnx.ModelProto):
            bare = without_initializers(value)
            for tensor in tensors(bare.graph):
                tensor.CopyFrom(inlined(tensor))
            return _model, (bare.SerializeToString(), list(value.graph.initializer))
        if isinstance(value, onnx.TensorProto):
            whole, bare_tensor = inlined(value), onnx.TensorProto()
            copy_fields(whole, bare_tensor, {"raw_data"})
            raw = pickle.PickleBuffer(whole.raw_data) if whole.HasField("raw_data") else None
            return _tensor, (bare_tensor.SerializeToString(), raw)
        return NotImplemented


def _model(bare: bytes, stored: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.ParseFromString(bare)
    model.graph.initializer.extend(stored)
    return model


def _tensor(bare: bytes, raw: Any) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(bare)
    if raw is not None:
        tensor.raw_data = bytes(raw)
    return tensor


def pack(value: object, path: Path) -> str:
    """Write a value to a file; returns the digest of its bytes.

    Args:
        value: Anything that pickle takes, and ONNX models of any size.
        path: The file.
    """
    buffers: list[memoryview] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _SMALL:
            return True
        buffers.append(view)
        return False

    text = io.BytesIO()
    _Pickler(text, protocol=5, buffer_callback=beside).dump(value)
    digest = hashlib.blake2b(digest_size=20)
    parts = [text.getbuffer(), *buffers]
    with path.open("wb") as file:
        for number in (len(parts), *(part.nbytes for part in parts)):
            _put(file, number.to_bytes(_NUMBER, "little"), digest)
        for part in parts:
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            for start in range(0, part.nbytes, _LARGEST_PIECE):
                _put(file, part[start : start + _LARGEST_PIECE], digest)
    return digest.hexdigest()


def _put(file: BinaryIO, data: bytes | memoryview, digest: Any) -> None:
    file.write(data)
    digest.update(data)


class PackedValues:
    """A folder of packed values, which exists as long as this or one of them is in use."""

    def __init__(self) -> None:
        self._folder, _ = scratch_folder(self)
        self._count = 0

    def add(self, value: object) -> tuple[str, Path]:
        """Pack a value; returns its digest and its file."""
        self._count += 1
        path = self._folder / f"{self._count}.shared"
        return pack(value, path), path


def removed(path: Path) -> None:
    """Remove a file; nothing happens if that is impossible, because another process reads it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def unpack(source: Path | bytes) -> Any:
    """Read a packed value, from its file or from the bytes of the file."""
    if isinstance(source, bytes):
        view = memoryview(bytearray(source))
    else:
        with source.open("rb") as file:  # the map lives as long as an array needs it
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    count = _number(view, 0)
    place, parts = _NUMBER * (1 + count), []
    for index in range(count):
        size = _number(view, 1 + index)
        place += -place % _ALIGNED
        parts.append(view[place : place + size])
        place += size
    return pickle.loads(parts[0], buffers=parts[1:])


def _number(view: memoryview, index: int) -> int:
    return int.from_bytes(view[_NUMBER * index : _NUMBER * (index + 1)], "little")
