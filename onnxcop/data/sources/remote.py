"""Calibration data at a URL, through fsspec (extra `remote`): `s3://…`, `gs://…`, `https://…`, `file://…`.

Images are read one by one when they are needed. Files of arrays, tar files and Parquet files are copied to a temporary
folder of this machine; workers on other machines make copies of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from onnxcop._base.scratch import scratch_folder
from onnxcop._base.types import Array
from onnxcop.data.binding import Binder
from onnxcop.data.stores import ImageStore, Store
from onnxcop.errors import CalibrationError
from onnxcop.graph.input_spec import InputSpec
from onnxcop.images.reader import IMAGE_SUFFIXES, ImageReader

_URL = re.compile(r"[a-z][a-z0-9+.-]+://.+", re.IGNORECASE)
COPIED = (".npz", ".npy", ".tar", ".parquet")

Opener = Callable[[Path, Binder], Store]


def is_url(text: str) -> bool:
    """Whether a text is a URL and no path."""
    return _URL.fullmatch(text) is not None


class RemoteImages(ImageStore):
    """Images at a URL, each read when it is needed.

    Args:
        system: A file system of fsspec.
        names: The files in it.
        spec: The model's only input.
        reader: How to read images.
    """

    def __init__(self, system: Any, names: Sequence[str], spec: InputSpec, reader: ImageReader) -> None:
        super().__init__((), spec, reader)
        self._system, self._names = system, names

    def __len__(self) -> int:
        return len(self._names)

    def _pixels(self, place: int, view: int) -> tuple[Array, str]:
        name = self._names[place]
        try:
            data = self._system.cat_file(name)
        except Exception as error:  # file systems raise errors of their own
            raise CalibrationError(f"{name}: it cannot be read ({type(error).__name__}: {error})") from error
        return self._reader.from_bytes(data, name, PurePosixPath(name).name, view), name


@dataclass(eq=False)
class _Copied:
    """Files at a URL that are copied to a temporary folder, which lasts as long as this object.

    Attributes:
        system: A file system of fsspec.
        names: The files in it.
        binder: Binds arrays to the model's inputs.
        open_path: Opens the folder.
        folder: The folder; in another process that of the first one, which may be on another machine.
    """

    system: Any
    names: tuple[str, ...]
    binder: Binder
    open_path: Opener
    folder: Path | None = None

    def store(self) -> Store:
        """The samples, from the folder if it is there, else from a copy."""
        copies = self if self.folder is not None and self.folder.is_dir() else self._copied()
        assert copies.folder is not None
        store = self.open_path(copies.folder, self.binder)
        vars(store)["copies"] = copies
        return store

    def reopened(self) -> tuple[Any, ...]:
        """As :meth:`onnxcop.data.stores.Copies.reopened`."""
        return _Copied.store, (self,)

    def _copied(self) -> _Copied:
        owner = replace(self)
        owner.folder, _ = scratch_folder(owner)
        for number, name in enumerate(self.names):
            try:
                self.system.get_file(name, str(owner.folder / f"{number:06d}-{PurePosixPath(name).name}"))
            except Exception as error:  # file systems raise errors of their own
                raise CalibrationError(f"{name}: it cannot be read ({type(error).__name__}: {error})") from error
        return owner


def store_from_url(url: str, binder: Binder, open_path: Opener, image_input: Callable[[str], InputSpec]) -> Store:
    """Open a file or folder at a URL.

    Args:
        url: The URL.
        binder: Binds arrays to the model's inputs.
        open_path: Opens a folder on this machine.
        image_input: The model's only input, or an error that names the data.

    Raises:
        CalibrationError: fsspec or the package of a protocol is missing, nothing is there, or it is of no known kind.
    """
    system, names = _listed(url)
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    others = [name for name in names if PurePosixPath(name).suffix.lower() in COPIED]
    if images and others:
        raise CalibrationError(f"{url}: it holds {len(images)} images and {len(others)} other files; give one kind")
    if images:
        spec = image_input(url)
        return RemoteImages(system, images, spec, binder.reader(spec))
    if others:
        return _Copied(system, tuple(others), binder, open_path).store()
    raise CalibrationError(f"{url}: it holds no images and no {', '.join(COPIED)} files; check the URL")


def _listed(url: str) -> tuple[Any, list[str]]:
    """A file system, and its files at a URL, sorted."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise CalibrationError(f"{url}: URLs need fsspec; install onnxcop[remote]") from None
    try:
        system, root = url_to_fs(url)
        found = sorted(system.find(root)) if system.isdir(root) else [root] if system.exists(root) else []
    except ImportError as error:
        raise CalibrationError(f"{url}: this protocol needs a package ({error})") from None
    except Exception as error:  # file systems raise errors of their own
        raise CalibrationError(
            f"{url}: it cannot be listed ({type(error).__name__}: {error}); check the URL"
        ) from error
    names = [
        name for name in found if not any(part.startswith(".") for part in PurePosixPath(name).parts if part != "/")
    ]
    if not names:
        raise CalibrationError(f"{url}: nothing is there; check the URL")
    return system, names
