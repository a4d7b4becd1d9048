"""Temporary folders: each process has one, locked while it runs, and removes those of dead processes."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":  # on such systems files in use cannot be removed, and nothing is cleaned up
    import fcntl

log = logging.getLogger("onnxcop")

_PREFIX = "onnxcop-"
_LOCK = ".onnxcop-lock"  # in every folder made here; the kernel releases the lock when the process ends, in any way
_YOUNG = 60.0  # seconds; a younger folder may belong to a process that has not locked it yet

_folders: dict[int, Path] = {}  # by process: a forked process makes its own


def scratch_folder(owner: object) -> tuple[Path, weakref.finalize[..., object]]:
    """A temporary folder that exists as long as `owner`, and a function that removes it sooner."""
    folder = Path(tempfile.mkdtemp(dir=_process_folder()))
    return folder, weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder that exists as long as the block."""
    folder = Path(tempfile.mkdtemp(dir=_process_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _process_folder() -> Path:
    """The folder of this process, made on first use."""
    own = os.getpid()
    if own not in _folders or not _folders[own].is_dir():
        remove_leftovers()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX)
        _folders[own] = folder
        atexit.register(_remove, own, folder, handle)
    return _folders[own]


def _remove(maker: int, folder: Path, handle: int) -> None:
    if os.getpid() == maker:
        with contextlib.suppress(OSError):
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> int:
    """Remove temporary folders of processes that were killed.

    Only folders of this user are removed that contain a lock file of this module which nobody has locked. A running
    process holds its lock, even in another container.

    Returns:
        How many were removed.
    """
    if sys.platform == "win32":
        return 0
    leftovers = [folder for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if _abandoned(folder)]
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
        log.debug("removed %s, which a stopped run left", folder)
    return len(leftovers)


def _abandoned(folder: Path) -> bool:
    if sys.platform == "win32":
        return False
    lock = folder / _LOCK
    try:
        about = os.lstat(folder)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            return False
        handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if time.time() - os.fstat(handle).st_mtime < _YOUNG:
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked: its process is running
        return False
    finally:
        os.close(handle)
    return True
