"""The files that a run reads, which none of its results may overwrite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.files import check_target
from onnxcop.data.paths import DATA_SUFFIXES, script_of
from onnxcop.errors import ModelError
from onnxcop.graph.check import tensors
from onnxcop.graph.io import weight_bytes

_LIGHT = 1 << 27  # bytes; a larger file holds its weights itself
_Identity = tuple[int, int]  # device and inode: the same for every name of a file


@dataclass(frozen=True, slots=True)
class InputFiles:
    """What a run is given.

    Attributes:
        models: Models, or what else; those that are no path to a file are passed over.
        data: Calibration data: a file, a folder, a script with its function, or whatever is in memory.
        metric: A script with its function, or a callable.
        others: Statistics, plans, libraries of operators.
    """

    models: Sequence[Any] = ()
    data: Any = None
    metric: Any = None
    others: Sequence[Any] = field(default=())

    def check(self, *targets: Path | None) -> None:
        """Check all files that a run will write: see :func:`onnxcop._base.files.check_target`.

        Raises:
            ModelError: One of them cannot be written, is read by the run, or is to be two results at once.
        """
        seen: set[Path] = set()
        for path in targets:
            if path is None:
                continue
            check_target(path)
            if path.resolve() in seen:
                raise ModelError(f"{path} cannot be two results at once; give each a name of its own")
            seen.add(path.resolve())
        self.refuse(*(path for path in targets if path is not None))

    def refuse(self, *targets: Path) -> None:
        """Refuse results that are files which the run reads; files that do not exist yet are fine.

        Raises:
            ModelError: One of them is read by the run.
        """
        known = {_identity(path): path for path in targets}
        known.pop(None, None)
        if not known:
            return
        for source, role in self._all():
            path = known.get(_identity(source))
            if path is not None:
                raise ModelError(f"{path} is {role}; choose another output")

    def _all(self) -> Iterator[tuple[Path, str]]:
        """Every file with what it is to the run."""
        for model in filter(_is_path, self.models):
            yield Path(model), "the input model itself"
            for data in _weight_files(Path(model)):
                yield data, f"where {model} has its weights"
        for source, role in ((self.data, "calibration data of this run"), (self.metric, "the metric's script")):
            if not _is_path(source):
                continue
            script = script_of(os.fspath(source))
            if script is not None:
                yield script, "a script of this run"
            elif Path(source).is_dir():
                yield from ((path, role) for path in Path(source).rglob("*") if path.suffix.lower() in DATA_SUFFIXES)
            else:
                yield Path(source), role
        for other in filter(_is_path, self.others):
            yield Path(other), "read by this run too"


def bytes_of_model(model: Any) -> int:
    """About the bytes of a model's weights, without loading them; 0 where there is none (loading says so)."""
    if isinstance(model, onnx.ModelProto):
        return weight_bytes(model)
    try:
        inside = os.stat(model).st_size
        beside = _weight_files(Path(model)) if inside < _LIGHT else ()
        return inside + sum(path.stat().st_size for path in beside if path.is_file())
    except (OSError, ValueError, TypeError):
        return 0


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _identity(path: Path) -> _Identity | None:
    """What all names of an existing file have in common."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return None
    return about.st_dev, about.st_ino


def _weight_files(model: Path) -> set[Path]:
    """Files beside a model that its tensors are in; none where it cannot be read (loading it says so)."""
    try:
        light = onnx.ModelProto.FromString(model.read_bytes())
    except Exception:  # whatever is wrong with it
        return set()
    return {
        model.parent / entry.value
        for tensor in tensors(light.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location" and entry.value
    }
