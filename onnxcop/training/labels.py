"""Labels of samples: folders by class, arrays, files, scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    total = _needed(source)
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


class LabelledStream:
    """Samples of a stream on their way, whose labels stay behind.

    Args:
        items: Feeds with an array named `labels`, `label`, `targets`, `target` or `y`; or pairs of a feed and labels;
            or tuples with the labels behind the inputs. An item is a sample or a batch.
        inputs: Names of the model's inputs.
        most: How many samples to read; None for all.
        origin: Where they come from, for messages.

    Attributes:
        found: The labels of every item that was read.
    """

    def __init__(self, items: Iterable[Any], inputs: Sequence[str], most: int | None, origin: str) -> None:
        self.found: list[Array] = []
        self._items, self._inputs, self._most, self._origin = items, tuple(inputs), most, origin

    def __iter__(self) -> Iterator[Any]:
        read = 0
        for number, item in enumerate(self._items):
            feed, labels = _apart(item, self._inputs)
            if labels is None:
                raise CalibrationError(
                    f"item {number} of {self._origin} has no labels; yield dicts with an array 'labels', or pairs of "
                    "inputs and labels"
                )
            self.found.append(np.asarray(labels))
            yield feed
            read += max(np.size(labels) if np.ndim(labels) < 2 else len(labels), 1)
            if self._most is not None and read >= self._most:
                return

    def array(self, source: CalibrationData) -> Array:
        """The labels of all samples, in the order of the stream."""
        joined = _joined(iter(self.found))
        if len(joined) != _needed(source) == len(self.found):  # each is a target of several numbers
            return np.stack(self.found)
        return joined


def _apart(item: Any, inputs: Sequence[str]) -> tuple[Any, Any]:
    """An item without its labels, and the labels; None if it has none."""
    if isinstance(item, Mapping):
        name = next((name for name in USUAL if name in item and name not in inputs), None)
        return {key: value for key, value in item.items() if key != name}, None if name is None else item[name]
    if isinstance(item, list | tuple):
        if len(item) == 2 and isinstance(item[0], Mapping):
            return item[0], item[1]
        if len(item) > len(inputs):
            return item[: len(inputs)], item[len(inputs)]
    return item, None


@contextmanager
def labelled(data: Any, inputs: Sequence[str], labels: Any, most: int | None) -> Iterator[tuple[Any, Any]]:
    """The data and, if they are a stream that brings its labels with it, the stream that collects them.

    Args:
        data: As :func:`onnxcop.data.open.open_source` takes them.
        inputs: Names of the model's inputs.
        labels: As the user gives them; only without them a stream brings its own.
        most: How many samples to read; None for all.
    """
    if labels is not None:
        yield data, None
        return
    text = os.fspath(data) if isinstance(data, str | os.PathLike) else ""
    with script_data(text) as result:
        given = data if result is None else result
        if callable(given) and not isinstance(given, Iterable):
            given = given()
        plain = isinstance(given, str | os.PathLike | Mapping | CalibrationData) or hasattr(given, "__array__")
        if plain or not isinstance(given, Iterable):
            yield given, None
            return
        stream = LabelledStream(given, inputs, most, text or f"a {type(given).__name__}")
        yield stream, stream


def _needed(source: CalibrationData) -> int:
    """The least number of labels for a source: one for each of its samples up to the last that was chosen."""
    return int(source.numbers.max(initial=-1)) + 1


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
                return _joined(result)
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


def _joined(result: Any) -> Array:
    """An array, or the arrays of a generator one after the other."""
    if isinstance(result, Iterator):
        parts = [np.atleast_1d(part) for part in result]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
    return np.asarray(result)


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
