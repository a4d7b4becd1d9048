"""Labels of samples: folders by class, arrays, files, scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxcop._base.types import Array
from onnxcop.data.dataset import CalibrationData
from onnxcop.data.paths import script_data
from onnxcop.errors import CalibrationError

USUAL = ("labels", "label", "targets", "target", "y")  # names of arrays of labels


def labels_of(source: CalibrationData, data: Any, labels: Any = None) -> Array:
    """The label of every sample of a source.

    Args:
        source: The opened data.
        data: The data as given by the user.
        labels: An array, a .npy or .npz file, the name of an array in the data's .npz file or mapping,
            `script.py:function`, or None: images are then labelled by the folders that they are in, and arrays by one
            named `labels`, `label`, `targets`, `target` or `y`.

    Returns:
        Labels of all samples, in the order of the source: int64 [samples] of classes, or floating-point targets.

    Raises:
        CalibrationError: There are no labels, or a different number than samples.
    """
    values = _by_folder(source) if labels is None and source.files else _array(data, labels)
    total = int(source.numbers.max(initial=-1)) + 1
    if values.ndim == 0 or len(values) < total:
        raise CalibrationError(
            f"there are {values.shape[0] if values.ndim else 1} labels for {total} samples; give one each"
        )
    chosen = values[source.numbers]
    if chosen.dtype.kind in "iub":
        return np.asarray(chosen.astype(np.int64))
    if chosen.dtype.kind == "f":
        return np.asarray(chosen.astype(np.float32))
    raise CalibrationError(
        f"labels are of type {chosen.dtype}; give whole numbers of classes or floating-point targets"
    )


def _by_folder(source: CalibrationData) -> Array:
    names = sorted({path.parent.name for path in source.files})
    if len(names) < 2:
        raise CalibrationError("all images are in one folder; put those of each class into its own, or give --labels")
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[path.parent.name] for path in source.files], np.int64)


def _array(data: Any, labels: Any) -> Array:
    if labels is not None and not isinstance(labels, str | os.PathLike):
        return np.asarray(labels)
    names = USUAL if labels is None else (os.fspath(labels),)
    if labels is not None:
        text = os.fspath(labels)
        with script_data(text) as result:
            if result is not None:
                return np.asarray(result)
        if Path(text).suffix in (".npy", ".npz"):
            return _from_file(Path(text), USUAL)
    if isinstance(data, Mapping):
        return _named(data, names, "the data")
    if isinstance(data, str | os.PathLike) and Path(data).suffix == ".npz":
        return _from_file(Path(data), names)
    raise CalibrationError(
        "there are no labels: give --labels FILE.npy, --labels NAME of an array in the data's .npz file, or images in "
        "a folder for each class"
    )


def _from_file(path: Path, names: tuple[str, ...]) -> Array:
    try:
        file = np.load(path)
        with file if hasattr(file, "files") else _Whole(file) as arrays:
            if isinstance(arrays, np.ndarray):
                return arrays
            only = tuple(arrays.files) if len(arrays.files) == 1 else ()
            return _named(arrays, names + only, str(path))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: labels cannot be read ({error})") from None


class _Whole:
    """An array as what `with` takes."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __enter__(self) -> Array:
        return self._array

    def __exit__(self, *_: object) -> None:
        return None


def _named(arrays: Mapping[str, Any], names: tuple[str, ...], where: str) -> Array:
    for name in names:
        if name in arrays:
            return np.asarray(arrays[name])
    raise CalibrationError(
        f"{where} holds {', '.join(arrays)}, but no {' or '.join(names)}; name the labels with --labels"
    )
