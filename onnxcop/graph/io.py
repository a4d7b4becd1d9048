"""Loading and saving ONNX models: external data, identity, and atomic writes."""

from __future__ import annotations

import hashlib
import logging
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnxcop._base.files import Writing
from onnxcop._base.scratch import scratch_folder
from onnxcop._base.types import Array
from onnxcop.errors import ModelError
from onnxcop.graph.check import byte_size, check, check_text, tensors
from onnxcop.graph.edit import copied
from onnxcop.graph.serialize import copy_fields, file_size, write_message

log = logging.getLogger("onnxcop")

_SMALL = 1024  # bytes; smaller tensors stay inside the model
_PAGE = 4096  # bytes; tensors start at multiples of it, so that the file can be memory-mapped
VALUES = {"raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data"}
EXTERNAL = {"data_location", "external_data"}  # fields of a tensor whose values are in a file
_Put = Callable[[bytes], tuple[str, int]]

LARGEST_SINGLE_FILE = 2_000_000_000  # bytes; protobuf cannot serialize a message of 2 GiB or more


def load(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Read a model with all of its weights, and inline its local functions.

    Args:
        source: A path, or a model already in memory (which is copied, never changed).

    Raises:
        ModelError: No such file, not an ONNX model, truncated, invalid, or its external data is
            missing or is outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = copied(source)
        where = "the model"
    else:
        where = str(source)
        model = _read(Path(source))
    if not model.graph.node:
        raise ModelError(f"{where} has no nodes: it is empty or not an ONNX model")
    check_text(model, where)
    if model.functions:
        model = _inline(model, where)
    check(model, where)
    return model


def _read(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    if not data:
        raise ModelError(f"{path} is not an ONNX model, but an empty file; export or download it again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX model, or is truncated; export or download it again") from None
    del data
    if not model.HasField("graph") or model.ir_version == 0:
        raise ModelError(f"{path} is not an ONNX model (it has no graph)")
    check_text(model, str(path))
    _load_external(model, path)
    return model


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read external tensors into the model, refusing any path outside the model's folder."""
    for tensor in tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise ModelError(
                f"{path}: external data of tensor {tensor.name!r} points to {location!r}, outside the model's "
                "folder; move the data beside the model and save it again"
            )
        target = path.parent / location  # it may be a link: the user owns links in the user's folder
        if not target.is_file():
            raise ModelError(
                f"{path}: external data {location!r} of tensor {tensor.name!r} is missing; put it beside the model"
            )
        try:
            tensor.raw_data = _external_bytes(target, entries)
        except (OSError, ValueError, OverflowError) as error:
            cause = (isinstance(error, OSError) and error.strerror) or error
            raise ModelError(f"{path}: external data {location!r} cannot be read: {cause}") from None
        expected = byte_size(tensor)
        if expected is not None and len(tensor.raw_data) != expected:
            raise ModelError(
                f"{path}: external data {location!r} holds {len(tensor.raw_data)} of the {expected} bytes of "
                f"tensor {tensor.name!r}; the file is truncated"
            )
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _external_bytes(path: Path, entries: Mapping[str, str]) -> bytes:
    """The bytes of a tensor in a file: all from an offset on, or as many as the tensor declares.

    Raises:
        ValueError: The offset or length is not a number of at least 0, or the file is shorter.
    """
    offset, length = (int(entries.get(name) or default) for name, default in (("offset", 0), ("length", -1)))
    size = path.stat().st_size
    if offset < 0 or ("length" in entries and length < 0):
        raise ValueError(f"offset {offset} and length {length} are not a place in a file")
    if offset + max(length, 0) > size:
        raise ValueError(f"the tensor ends at byte {offset + length}, the file at {size}; the file is truncated")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _inline(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{where}: its local functions cannot be inlined: {cause}") from None


def sha256(model: onnx.ModelProto) -> str:
    """Identity of a model: the SHA-256 of its deterministic serialization, part by part.

    It does not depend on whether weights are inside the model or beside it.
    """
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode())
        own = hashlib.sha256()
        write_message(tensor, SimpleNamespace(write=own.update))
        digest.update(own.digest())
    skeleton = onnx.ModelProto()
    skeleton.opset_import.extend(model.opset_import)
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for values in (model.graph.input, model.graph.output):
        for value in values:
            digest.update(value.SerializeToString(deterministic=True))
    digest.update(skeleton.SerializeToString(deterministic=True))
    return digest.hexdigest()


def save(model: onnx.ModelProto, path: Path, *, external_data: bool | None = None) -> None:
    """Write a model; `path` then holds the whole new file, or still the old one if writing fails.

    Args:
        model: The model, with its weights in memory.
        path: The file to write; an existing one is replaced in one step.
        external_data: Write weights to a file beside it; None does so only if the model does not fit into a single file
            (2 GB).

    Raises:
        ModelError: The folder is missing or not writable, or the disk is full; nothing is replaced.
    """
    with Writing() as files:
        stage(files, model, path, external_data=external_data)


def stage(files: Writing, model: onnx.ModelProto, path: Path, *, external_data: bool | None = None) -> None:
    """Add a model to files that are written together; see :func:`save`."""
    large = file_size(model) > LARGEST_SINGLE_FILE
    if large and external_data is False:
        raise ModelError(f"{path}: the model is over 2 GB; write it with --external-data")
    own: Path | None = None
    if external_data or large:
        own = _stage_external(files, model, path)
    else:
        files.add(path, lambda file: write_message(model, file))
    files.then(lambda: _name_left_over(path, own))  # only then, because another run may write beside this one


def _name_left_over(path: Path, own: Path | None) -> None:
    """Name weight files that the model at a path does not read: a copy of an earlier result may still need them."""
    left = set(data_files(path)) - {own}
    if left:
        listed = ", ".join(sorted(map(str, left)))
        log.info("weights of earlier results are left, to be deleted if no other model uses them: %s", listed)


def data_files(path: Path) -> list[Path]:
    """Weight files of results at a path, whether still in use or not."""
    if not path.parent.is_dir():
        return []
    name = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    return [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]


def _stage_external(files: Writing, model: onnx.ModelProto, path: Path) -> Path:
    """Write the weights under a name made from their content, then the model that refers to them; return the name.

    A new data file never overwrites one that an existing model may still refer to.
    """
    data = path.with_name(f"{path.name}.{sha256(model)[:8]}.data")
    light = onnx.ModelProto()

    def write_weights(file: BinaryIO) -> None:
        light.CopyFrom(detached(model, data.name, file))

    files.add(data, write_weights)
    files.add(path, light.SerializeToString())
    return data


class WeightFile:
    """A file of weights that several models share: each tensor is stored once, and ONNX Runtime memory-maps it.

    A model with weights in it is light: it can be copied and changed without copying weights. It runs
    (:class:`onnxcop.runtime.session.Session` finds the file) as long as this object exists.
    """

    def __init__(self) -> None:
        self.folder, _ = scratch_folder(self)
        self.name = f"{self.folder.name}.weights"  # identifies light models
        self._places: dict[bytes, tuple[int, int]] = {}
        self._models = 0
        _files[self.name] = self

    @staticmethod
    def of(model: onnx.ModelProto) -> WeightFile | None:
        """The file with a light model's weights; None for other models."""
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                return _files.get(next((e.value for e in tensor.external_data if e.key == "location"), ""))
        return None

    def light(self, model: onnx.ModelProto, *, inner: bool = True) -> onnx.ModelProto:
        """A copy of a model whose large initializers are in the file; `inner` tensors, those of nodes, as well."""
        return _light(model, self.put, inner=inner)

    def read(self, entries: Mapping[str, str]) -> bytes:
        """The bytes of a tensor, by the entries of its external data."""
        return _external_bytes(self.folder / self.name, entries)

    def put(self, data: bytes | memoryview) -> tuple[str, int]:
        """Add the bytes of a tensor unless they are stored already; return the file's name and their offset."""
        digest = hashlib.blake2b(data, digest_size=20).digest()
        if digest not in self._places:
            with (self.folder / self.name).open("ab") as file:
                file.write(b"\0" * (-file.tell() % _PAGE))
                self._places[digest] = file.tell(), len(data)
                file.write(data)
        return self.name, self._places[digest][0]

    def writable(self, tensor: onnx.TensorProto) -> Array:
        """The values of a tensor as an array of its own, which may be changed; of one in the file, a copy on write."""
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if kind.isbuiltin == 1 and int(entries["length"]) == int(np.prod(tensor.dims, dtype=int)) * kind.itemsize:
                place, shape = int(entries["offset"]), tuple(tensor.dims)
                return np.memmap(self.folder / self.name, kind, mode="c", offset=place, shape=shape)
        return values_of(tensor).copy()

    def detach(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """The same tensor with its values in the file; unchanged if it is small."""
        detached = onnx.TensorProto()
        _detach(tensor, detached, self.put)
        return detached

    def tensor(self, name: str, values: Array) -> onnx.TensorProto:
        """A tensor with these values, which are in the file unless they are few."""
        plain = values.dtype.isbuiltin == 1 and values.dtype.kind in "biuf" and values.dtype.byteorder != ">"
        if values.nbytes < _SMALL or not plain:
            return self.detach(onnx.numpy_helper.from_array(values, name))
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=kind)
        _refer(tensor, *self.put(np.ascontiguousarray(values).data.cast("B")), values.nbytes)
        return tensor

    def written(self, model: onnx.ModelProto) -> Path:
        """Write a light model beside the file and return its path."""
        self._models += 1
        path = self.folder / f"{self._models}.onnx"
        path.write_bytes(model.SerializeToString())
        return path


_files: weakref.WeakValueDictionary[str, WeightFile] = weakref.WeakValueDictionary()


def inlined(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A tensor with its values: itself, or a copy if they are in a weight file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    entries = {entry.key: entry.value for entry in tensor.external_data}
    result = onnx.TensorProto()
    copy_fields(tensor, result, EXTERNAL)
    result.raw_data = _files[entries["location"]].read(entries)
    return result


def values_of(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor, also if they are in a weight file."""
    return onnx.numpy_helper.to_array(inlined(tensor))


def whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model that holds all its weights: itself, or a copy of a light one."""
    if WeightFile.of(model) is None:
        return model
    result = without_initializers(model)
    for tensor in model.graph.initializer:
        result.graph.initializer.add().CopyFrom(inlined(tensor))
    return result


def save_externally(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model with its weights in a file beside it, without changing or copying the model as a whole.

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
        location: Name of the file in the copy.
        file: The file to write tensors to.
    """

    def put(data: bytes) -> tuple[str, int]:
        file.write(b"\0" * (-file.tell() % _PAGE))
        offset = file.tell()
        file.write(data)
        return location, offset

    return _light(model, put)


def _light(model: onnx.ModelProto, put: _Put, *, inner: bool = True) -> onnx.ModelProto:
    light = without_initializers(model)
    for tensor in tensors(light.graph) if inner else ():  # constants, and what bodies store: copied already
        _detach(tensor, tensor, put)
    for tensor in model.graph.initializer:
        _detach(tensor, light.graph.initializer.add(), put)
    return light


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of all of a model except its initializers."""
    result = onnx.ModelProto()
    copy_fields(model, result, {"graph"})
    copy_fields(model.graph, result.graph, {"initializer"})
    return result


def _detach(source: onnx.TensorProto, target: onnx.TensorProto, put: _Put) -> None:
    data = None if source.data_location == onnx.TensorProto.EXTERNAL else _large_data(source)
    if data is None:
        if target is not source:
            target.CopyFrom(source)
        return
    location, offset = put(data)
    bare = onnx.TensorProto()
    copy_fields(source, bare, VALUES)
    _refer(bare, location, offset, len(data))
    target.CopyFrom(bare)


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Say where the values of a tensor are."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _large_data(tensor: onnx.TensorProto) -> bytes | None:
    """The bytes of a tensor that is large enough to store outside."""
    if tensor.HasField("raw_data"):
        data: bytes = tensor.raw_data  # a copy, every time
        return None if len(data) < _SMALL else data
    size = byte_size(tensor)
    if size is None or size < _SMALL:
        return None
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data


def weight_bytes(model: onnx.ModelProto) -> int:
    """Approximate bytes of a model's weights, from their shapes, because reading values copies them."""
    stored = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    sizes = [(tensor, byte_size(tensor)) for tensor in stored]
    return sum(len(tensor.raw_data) if size is None else size for tensor, size in sizes)
