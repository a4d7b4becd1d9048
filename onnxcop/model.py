"""Loading and saving ONNX models: external data, identity, and never half a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxcop.errors import ModelError

LARGEST_SINGLE_FILE = 2_000_000_000  # bytes; protobuf cannot serialize a message of 2 GiB or more


def load(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Read a model with all of its weights, and inline its local functions.

    Args:
        source: A path, or a model already in memory (which is copied, never changed).

    Raises:
        ModelError: No such file, not an ONNX model, truncated, invalid, or its external data is
            missing or lies outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        where = "the model"
    else:
        where = str(source)
        model = _read(Path(source))
    if not model.graph.node:
        raise ModelError(f"{where} has no nodes: it is empty or not an ONNX model")
    if model.functions:
        model = _inline(model, where)
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
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX model, or is truncated; export or download it again") from None
    del data
    if not model.HasField("graph") or model.ir_version == 0:
        raise ModelError(f"{path} is not an ONNX model (it has no graph)")
    _load_external(model, path)
    return model


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read external tensors into the model, refusing any path outside the model's folder."""
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        target = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise ModelError(
                f"{path}: external data of tensor {tensor.name!r} points to {location!r}, outside the model's "
                "folder; move the data beside the model and save it again"
            )
        if not target.is_file():
            raise ModelError(
                f"{path}: external data {location!r} of tensor {tensor.name!r} is missing; put it beside the model"
            )
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:  # onnx raises several kinds, all of them about this file
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{path}: external data {location!r} cannot be read: {cause}") from None
        expected = _byte_size(tensor)
        if expected is not None and len(tensor.raw_data) != expected:
            raise ModelError(
                f"{path}: external data {location!r} holds {len(tensor.raw_data)} of the {expected} bytes of "
                f"tensor {tensor.name!r}; the file is truncated"
            )
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _byte_size(tensor: onnx.TensorProto) -> int | None:
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return None
    packed = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.STRING)
    if tensor.data_type in packed or tensor.data_type > onnx.TensorProto.FLOAT8E5M2FNUZ:
        return None
    count = 1
    for dim in tensor.dims:
        count *= dim
    return int(count * itemsize)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


def _inline(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{where}: its local functions cannot be inlined: {cause}") from None


def sha256(model: onnx.ModelProto) -> str:
    """Identity of a model: the SHA-256 of its deterministic serialization, part by part.

    The same for a model with its weights inside and beside it.
    """
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode())
        digest.update(hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest())
    skeleton = onnx.ModelProto()
    skeleton.opset_import.extend(model.opset_import)
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for values in (model.graph.input, model.graph.output):
        for value in values:
            digest.update(value.SerializeToString(deterministic=True))
    digest.update(skeleton.SerializeToString(deterministic=True))
    return digest.hexdigest()


def check_target(path: Path, source: Path | None = None) -> None:
    """Refuse an output path that cannot be written, before any work is done.

    Raises:
        ModelError: The folder does not exist or is not writable, or the path is the input itself.
    """
    folder = path.parent if str(path.parent) else Path()
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give a file name for the result")
    if not folder.is_dir():
        raise ModelError(f"the output folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise ModelError(f"the output folder {folder} is not writable; choose another with -o")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise ModelError(f"{path} is the input model itself; choose another output with -o")


def save(model: onnx.ModelProto, path: Path, *, external_data: bool | None = None) -> None:
    """Write a model so that `path` holds either the old file or the whole new one.

    Args:
        model: The model, with its weights in memory.
        path: The file to write; an existing one is replaced in one step.
        external_data: Write weights to `path.data` beside it; None does so only where the model would
            not fit a single file (2 GB).

    Raises:
        ModelError: The folder is missing or not writable, or the disk is full; nothing is replaced.
    """
    check_target(path)
    large = model.ByteSize() > LARGEST_SINGLE_FILE
    if external_data is None:
        external_data = large
    if large and not external_data:
        raise ModelError(f"{path}: the model is over 2 GB; write it with --external-data")
    if external_data:
        _save_external(model, path)
    else:
        _replace(path, lambda temporary: _write(temporary, model.SerializeToString()))


def _save_external(model: onnx.ModelProto, path: Path) -> None:
    """Write the weights under a name made from their content, then the model that refers to them.

    A new data file never overwrites one that an existing model may still refer to.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = path.with_name(f"{path.name}.{sha256(model)[:8]}.data")

    def write_weights(temporary: Path) -> None:
        with temporary.open("wb") as file:
            offset = 0
            for tensor in _tensors(copy.graph):
                if len(tensor.raw_data) < 1024 and not _make_raw(tensor):
                    continue
                padding = -offset % 4096
                file.write(b"\0" * padding)
                offset += padding
                file.write(tensor.raw_data)
                _refer(tensor, data.name, offset)
                offset += int(_value(tensor, "length"))
            file.flush()
            os.fsync(file.fileno())

    _replace(data, write_weights)
    _replace(path, lambda temporary: _write(temporary, copy.SerializeToString()))


def _make_raw(tensor: onnx.TensorProto) -> bool:
    """Move typed data to raw bytes; return whether the tensor is large enough to live outside."""
    if tensor.raw_data or tensor.data_type == onnx.TensorProto.STRING:
        return False
    size = _byte_size(tensor)
    if size is None or size < 1024:
        return False
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
    raw.doc_string = tensor.doc_string
    tensor.CopyFrom(raw)
    return True


def _refer(tensor: onnx.TensorProto, location: str, offset: int) -> None:
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _value(tensor: onnx.TensorProto, key: str) -> str:
    return next(entry.value for entry in tensor.external_data if entry.key == key)


def _write(temporary: Path, data: bytes) -> None:
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary file beside `path`, then rename it over."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ModelError(f"{path.parent} is not writable: {error.strerror or error}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise ModelError(
            f"{path} could not be written: {error.strerror or error}; the old file, if any, is untouched"
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write any small file (a plan, a report) so that it is never half there."""
    check_target(path)
    _replace(path, lambda temporary: _write(temporary, data))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
