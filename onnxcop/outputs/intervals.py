"""Uncertainty of a figure that was measured on a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import FloatArray

_LEVEL = 0.975  # quantile on either side of a 95 % interval
_EVEN = 1e-6  # skewness of a mean that changes no interval
_MOST_SKEWED = 0.35  # above it, the transformation widens intervals more than it corrects them
_NORMAL = 1.959963984540054  # deviations of the normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: The measured figure.
        low: Lower end; None if there are too few samples (or values that are not finite).
        high: Upper end, as `low`.
        samples: Number of samples.
    """

    value: float
    low: float | None
    high: float | None
    samples: int

    def percent(self) -> str:
        """A share in words: "94 % (95 % interval 71 to 99, n = 17)"."""
        low, high = (None if end is None else f"{100 * end:.3g}" for end in (self.low, self.high))
        return f"{100 * self.value:.3g} % ({_within(low, high)}n = {self.samples})"

    def number(self) -> str:
        """A number in words: "0.139 (95 % interval 0.121 to 0.16, n = 64)"."""
        low, high = (None if end is None else f"{end:.3g}" for end in (self.low, self.high))
        return f"{self.value:.4g} ({_within(low, high)}n = {self.samples})"


def _within(low: str | None, high: str | None) -> str:
    return "" if low is None or high is None else f"95 % interval {low} to {high}, "


def standard_error(without_one: FloatArray) -> float:
    """Standard error of a figure from its values without each one of the samples: the jackknife (Tukey 1958).

    Args:
        without_one: float64 [samples].
    """
    count = len(without_one)
    return float(np.sqrt((count - 1) / count * ((without_one - without_one.mean()) ** 2).sum()))


def _ends(value: float, without_one: FloatArray) -> tuple[float, float]:
    """The 95 % interval of a figure to which samples contribute unevenly.

    A t interval with the jackknife's error; the cubic transformation that removes the skewness moves its ends (Hall
    1992, On the removal of skewness by transformation). Without it, a few large errors among
    hundreds of small ones are missing from most draws, and the interval lies too low.

    Args:
        value: The figure on all samples.
        without_one: float64 [samples], at least two.
    """
    from scipy.special import stdtrit

    count = len(without_one)
    error, reach = standard_error(without_one), float(stdtrit(count - 1, _LEVEL))
    influence = without_one.mean() - without_one
    spread = float(np.sqrt((influence**2).mean()))
    skewness = 0.0 if spread == 0 else float((influence**3).mean()) / spread**3 / math.sqrt(count)
    skewness = min(max(skewness, -_MOST_SKEWED), _MOST_SKEWED)
    if abs(skewness) < _EVEN:
        return value - reach * error, value + reach * error
    moved = (3 / skewness * float(np.cbrt(1 + skewness * (end - skewness / 6)) - 1) for end in (reach, -reach))
    low, high = (value - error * end for end in moved)
    return min(low, high, value), max(low, high, value)


def of_distance(value: float, without_one: FloatArray, samples: int) -> Estimate:
    """The interval of a distance, which is never negative: on the logarithmic scale.

    Args:
        value: Measured on all samples.
        without_one: float64 [samples], measured without each of them, or without each batch if samples cannot be
            separated.
        samples: Number of samples.
    """
    if value == 0 and not without_one.any():
        return Estimate(value, 0.0 if len(without_one) > 1 else None, 0.0 if len(without_one) > 1 else None, samples)
    if len(without_one) < 2 or not (math.isfinite(value) and np.isfinite(without_one).all()):
        return Estimate(value, None, None, samples)
    if value > 0 and (without_one > 0).all():
        low, high = _ends(math.log(value), np.log(without_one))
        return Estimate(value, math.exp(low), math.exp(min(high, 700.0)), samples)
    low, high = _ends(value, without_one)
    return Estimate(value, max(low, 0.0), high, samples)


def of_share(hits: FloatArray, samples: int) -> Estimate:
    """The interval of a share: Wilson's (1927), with an effective number of cases from the spread between samples.

    Args:
        hits: float64 [samples, 2], agreeing and total cases; not all totals are 0.
        samples: Number of samples.
    """
    agreeing, total = hits.sum(axis=0)
    share = float(agreeing / total)
    counted = hits[hits[:, 1] > 0]
    if len(counted) < 2:
        return Estimate(share, None, None, samples)
    cases = float(len(counted))
    if 0 < share < 1:
        rest = np.array([agreeing, total]) - counted
        error = standard_error(rest[:, 0] / rest[:, 1])
        cases = min(share * (1 - share) / error**2, float(total)) if error > 0 else float(total)
    spread = _NORMAL**2 / cases
    centre = (share + spread / 2) / (1 + spread)
    reach = math.sqrt(spread) / (1 + spread) * math.sqrt(share * (1 - share) + spread / 4)
    low, high = max(centre - reach, 0.0), min(centre + reach, 1.0)
    return Estimate(share, min(low, share), max(high, share), samples)  # rounding could exceed the range


def of_mean(hits: FloatArray, samples: int) -> Estimate:
    """The interval of a mean of numbers of at most 1, such as cosines: that of their distance from 1."""
    values = 1.0 - hits[:, 0] / hits[:, 1]
    count = len(values)
    rest = (values.sum() - values) / max(count - 1, 1)
    distance = of_distance(max(float(values.mean()), 0.0), np.maximum(rest, 0.0), samples)
    low, high = (None if end is None else 1.0 - end for end in (distance.high, distance.low))
    return Estimate(1.0 - distance.value, None if low is None else max(low, -1.0), high, samples)
