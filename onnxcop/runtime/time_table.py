"""Measured times of operators by what they compute, kept for this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxcop._base.cache import remember, remembered
from onnxcop._base.progress import Progress
from onnxcop.runtime.kernel_times import CPU, kernel_times
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.session import EngineOptions, resolve_provider

log = logging.getLogger("onnxcop")

_TOGETHER = 24  # operators that are timed in one session

Bundle = Callable[[Sequence[str]], bytes]
"""A model that computes the operators of these keys, the first as number 0."""


@dataclass
class TimeTable:
    """Seconds of operators.

    Attributes:
        machine: Where they were timed.
        seconds: By key; None for an operator that does not run alone.
    """

    machine: Machine
    seconds: dict[str, float | None]

    @classmethod
    def here(cls, options: EngineOptions) -> TimeTable:
        """What is known of this machine."""
        machine = Machine.of(options)
        known = remembered("operators", machine.to_dict())
        return cls(machine, dict(known) if isinstance(known, dict) else {})

    def complete(self, keys: Sequence[str], bundle: Bundle, options: EngineOptions, progress: Progress) -> None:
        """Time what is not known yet on this machine, and keep it.

        Args:
            keys: What will be looked up.
            bundle: Makes models of what is to be timed.
            options: How to run them.
            progress: Called with (stage, done, total).
        """
        missing = sorted({key for key in keys if key not in self.seconds})
        if not missing:
            return
        together = _TOGETHER if resolve_provider(options.provider) == [CPU] else 1
        for start in range(0, len(missing), together):
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
