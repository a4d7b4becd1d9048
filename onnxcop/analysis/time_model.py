"""The time of a model as a function of the remaining units: the sum of its operators' times at their widths.

Times of operators are measured on a grid of widths (:mod:`onnxcop.analysis.operators`) and interpolated linearly; times
of convolutions are staircases. The sum leaves out operators without prunable widths, call overhead, and savings from
fusion. One share of the total accounts for all of these; it is fitted to timed whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcop._base.types import FloatArray, IntArray

_DOUBT, _TRUST = 0.03, 0.1  # standard deviations: of the measured time of one whole model, and of the share from 1
_LEAST_SHARE, _MOST_SHARE = 0.2, 1.3  # bounds of the share of the total time that the sum of operators represents


@dataclass(frozen=True, slots=True)
class TimedOperator:
    """Time of an operator by widths.

    Attributes:
        axes: Numbers of the axes that it depends on.
        levels: Timed widths of every axis, ascending.
        seconds: float64, one dimension per axis.
        block: Channels computed at once: larger widths are rounded up to the next multiple.
    """

    axes: tuple[int, ...]
    levels: tuple[IntArray, ...]
    seconds: FloatArray
    block: int = 1

    def at(self, widths: Sequence[int]) -> float:
        """Seconds at one width for every axis: a line below the narrowest level, and 0 where an axis is empty."""
        if 0 in widths:
            return 0.0
        values = self.seconds
        for levels, width in zip(self.levels, widths, strict=True):
            values = self._along(values, levels, width)
        return max(float(values), 0.0)

    def _along(self, values: FloatArray, levels: IntArray, width: int) -> FloatArray:
        padded = -(-width // self.block) * self.block if width > self.block else width
        place = min(padded, int(levels[-1])) if width < levels[-1] else width
        if len(levels) == 1:
            return np.asarray(values[0] * (place / levels[0]))
        right = int(np.clip(np.searchsorted(levels, place), 1, len(levels) - 1))
        low, high = levels[right - 1], levels[right]
        share = (place - low) / (high - low)
        if share < 0:  # noise must not make a narrower layer slower than all timed ones
            return np.asarray(values[0] + share * np.maximum(values[1] - values[0], 0.0))
        return np.asarray(values[right - 1] * (1 - share) + values[right] * share)


@dataclass(frozen=True, slots=True)
class CopiedOperator:
    """An operator with many widths, such as a Concat, with a time that is linear in the number of its elements.

    Attributes:
        axes: Numbers of the axes that it depends on.
        parts: Its operands: a factor, and positions in `axes` of the widths to multiply.
        base: Seconds without elements.
        each: Seconds per element.
    """

    axes: tuple[int, ...]
    parts: tuple[tuple[int, tuple[int, ...]], ...]
    base: float
    each: float

    def at(self, widths: Sequence[int]) -> float:
        """Seconds at one width for every axis."""
        elements = sum(factor * float(np.prod([widths[place] for place in places])) for factor, places in self.parts)
        return max(self.base + self.each * elements, 0.0)


@dataclass
class TimeModel:
    """Seconds of a run at any widths.

    Attributes:
        operators: All operators that depend on a width.
        sizes: int64 [axes], the original's.
        share: Share of the original's time that is proportional to their sum.
        timer: Times a whole model without some units beside the original, and returns the ratio.
    """

    operators: tuple[TimedOperator | CopiedOperator, ...]
    sizes: IntArray
    share: float = 1.0
    timer: Callable[[IntArray], float] | None = None
    by_axis: dict[int, tuple[int, ...]] = field(init=False)
    whole: float = field(init=False)
    _known: dict[tuple[int, ...], float] = field(init=False, default_factory=dict)
    _last: IntArray | None = field(init=False, default=None)
    _each: FloatArray = field(init=False, default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        found: dict[int, list[int]] = {}
        for number, operator in enumerate(self.operators):
            for axis in operator.axes:
                found.setdefault(axis, []).append(number)
        self.by_axis = {axis: tuple(numbers) for axis, numbers in found.items()}
        self.whole = self.seconds(self.sizes)

    def seconds(self, kept: IntArray) -> float:
        """The sum of the operators if axis a keeps `kept[a]` indices."""
        if self._last is None:
            self._last, self._each = kept.copy(), np.array([self._at(n, kept) for n in range(len(self.operators))])
        changed = np.flatnonzero(kept != self._last).tolist()
        for number in {number for axis in changed for number in self.by_axis.get(axis, ())}:
            self._each[number] = self._at(number, kept)
        self._last[changed] = kept[changed]
        return float(self._each.sum())

    def fraction(self, kept: IntArray) -> float:
        """Time of a whole run as a fraction of the original's."""
        return 1.0 - self.share * (1.0 - self.seconds(kept) / max(self.whole, 1e-30))

    def saving(self, kept: IntArray, axes: IntArray, times: IntArray, counts: IntArray) -> FloatArray:
        """Share of the whole time saved, float64 [counts], by removing so many units that lie `times` on `axes`."""
        touched = sorted({number for axis in axes.tolist() for number in self.by_axis.get(axis, ())})
        before = sum(self._at(number, kept) for number in touched)
        saved = np.empty(len(counts))
        for place, count in enumerate(counts.tolist()):
            after = kept.copy()
            after[axes] -= count * times
            saved[place] = before - sum(self._at(number, after) for number in touched)
        return np.asarray(self.share * saved / max(self.whole, 1e-30))

    def fit(self, cuts: Sequence[IntArray], ratios: Sequence[float]) -> None:
        """Fit the share to whole models that were timed beside the original.

        Regularized least squares with prior 1, because neither the sum nor a few whole models are exact.

        Args:
            cuts: Number of indices that each axis keeps, int64 [axes], for every model.
            ratios: Their times as fractions of the original's.
        """
        predicted = np.array([1.0 - self.seconds(kept) / max(self.whole, 1e-30) for kept in cuts])
        saved = 1.0 - np.asarray(ratios, dtype=np.float64)
        known = (_DOUBT / _TRUST) ** 2
        share = ((predicted * saved).sum() + known) / ((predicted**2).sum() + known)
        self.share = float(np.clip(share, _LEAST_SHARE, _MOST_SHARE))

    def _at(self, number: int, kept: IntArray) -> float:
        operator = self.operators[number]
        widths = tuple(int(kept[axis]) for axis in operator.axes)
        key = (number, *widths)
        seconds = self._known.get(key)
        if seconds is None:
            seconds = self._known[key] = operator.at(widths)
        return seconds
