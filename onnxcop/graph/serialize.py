"""Models as bytes, part by part: serializing a large model as a whole holds it in memory twice more."""

from __future__ import annotations

from typing import Any, BinaryIO

import onnx
from google.protobuf.unknown_fields import UnknownFieldSet

_LENGTH_DELIMITED = 2  # wire type of a nested message


def file_size(message: Any) -> int:
    """Serialized size in bytes of a model or another message.

    Added up part by part, because serializing the whole would double the memory of a large model and fails beyond 2
    GiB.
    """
    total, plain = 0, type(message)()
    for entry, value in message.ListFields():
        if entry.message_type is None:
            _set(plain, entry.name, value)
            continue
        for part in _parts(value):
            size = _size(part)
            total += len(_head(entry.number, size)) + size
    return total + int(plain.ByteSize())


def write_message(message: Any, file: BinaryIO) -> None:
    """Write a model or another message as `SerializeToString` gives it, without holding these bytes in memory."""
    if _has_unknown_fields(message):
        file.write(message.SerializeToString())
        return
    for entry, value in message.ListFields():  # in the order of their numbers, as protobuf writes them
        if entry.message_type is None:
            plain = type(message)()
            _set(plain, entry.name, value)
            file.write(plain.SerializeToString())
            continue
        for part in _parts(value):
            file.write(_head(entry.number, _size(part)))
            if isinstance(part, onnx.GraphProto):
                write_message(part, file)
            else:
                file.write(part.SerializeToString())


def _has_unknown_fields(message: Any) -> bool:
    """Whether a newer version of ONNX has written fields that this one does not know."""
    if len(UnknownFieldSet(message)):
        return True
    return isinstance(message, onnx.ModelProto) and _has_unknown_fields(message.graph)


def _parts(value: Any) -> list[Any]:
    """The messages of a field, which holds one or several."""
    return [value] if hasattr(value, "ByteSize") else list(value)


def _size(part: Any) -> int:
    return file_size(part) if isinstance(part, onnx.GraphProto) else int(part.ByteSize())


def _set(message: Any, name: str, value: Any) -> None:
    if isinstance(value, (bool, int, float, str, bytes)):
        setattr(message, name, value)
    else:
        getattr(message, name).extend(value)


def _head(number: int, size: int) -> bytes:
    """The tag and the length before a nested message."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first; all but the last have the highest bit set."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))
