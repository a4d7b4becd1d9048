"""Length of training, and the learning rate of each step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from onnxcop.errors import CalibrationError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True, slots=True)
class Effort:
    """Length of training: a time or a number of epochs; of both, whichever ends first.

    Attributes:
        seconds: Wall time.
        epochs: Passes over the samples.
    """

    seconds: float | None = None
    epochs: float | None = None

    @classmethod
    def of(cls, text: str) -> Effort:
        """Read `90s`, `5m`, `1h`, `20 epochs`, or `auto`.

        Raises:
            CalibrationError: It is none of these.
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|h|epochs?)\s*", text.lower())
        if text.strip().lower() == "auto":
            return AUTO
        if match is None or float(match[1]) <= 0:
            raise CalibrationError(f"{text!r} is not a training length; give a time (90s, 5m, 1h), '20 epochs' or auto")
        if match[2].startswith("epoch"):
            return cls(epochs=float(match[1]))
        return cls(seconds=float(match[1]) * _UNITS[match[2]])


AUTO = Effort(epochs=20.0)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, then a cosine to zero (Loshchilov and Hutter 2017, eq. 5).

    Attributes:
        rate: The highest learning rate.
        steps: Number of steps.
    """

    rate: float
    steps: int

    def at(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))
