"""Measured times of operators, kept for this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from onnxcop._base.cache import remember, remembered
from onnxcop._base.progress import Progress
from onnxcop.runtime.kernel_times import CPU, TOGETHER, kernel_times, times_of
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.session import EngineOptions, providers_of

Bundle = Callable[[Sequence[str]], bytes]
"""A model that computes the operators of these keys, the first as number 0."""


@dataclass
class TimeTable:
    """Seconds of operators.

    Attributes:
        machine: The machine that they were timed on.
        seconds: By key; None for an operator that does not run alone.
    """

    machine: Machine
    seconds: dict[str, float | None]

    @classmethod
    def here(cls, options: EngineOptions) -> TimeTable:
        """The times known of this machine."""
        machine = Machine.of(options)
        known = remembered("kernels", machine.to_dict())
        return cls(machine, dict(known) if isinstance(known, dict) else {})

    def complete(self, keys: Sequence[str], bundle: Bundle, options: EngineOptions, progress: Progress) -> None:
        """Time the operators that are not known yet on this machine, and keep the result.

        Args:
            keys: Keys that will be looked up.
            bundle: Builds models of the operators to time.
            options: How to run them.
            progress: Called with (stage, done, total).
        """
        missing = sorted({key for key in keys if key not in self.seconds})
        if not missing:
            return
        providers = providers_of(options)

        def timed(part: Sequence[str]) -> dict[str, float]:
            times = kernel_times(bundle(part), providers, options.threads)
            return {key: times[place] for place, key in enumerate(part) if place in times}

        together = TOGETHER if self.machine.provider == CPU else 1
        self.seconds |= times_of(missing, timed, together, partial(progress, "operators"))
        remember("kernels", self.machine.to_dict(), self.seconds)
