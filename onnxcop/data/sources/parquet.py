"""Images in Parquet files, as Hugging Face's data sets store them (extra `parquet`): a row group is read at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from onnxcop._base.lookup import Recent
from onnxcop._base.types import Array
from onnxcop.data.stores import ImageStore
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.reader import ImageReader

_HELD = 2  # row groups in memory


class ParquetImages(ImageStore):
    """The images of Parquet files, in the order of the files and of their rows.

    The images are files as bytes in a column of binary values, or of structs with a field `bytes`. Rows without an
    image are refused when they are read. Numbers from the length on are other views of the same images.

    Args:
        files: Parquet files with the same columns.
        spec: The model's only input.
        reader: How to read images.

    Raises:
        CalibrationError: pyarrow is missing, a file is damaged, or there is no column of images, or more than one.
    """

    def __init__(self, files: Sequence[Path], spec: InputSpec, reader: ImageReader) -> None:
        super().__init__((), spec, reader)
        self._files = files
        self._column = ""
        self._groups: list[tuple[int, int, int]] = []  # file, its row group, and the number of the file's first image
        rows: list[int] = []
        for number, path in enumerate(files):
            file = _opened(path)
            column = _image_column(path, file.schema_arrow)
            if self._column not in ("", column):
                raise CalibrationError(
                    f"{path}: its images are in the column '{column}', those of {files[0]} in '{self._column}'; give "
                    "files of one kind"
                )
            self._column = column
            first = sum(rows)
            for group in range(file.metadata.num_row_groups):
                self._groups.append((number, group, first))
                rows.append(file.metadata.row_group(group).num_rows)
        self._ends = list(accumulate(rows))
        self._begin()

    def _begin(self) -> None:
        self._held: Recent[int, Any] = Recent(_HELD)
        self._lock = threading.Lock()  # several threads decode images

    def __getstate__(self) -> dict[str, Any]:
        """Without rows in memory."""
        return {name: value for name, value in vars(self).items() if name not in ("_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def in_runs(self) -> bool:
        """As :attr:`Store.in_runs`: a row group holds many images."""
        return True

    def _pixels(self, place: int, view: int) -> tuple[Array, str]:
        group = bisect_right(self._ends, place)
        row = place - (self._ends[group - 1] if group else 0)
        number, _, first = self._groups[group]
        name = f"{self._files[number]}, row {place - first}"
        value = self._rows(group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise CalibrationError(f"{name}: it holds no image; remove the row, or store the image's bytes in it")
        return self._reader.from_bytes(data, name, f"{self._files[number].name} {name.rpartition(' ')[2]}", view), name

    def _rows(self, group: int) -> Any:
        """The images of a row group."""
        with self._lock:
            return self._held.get(group, lambda: self._read(group))

    def _read(self, group: int) -> Any:
        number, own, _ = self._groups[group]
        try:
            table = _opened(self._files[number]).read_row_group(own, columns=[self._column])
        except (OSError, ValueError) as error:  # of which pyarrow's errors are kinds
            raise _damaged(self._files[number], error) from None
        return table.column(self._column)


def _opened(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(f"{path}: Parquet files need pyarrow; install onnxcop[parquet]") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CalibrationError:
    lines = str(error).strip().splitlines()
    return CalibrationError(
        f"{path}: this Parquet file cannot be read ({lines[0] if lines else error}); write it again"
    )


def _image_column(path: Path, schema: Any) -> str:
    """The only column of a schema that may hold files of images."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found: list[str] = []
    for column in schema:
        fields = [column.type.field(place) for place in range(column.type.num_fields)]
        inner = types.is_struct(column.type) and any(one.name == "bytes" and holds_bytes(one.type) for one in fields)
        if inner or holds_bytes(column.type):
            found.append(column.name)
    if len(found) != 1:
        named = (
            f"several columns of bytes ({', '.join(found)})"
            if found
            else f"no column of bytes ({', '.join(schema.names)})"
        )
        raise CalibrationError(f"{path}: it has {named}; give a file with one column of images")
    return found[0]
