"""The files that a run reads, which none of its results may overwrite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxcop._base.files import check_target
from onnxcop.data.paths import DATA_SUFFIXES, file_of, script_of
from onnxcop.errors import ModelError
from onnxcop.graph.check import tensors
from onnxcop.graph.io import weight_bytes

_LIGHT = 1 << 27  # bytes; a larger file holds its weights itself
_Identity = tuple[int, int]  # device and inode: the same for every name of a file


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The input files of a run.

    Attributes:
        models: Models; anything that is not a path is ignored.
        data: Calibration data: a file, a folder, a script with its function, or objects in memory.
        metric: A script with its function, or a callable.
        others: Statistics, plans, recipes, tables, libraries of operators; of folders (tokenizers), the files in them.
    """

    models: Sequence[Any] = ()
    data: Any = None
    metric: Any = None
    others: Sequence[Any] = field(default=())

    def check(self, *targets: Path | None) -> None:
        """Check all files that a run will write: see :func:`onnxcop._base.files.check_target`.

        Raises:
            ModelError: A file cannot be written, is read by the run, or is the path of two results.
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
        """Refuse results that overwrite input files; files that do not exist yet are fine.

        Raises:
            ModelError: A result is an input file of the run.
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
        """Every input file with its role."""
        for model in filter(_is_path, self.models):
            yield Path(model), "the input model itself"
            for data in weight_files(Path(model)):
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
            file = file_of(other)
            for path in file.iterdir() if file.is_dir() else [file]:
                yield path, "read by this run too"


def bytes_of_model(model: Any) -> int:
    """Approximate bytes of a model's weights, without loading them; 0 if there is no such file (loading reports it)."""
    if isinstance(model, onnx.ModelProto):
        return weight_bytes(model)
    try:
        inside = os.stat(model).st_size
        beside = weight_files(Path(model)) if inside < _LIGHT else ()
        return inside + sum(path.stat().st_size for path in beside if path.is_file())
    except (OSError, ValueError, TypeError):
        return 0


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _identity(path: Path) -> _Identity | None:
    """The identity that all names of an existing file share."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return None
    return about.st_dev, about.st_ino


def weight_files(model: Path) -> set[Path]:
    """Files beside a model that hold its tensors; none if it cannot be read (loading reports it)."""
    try:
        light = onnx.ModelProto.FromString(model.read_bytes())
    except Exception:  # loading reports any problem
        return set()
    return {
        model.parent / entry.value
        for tensor in tensors(light.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location" and entry.value
    }
