"""Temporary folders: each process has one, locked while it lives, and sweeps those that dead processes left."""

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

if sys.platform != "win32":  # there, files in use cannot be removed anyway, and nothing is swept
    import fcntl

log = logging.getLogger("onnxcop")

_PREFIX = "onnxcop-"
_LOCK = ".onnxcop-lock"  # in every folder made here; the kernel frees the lock when the process ends, however it does
_YOUNG = 60.0  # seconds; a younger folder may belong to a process that has yet to lock it

_folders: dict[int, Path] = {}  # by the process that made it: one that was forked makes its own


def scratch_folder(owner: object) -> tuple[Path, weakref.finalize[..., object]]:
    """A temporary folder that lives as long as `owner`, and the call that removes it sooner."""
    folder = Path(tempfile.mkdtemp(dir=_process_folder()))
    return folder, weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder that lives as long as the block."""
    folder = Path(tempfile.mkdtemp(dir=_process_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _process_folder() -> Path:
    """The folder of this process, made when it is first asked for."""
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

    Only folders of this user that hold a lock file of this module, and whose lock nobody holds: a process
    that lives holds its lock, in another container too.

    Returns:
        How many were removed.
    """
    if sys.platform == "win32":
        return 0
    found = [folder for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if _abandoned(folder)]
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
        log.debug("removed %s, which a stopped run left", folder)
    return len(found)


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
    except OSError:  # held: its process lives
        return False
    finally:
        os.close(handle)
    return True
