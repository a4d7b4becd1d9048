"""Loading and saving ONNX models: external data, identity, and never half a file."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError

from onnxcop._base.files import Writing
from onnxcop.errors import ModelError
from onnxcop.graph.check import byte_size, check, check_text, tensors
from onnxcop.graph.external_data import detached, file_size

log = logging.getLogger("onnxcop")

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
        target = path.parent / location  # it may be a link: those in the user's folder are the user's own
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
    """What a tensor refers to in a file: all of it from an offset on, or as many bytes as it says.

    Raises:
        ValueError: The offset or the length is no number from 0 on, or the file has not so many bytes.
    """
    offset, length = (int(entries.get(name) or default) for name, default in (("offset", 0), ("length", -1)))
    size = path.stat().st_size
    if offset < 0 or ("length" in entries and length < 0):
        raise ValueError(f"offset {offset} and length {length} are no place in a file")
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


def save(model: onnx.ModelProto, path: Path, *, external_data: bool | None = None) -> None:
    """Write a model so that `path` holds either the old file or the whole new one.

    Args:
        model: The model, with its weights in memory.
        path: The file to write; an existing one is replaced in one step.
        external_data: Write weights to a file beside it; None does so only where the model would
            not fit a single file (2 GB).

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
        files.add(path, model.SerializeToString())
    files.then(lambda: _name_left_over(path, own))  # only then, since another run may write beside this one


def _name_left_over(path: Path, own: Path | None) -> None:
    """Say which files of weights the model at a path does not read: a copy of an earlier result may still need them."""
    left = set(data_files(path)) - {own}
    if left:
        listed = ", ".join(sorted(map(str, left)))
        log.info("weights of earlier results are left, to be deleted if no other model uses them: %s", listed)


def data_files(path: Path) -> list[Path]:
    """Files of weights that results at a path were written with, whether they are still in use or not."""
    if not path.parent.is_dir():
        return []
    name = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    return [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]


def _stage_external(files: Writing, model: onnx.ModelProto, path: Path) -> Path:
    """Write the weights under a name made from their content, which is returned, then the model that refers to them.

    A new data file never overwrites one that an existing model may still refer to.
    """
    data = path.with_name(f"{path.name}.{sha256(model)[:8]}.data")
    light = onnx.ModelProto()

    def write_weights(file: BinaryIO) -> None:
        light.CopyFrom(detached(model, data.name, file))

    files.add(data, write_weights)
    files.add(path, light.SerializeToString())
    return data
