"""The journal of a family: what is done, one line a job, complete whenever the run is stopped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from onnxcop.errors import ModelError
from onnxcop.pipeline.family.jobs import JobRecord

_FORMAT = "onnxcop-journal"


class Journal:
    """Finished jobs in a file that only grows.

    A line is written in one piece and is on the disk before :meth:`add` returns. A line that a stopped run left
    unfinished is cut off.

    Args:
        path: The file; it is made if it does not exist.

    Attributes:
        done: Finished jobs, by key.

    Raises:
        ModelError: The file cannot be written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.done: dict[str, JobRecord] = {}
        self._path = path
        self._lock = threading.Lock()
        self._known = {field.name for field in fields(JobRecord)}
        try:
            whole = self._read()
            with path.open("r+b" if path.exists() else "wb") as file:
                file.truncate(whole)
        except OSError as error:
            raise ModelError(f"{path} cannot be written: {error.strerror or error}; choose another -o") from None
        if not whole:
            self._append({"format": _FORMAT, "version": 1})

    def _read(self) -> int:
        """Read finished jobs; returns the bytes of whole lines."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines()):
            try:
                entry = json.loads(line)
                if number == 0 and entry.get("format") != _FORMAT:
                    raise ValueError("its first line is not that of a journal")
                if number:
                    self.done[entry["job"]] = JobRecord(**{name: entry[name] for name in self._known})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(
                    f"{self._path} line {number + 1} is not from a journal ({error}); delete the file, or choose "
                    "another -o"
                ) from None
        return whole

    def add(self, record: JobRecord) -> bool:
        """Write a finished job down; returns whether it is new."""
        with self._lock:
            if record.job in self.done:
                return False
            self._append(asdict(record))
            self.done[record.job] = record
            return True

    def forget_failures(self, jobs: Collection[str]) -> None:
        """Let jobs that failed be tried again."""
        for key in [key for key, record in self.done.items() if key in jobs and record.error]:
            del self.done[key]

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
