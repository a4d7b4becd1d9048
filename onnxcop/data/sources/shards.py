"""Images in tar files, as WebDataset writes them: each is read from its place when it is needed."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from onnxcop._base.types import Array
from onnxcop.data.stores import ImageStore
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.reader import IMAGE_SUFFIXES, ImageReader


class ShardedImages(ImageStore):
    """The images of tar files, in the order of the files and of their members; other members are left out.

    Three numbers are kept of every image. Numbers from the length on are other views of the same images.

    Args:
        shards: Tar files that are not compressed.
        spec: The model's only input.
        reader: How to read images.

    Raises:
        CalibrationError: A file is compressed, damaged, or no tar file.
    """

    def __init__(self, shards: Sequence[Path], spec: InputSpec, reader: ImageReader) -> None:
        super().__init__((), spec, reader)
        self._shards = shards
        self._places = np.concatenate([_places_in(path, number) for number, path in enumerate(shards)])

    def __len__(self) -> int:
        return len(self._places)

    def _pixels(self, place: int, view: int) -> tuple[Array, str]:
        number, offset, size = (int(value) for value in self._places[place])
        with self._shards[number].open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        name = f"{self._shards[number]}, the image at byte {offset}"
        return self._reader.from_bytes(data, name, f"{self._shards[number].name} {offset}", view), name


def _places_in(path: Path, number: int) -> Array:
    """Shard, offset and size of every image in a tar file, int64 [images, 3]."""
    found = array("q")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else the archive keeps all of them
                if member.isfile() and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    found.extend((number, member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CalibrationError(
            f"{path}: this tar file cannot be read ({error}); it must not be compressed, and not be cut off"
        ) from None
    return np.array(found, np.int64).reshape(-1, 3)
