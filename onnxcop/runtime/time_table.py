"""Measured times of operators by what they compute: kept for this machine, or written on another one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcop._base.cache import remember, remembered
from onnxcop._base.files import write_atomically
from onnxcop.errors import EngineError
from onnxcop.runtime.kernel_times import CPU, kernel_times
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.session import EngineOptions, resolve_provider

log = logging.getLogger("onnxcop")

FORMAT, VERSION = "onnxcop-latency-table", 1
_TOGETHER = 24  # operators that are timed in one session

Progress = Callable[[str, int, int], None]
Bundle = Callable[[Sequence[str]], bytes]
"""A model that computes the operators of these keys, the first as number 0."""


@dataclass
class TimeTable:
    """Seconds of operators.

    Attributes:
        machine: Where they were timed.
        seconds: By key; None for an operator that does not run alone.
        source: The file, None for this machine's own table.
    """

    machine: Machine
    seconds: dict[str, float | None]
    source: Path | None = None

    @classmethod
    def here(cls, options: EngineOptions) -> TimeTable:
        """What is known of this machine."""
        machine = Machine.of(options)
        known = remembered("operators", machine.to_dict())
        return cls(machine, dict(known) if isinstance(known, dict) else {})

    @classmethod
    def load(cls, path: Path) -> TimeTable:
        """Read a table that was written by `onnxcop profile`, on this machine or another.

        Raises:
            EngineError: The file is missing, or no such table.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise EngineError(f"{path} is no latency table: it holds no valid JSON ({error})") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise EngineError(f"{path} is no latency table; make one with `onnxcop profile MODEL -o {path.name}`")
        if document.get("version") != VERSION:
            raise EngineError(
                f"{path} is a latency table of version {document.get('version')}, this release reads {VERSION}; "
                "make it again with `onnxcop profile`"
            )
        try:
            seconds = {str(key): None if one is None else float(one) for key, one in document["seconds"].items()}
            return cls(Machine(**document["machine"]), seconds, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{path} is a damaged latency table: {type(error).__name__} {error}") from None

    def save(self, path: Path) -> None:
        """Write the table, never half of it."""
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content."""
        document = {"format": FORMAT, "version": VERSION, "machine": self.machine.to_dict(), "seconds": self.seconds}
        return (json.dumps(document, indent=1) + "\n").encode()

    def complete(self, keys: Sequence[str], bundle: Bundle, options: EngineOptions, progress: Progress | None) -> None:
        """Time what is not known yet on this machine, and keep it.

        Args:
            keys: What will be looked up.
            bundle: Makes models of what is to be timed.
            options: How to run them.
            progress: Called with (stage, done, total).

        Raises:
            EngineError: The table is of a file, and lacks some.
        """
        missing = sorted({key for key in keys if key not in self.seconds})
        if not missing:
            return
        if self.source is not None:
            raise EngineError(
                f"{self.source} lacks {len(missing)} of {len(set(keys))} operators of this model, the first one "
                f"{missing[0].rsplit(' ', 1)[0]}: it was made of another model, or of other input sizes; "
                f"run `onnxcop profile` for this one"
            )
        together = _TOGETHER if resolve_provider(options.provider) == [CPU] else 1
        for start in range(0, len(missing), together):
            if progress is not None:
                progress("operators", start, len(missing))
            self._time(missing[start : start + together], bundle, options)
        remember("operators", self.machine.to_dict(), self.seconds)

    def _time(self, keys: Sequence[str], bundle: Bundle, options: EngineOptions) -> None:
        """Time some operators together; where one of them does not run, the others without it."""
        try:
            found = kernel_times(bundle(keys), resolve_provider(options.provider), options.threads)
        except Exception as error:
            if len(keys) == 1:
                log.debug("%s cannot be timed alone: %s", keys[0], error)
                self.seconds[keys[0]] = None
                return
            half = len(keys) // 2
            self._time(keys[:half], bundle, options)
            self._time(keys[half:], bundle, options)
            return
        self.seconds |= {key: found.get(place) for place, key in enumerate(keys)}
