"""What is too large for memory or for one protobuf message, put into files."""

from __future__ import annotations

import io
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import onnx


def scratch_folder(owner: object) -> tuple[Path, weakref.finalize[..., object]]:
    """A temporary folder that lives as long as `owner`, and the call that removes it sooner."""
    folder = Path(tempfile.mkdtemp(prefix="onnxcop-"))
    return folder, weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)


def save_externally(model: onnx.ModelProto, folder: Path) -> Path:
    """Writes a model with its weights in a file beside it, without changing or copying it whole.

    Returns:
        The path of the model's file inside `folder`.
    """
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(light.graph, field.name, value)
    with (folder / "weights.bin").open("wb") as file:
        for tensor in model.graph.initializer:
            _copy_tensor(tensor, light.graph.initializer.add(), file)
    path = folder / "model.onnx"
    path.write_bytes(light.SerializeToString())
    return path


def _copy_field(target: Any, name: str, value: Any) -> None:
    current = getattr(target, name)
    if hasattr(current, "extend"):
        current.extend(value)
    elif hasattr(current, "CopyFrom"):
        current.CopyFrom(value)
    else:
        setattr(target, name, value)


def _copy_tensor(source: onnx.TensorProto, target: onnx.TensorProto, file: io.BufferedIOBase) -> None:
    if not source.HasField("raw_data") or len(source.raw_data) < 1024:
        target.CopyFrom(source)  # small, or held in typed fields that other code reads as they are
        return
    target.name = source.name
    target.data_type = source.data_type
    target.dims.extend(source.dims)
    target.data_location = onnx.TensorProto.EXTERNAL
    position = file.tell()
    offset = -(-position // 4096) * 4096  # so that the file can be mapped into memory
    file.write(b"\0" * (offset - position))
    file.write(source.raw_data)
    entries = {"location": "weights.bin", "offset": offset, "length": len(source.raw_data)}
    for key, value in entries.items():
        target.external_data.add(key=key, value=str(value))


def weight_bytes(model: onnx.ModelProto) -> int:
    """About the bytes of a model's weights, which a size above 2 GiB keeps from being asked."""
    return sum(
        len(tensor.raw_data) + 4 * len(tensor.float_data) + 8 * len(tensor.int64_data)
        for tensor in model.graph.initializer
    )
