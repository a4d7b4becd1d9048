"""Timing in turns, so that other work of the machine disturbs all candidates equally.

The source of this module is part of the script that times a model on another device, so it needs only Python 3.8 and
NumPy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from onnxcop._base.types import FloatArray

ENOUGH = 0.003  # standard error of every ratio at which measuring stops early
_TURN = 0.002  # shortest time of a candidate within a turn, in seconds, so that the clock's own cost is negligible
_SLICES = 40  # slices of a turn that are timed one by one
_FEWEST, _MOST = 5, 1000  # turns
_LEAST_TIME = 0.25  # share of the time that is always spent
_RESOLUTION = 1e-6  # seconds that a clock must resolve
_TO_DEVIATION = 1.349  # quartiles of a normal distribution are this many deviations apart
_OF_MEDIAN = 1.2533  # standard error of a median over that of a mean


def clock_of(alone: bool) -> Callable[[], float]:
    """The clock to time with: the thread's own time if `alone`, that is if this thread does all the work.

    Thread time does not depend on other work of the machine. Work of several threads or another device needs the wall
    clock.
    """
    if alone and time.get_clock_info("thread_time").resolution <= _RESOLUTION:
        return time.thread_time
    return time.perf_counter


def take_turns(
    runs: Sequence[Callable[[], object]], seconds: float, clock: Callable[[], float], enough: float = ENOUGH
) -> FloatArray:
    """Seconds per run, float64 [turns, runs], in a random order that is reversed in the next turn.

    Args:
        runs: Functions to time; the others are compared with the first.
        seconds: Approximate time to measure, without warm-up; at least one turn is finished.
        clock: Returns the time in seconds.
        enough: Standard error of every ratio at which measuring ends early.
    """
    repeats = [_repeats(run, clock) for run in runs]
    rows: list[list[float]] = []
    rng, order = np.random.default_rng(0), np.arange(len(runs))
    start = clock()
    while len(rows) < _MOST:
        row = [0.0] * len(runs)
        order = order[::-1] if len(rows) % 2 else rng.permutation(len(runs))
        longer = 1 + rng.random()  # turns of equal length could run in step with another program
        for place in order.tolist():
            row[place] = _turn(runs[place], int(longer * repeats[place]), clock)
        rows.append(row)
        spent = clock() - start
        if spent >= seconds or (
            len(rows) >= _FEWEST and spent >= _LEAST_TIME * seconds and _settled(np.array(rows), enough)
        ):
            break
    return np.array(rows)


def ratio_of(seconds: FloatArray, place: int, original: int = 0) -> tuple[float, float]:
    """The median of the ratios within single turns, one candidate over another, and its standard error."""
    return median_of(seconds[:, place] / seconds[:, original])


def median_of(values: FloatArray) -> tuple[float, float]:
    """The median, and its standard error from the quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float((high - low) / _TO_DEVIATION * _OF_MEDIAN / np.sqrt(len(values)))


def _turn(run: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Seconds of one of several runs in a row: the median over slices, because another program may interrupt some."""
    slices = min(count, _SLICES)
    durations, done = [], 0
    for place in range(slices):
        end = count * (place + 1) // slices
        began = clock()
        for _ in range(end - done):
            run()
        durations.append(max(clock() - began, 1e-9) / (end - done))
        done = end
    return float(np.median(durations))


def _settled(seconds: FloatArray, enough: float) -> bool:
    return all(ratio_of(seconds, place)[1] < enough for place in range(1, seconds.shape[1]))


def _repeats(run: Callable[[], object], clock: Callable[[], float]) -> int:
    """Warm up, and return how many runs fill a turn."""
    run()  # the first run allocates and tunes
    began = clock()
    run()
    once = max(clock() - began, 1e-9)
    return max(1, math.ceil(_TURN / once))
