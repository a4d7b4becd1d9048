"""What is too large for memory or for one protobuf message, put into files."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from onnxcop._base.scratch import scratch_folder
from onnxcop.graph.check import byte_size, tensors

_SMALL = 1024  # bytes; smaller tensors stay in the model
_PAGE = 4096  # bytes; tensors start at multiples, so that the file can be mapped into memory
VALUES = {"raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data"}


class WeightFile:
    """A file of weights that several models share: each tensor is in it once, and ONNX Runtime maps it into memory.

    A model whose weights are in it is light: it can be copied and changed without copying weights. It runs
    (:class:`onnxcop.runtime.session.Session` finds the file) as long as this object lives.
    """

    def __init__(self) -> None:
        self.folder, _ = scratch_folder(self)
        self.name = f"{self.folder.name}.weights"  # by which light models are known again
        self._places: dict[bytes, tuple[int, int]] = {}
        self._models = 0
        _files[self.name] = self

    @staticmethod
    def of(model: onnx.ModelProto) -> WeightFile | None:
        """The file that a light model's weights are in; None for other models."""
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                return _files.get(next((e.value for e in tensor.external_data if e.key == "location"), ""))
        return None

    def light(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of a model whose large tensors are in the file."""
        return _light(model, self.put)

    def put(self, data: bytes) -> tuple[str, int]:
        """Add the bytes of a tensor, unless they are there already; returns the file's name and their offset."""
        digest = hashlib.blake2b(data, digest_size=20).digest()
        if digest not in self._places:
            with (self.folder / self.name).open("ab") as file:
                file.write(b"\0" * (-file.tell() % _PAGE))
                self._places[digest] = file.tell(), len(data)
                file.write(data)
        return self.name, self._places[digest][0]

    def detach(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """The same tensor with its values in the file; itself where it is small."""
        found = onnx.TensorProto()
        _detach(tensor, found, self.put)
        return found

    def written(self, model: onnx.ModelProto) -> Path:
        """Write a light model beside the file; returns its path."""
        self._models += 1
        path = self.folder / f"{self._models}.onnx"
        path.write_bytes(model.SerializeToString())
        return path


_files: weakref.WeakValueDictionary[str, WeightFile] = weakref.WeakValueDictionary()
_Put = Callable[[bytes], tuple[str, int]]


def save_externally(model: onnx.ModelProto, folder: Path) -> Path:
    """Writes a model with its weights in a file beside it, without changing or copying it whole.

    Returns:
        The path of the model's file inside `folder`.
    """
    path, weights = folder / "model.onnx", folder / "weights.bin"
    with weights.open("wb") as file:
        light = detached(model, weights.name, file)
    path.write_bytes(light.SerializeToString())
    return path


def detached(model: onnx.ModelProto, location: str, file: BinaryIO) -> onnx.ModelProto:
    """A copy of a model whose large tensors are in a file.

    Args:
        model: The model, its weights in memory; it is not changed.
        location: What the copy calls the file.
        file: Where the tensors are written.
    """

    def put(data: bytes) -> tuple[str, int]:
        file.write(b"\0" * (-file.tell() % _PAGE))
        offset = file.tell()
        file.write(data)
        return location, offset

    return _light(model, put)


def _light(model: onnx.ModelProto, put: _Put) -> onnx.ModelProto:
    light = onnx.ModelProto()
    copy_fields(model, light, {"graph"})
    copy_fields(model.graph, light.graph, {"initializer"})
    for tensor in tensors(light.graph):  # constants, and what bodies store: copied already
        _detach(tensor, tensor, put)
    for tensor in model.graph.initializer:
        _detach(tensor, light.graph.initializer.add(), put)
    return light


def copy_fields(source: Any, target: Any, without: Container[str]) -> None:
    """Copy the fields of a message, but for those of some names."""
    for field, value in source.ListFields():
        current = getattr(target, field.name)
        if field.name in without:
            continue
        if hasattr(current, "extend"):
            current.extend(value)
        elif hasattr(current, "CopyFrom"):
            current.CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _detach(source: onnx.TensorProto, target: onnx.TensorProto, put: _Put) -> None:
    data = None if source.data_location == onnx.TensorProto.EXTERNAL else _large_data(source)
    if data is None:
        if target is not source:
            target.CopyFrom(source)
        return
    location, offset = put(data)
    bare = onnx.TensorProto()
    copy_fields(source, bare, VALUES)
    bare.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(data))):
        bare.external_data.add(key=key, value=str(value))
    target.CopyFrom(bare)


def _large_data(tensor: onnx.TensorProto) -> bytes | None:
    """The bytes of a tensor that is large enough to live outside."""
    if tensor.HasField("raw_data"):
        return None if len(tensor.raw_data) < _SMALL else tensor.raw_data
    size = byte_size(tensor)
    if size is None or size < _SMALL:
        return None
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data


def weight_bytes(model: onnx.ModelProto) -> int:
    """About the bytes of a model's weights, quicker than :func:`file_size`."""
    return sum(
        len(tensor.raw_data) + 4 * len(tensor.float_data) + 8 * len(tensor.int64_data)
        for tensor in model.graph.initializer
    )


def file_size(message: Any) -> int:
    """Serialized size in bytes of a model or another message.

    Added up part by part: asked for as a whole it would double a large model, and fail beyond 2 GiB.
    """
    total, plain = 0, type(message)()
    for entry, value in message.ListFields():
        if entry.message_type is None:
            if isinstance(value, (bool, int, float, str, bytes)):
                setattr(plain, entry.name, value)
            else:
                getattr(plain, entry.name).extend(value)
            continue
        parts = [file_size(value)] if isinstance(value, onnx.GraphProto) else _sizes(value)
        total += sum(_framed(entry.number, size) for size in parts)
    return total + int(plain.ByteSize())


def _sizes(value: Any) -> list[int]:
    return [int(part.ByteSize()) for part in ([value] if hasattr(value, "ByteSize") else value)]


def _framed(number: int, size: int) -> int:
    """A nested message with its tag and length, which take seven bits per byte."""
    return size + max(1, -(-(number << 3).bit_length() // 7)) + max(1, -(-size.bit_length() // 7))
