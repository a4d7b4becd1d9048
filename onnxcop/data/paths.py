"""Calibration data in files and folders."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxcop._base.scripts import cause_of, importing_from
from onnxcop.data.arrays import NpyFile, NpzFile, TestDataFolder
from onnxcop.data.binding import Binder
from onnxcop.data.sources.parquet import ParquetImages
from onnxcop.data.sources.remote import is_url, store_from_url
from onnxcop.data.sources.shards import ShardedImages
from onnxcop.data.stores import ArrayStore, ImageStore, Store
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.reader import IMAGE_SUFFIXES

_SCRIPT = re.compile(r"(?P<path>.+\.py)(?::(?P<name>[^:/\\]+))?")
_ARCHIVES = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
DATA_SUFFIXES = {*IMAGE_SUFFIXES, ".npz", ".npy", ".pb", ".tar", ".parquet"}  # files to read from a folder of data
_FORMS = "images, .tar or .parquet files of images, .npz or .npy files, ONNX test data (input_0.pb), or a script (.py)"


_SHARDS = {".tar": ShardedImages, ".parquet": ParquetImages}


def store_from(text: str, binder: Binder) -> Store:
    """Open data at a path or a URL.

    Raises:
        CalibrationError: There are none, or they are of no known kind.
    """
    if is_url(text):
        return store_from_url(text, binder, store_from_path, lambda url: _image_input(url, binder))
    return store_from_path(Path(text), binder)


def store_from_path(path: Path, binder: Binder) -> Store:
    """Open a file or folder of images or arrays.

    Raises:
        CalibrationError: The path does not exist, or holds nothing of a known kind.
    """
    if path.is_dir():
        return _store_from_folder(path, binder)
    if not path.exists():
        raise CalibrationError(f"{path}: no such file or folder; give {_FORMS}")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return _images([path], path, binder)
    if suffix in (".npz", ".npy"):
        return ArrayStore([_array_file(path)], binder)
    if suffix == ".pb":
        raise CalibrationError(f"{path}: this is one tensor; give the folder that holds it")
    if suffix in _SHARDS:
        return _sharded([path], path, binder)
    if suffix in _ARCHIVES:
        raise CalibrationError(f"{path}: this is an archive; unpack it and give the folder")
    raise CalibrationError(f"{path}: data with the extension '{suffix}' are not known; give {_FORMS}")


def _store_from_folder(folder: Path, binder: Binder) -> Store:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    test_sets = sorted({path.parent for path in files if path.match("input_*.pb")})
    arrays = [path for path in files if path.suffix.lower() in (".npz", ".npy")]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    shards = {suffix: [path for path in files if path.suffix.lower() == suffix] for suffix in _SHARDS}
    if test_sets and not arrays and not images and not any(shards.values()):
        specs = binder.layout.specs
        return ArrayStore([TestDataFolder(part, specs) for part in test_sets], binder)
    if len([kind for kind in (test_sets, arrays, images, *shards.values()) if kind]) > 1:
        sharded = ", ".join(f"{len(found)} {suffix[1:]} files" for suffix, found in shards.items())
        raise CalibrationError(
            f"{folder}: it holds {len(images)} images, {len(arrays)} array files, {sharded} and "
            f"{len(test_sets)} sets of test data; give a folder of one kind"
        )
    for found in shards.values():
        if found:
            return _sharded(found, folder, binder)
    if arrays:
        return ArrayStore([_array_file(path) for path in arrays], binder)
    if images:
        return _images(images, folder, binder)
    kinds = ", ".join(sorted({path.suffix or path.name for path in files})[:5])
    contents = f"only {kinds}" if files else "no files"
    raise CalibrationError(f"{folder}: this folder holds {contents}; give {_FORMS}")


def _array_file(path: Path) -> NpzFile | NpyFile:
    return NpzFile(path) if path.suffix.lower() == ".npz" else NpyFile(path)


def _sharded(shards: list[Path], origin: Path, binder: Binder) -> ImageStore:
    spec = _image_input(origin, binder)
    return _SHARDS[shards[0].suffix.lower()](shards, spec, binder.reader(spec))


def _images(paths: list[Path], origin: Path, binder: Binder) -> ImageStore:
    spec = _image_input(origin, binder)
    return ImageStore(paths, spec, binder.reader(spec))


def _image_input(origin: Path | str, binder: Binder) -> InputSpec:
    specs = binder.layout.specs
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise CalibrationError(
            f"{origin}: images can feed a model of one input, but this one has {len(specs)} "
            f"({names}); give .npz files with an array for each"
        )
    return specs[0]


def script_of(text: str) -> Path | None:
    """The script that a `script.py:function` names; None if the text names none."""
    match = _SCRIPT.fullmatch(text)
    return None if match is None else Path(match["path"])


def file_of(data: str | os.PathLike[str]) -> Path:
    """The file or folder of data; the file of `script.py:function`."""
    return script_of(os.fspath(data)) or Path(data)


@contextlib.contextmanager
def script_data(text: str) -> Iterator[Any]:
    """Run a script's function, `script.py:load_data` by default, and return its result.

    The result is None if `text` names no script. Inside the context, modules in the script's folder can be imported.

    Raises:
        CalibrationError: There is no such script or function, or it fails.
    """
    match = _SCRIPT.fullmatch(text)
    if match is None:
        yield None
        return
    path, name = Path(match["path"]), match["name"] or "load_data"
    if not path.is_file():
        raise CalibrationError(f"{path}: no such script; give script.py or script.py:function")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    with importing_from(path.parent):
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
            function = getattr(module, name, None)
            if not callable(function):
                raise CalibrationError(
                    f"{path}: it has no function '{name}'; define one that returns or yields dicts "
                    f"of arrays by input name, or give {path.name}:function"
                )
            result = function()
            if result is None:
                raise CalibrationError(f"{path}: {name}() returned nothing; return an iterable")
            yield result
        except CalibrationError:
            raise
        except (Exception, SystemExit) as error:
            raise CalibrationError(f"{path}: {name}() failed: {cause_of(error)}") from error
