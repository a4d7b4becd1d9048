"""Atomic writes: files are written beside their destination and then renamed, all or none."""

from __future__ import annotations

import contextlib
import lzma
import os
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from onnxcop.errors import ModelError

# Raised by numpy, zipfile and json on a file that is damaged or of another kind.
DAMAGE = (
    OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
    RuntimeError, MemoryError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error,
    lzma.LZMAError,
)  # fmt: skip


def check_target(path: Path) -> None:
    """Refuse an output path that cannot be written, before any work is done.

    Raises:
        ModelError: The folder does not exist or is not writable, or the path is a folder or a device.
    """
    folder = path.parent
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give a file name for the result")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path} is not a regular file; give a file name for the result")
    if not folder.is_dir():
        raise ModelError(f"the output folder {folder} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):  # for some folders only an attempt shows it
            pass
    except OSError as error:
        raise ModelError(f"the output folder {folder} is not writable ({_cause(error)}); choose another") from None


class Writing:
    """Files that move to their destinations together if the block succeeds.

    Until then, and if the block fails or is interrupted, the old files stay as they are and the new ones are removed.
    """

    def __init__(self) -> None:
        self._staged: list[tuple[Path, Path]] = []
        self._afterwards: list[Callable[[], None]] = []

    def add(self, path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
        """Write a file beside its destination.

        Args:
            path: The destination.
            content: Its bytes, or a function that writes them.

        Raises:
            ModelError: The folder is missing or not writable, or the disk is full.
        """
        check_target(path)
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise ModelError(f"{path.parent} is not writable: {_cause(error)}") from None
        self._staged.append((Path(name), path))
        try:
            with os.fdopen(handle, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
            os.chmod(name, mode)
        except OSError as error:
            raise _failed(path, error) from None

    def then(self, call: Callable[[], None]) -> None:
        """Call a function once all files are at their destinations."""
        self._afterwards.append(call)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
                for call in self._afterwards:
                    call()
        finally:
            for temporary, _path in self._staged:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def _commit(self) -> None:
        new: list[Path] = []
        for temporary, path in self._staged:
            fresh = not path.exists()
            try:
                temporary.replace(path)
            except OSError as error:
                for earlier in new:  # they belong to a file that could not be moved to its destination
                    with contextlib.suppress(OSError):
                        earlier.unlink()
                raise _failed(path, error) from None
            if fresh:
                new.append(path)
        self._staged.clear()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: the destination never holds a part of it.

    Raises:
        ModelError: The folder is missing or not writable, or the disk is full.
    """
    with Writing() as files:
        files.add(path, data)


def _failed(path: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{path} could not be written: {_cause(error)}; make room or choose another folder "
        "(what was there before is untouched)"
    )


def _cause(error: OSError) -> str:
    return error.strerror or str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
