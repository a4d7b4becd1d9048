"""How long models take, measured side by side in ONNX Runtime on this machine.

A machine that does other work speeds up and slows down from one second to the next, by more than
pruning saves. So the models take turns, in a random order that is turned round the next time, and what is
compared is what was measured within one turn; the medians over all turns say how long each takes. Where
several runs fill a turn, the median of its slices counts: a run that another program stops takes a hundred
times as long as its neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxcop._base.types import Array, Feed, FloatArray
from onnxcop.errors import EngineError, ModelError
from onnxcop.graph.shapes import Shape
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.providers import CPU, CUDA, resolve_provider
from onnxcop.runtime.session import EngineOptions, Session

log = logging.getLogger("onnxcop")

DEFAULT_SECONDS = 2.0
_TURN = 0.002  # seconds a model runs for at least within a turn, so that the clock's own cost is nothing
_SLICES = 40  # of a turn, that are timed one by one
_FEWEST, _MOST = 5, 1000  # turns
ENOUGH = 0.003  # standard error of every ratio at which measuring stops early
_LEAST_TIME = 0.25  # share of the time that is spent in any case
_RESOLUTION = 1e-6  # seconds that a clock must tell apart
_SURE = 2.0  # standard errors on either side, for an interval that holds the ratio in 19 of 20 cases
_TO_DEVIATION = 1.349  # quartiles of a normal distribution lie this many deviations apart
_OF_MEDIAN = 1.2533  # standard error of a median over that of a mean

# The threads of one session go on spinning for a while after a run, and would slow the next one down.
_CONFIG = {"session.force_spinning_stop": "1"}
# What ONNX Runtime does if nobody says otherwise: the rest of the package asks for full precision.
_AS_DEPLOYED = {CUDA: (("use_tf32", "1"), ("cudnn_conv_algo_search", "EXHAUSTIVE"))}


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one run of a model takes.

    Attributes:
        median: Seconds.
        low: Lower quartile.
        high: Upper quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        scale, unit = next((entry for entry in ((1.0, "s"), (1e3, "ms")) if self.median * entry[0] >= 1), (1e6, "µs"))
        value, spread = self.median * scale, (self.high - self.low) / 2 * scale
        digits = 2 if value < 10 else 1 if value < 100 else 0
        return f"{value:.{digits}f} {unit} ±{spread:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Latency:
    """A model beside the original.

    Attributes:
        before: The original.
        after: The other model.
        ratio: Median of the ratios within single turns, other over original: robust where a quotient of
            medians is not.
        error: Standard error of that median.
        turns: How often both were measured.
        provider: The first execution provider in use.
    """

    before: Timing
    after: Timing
    ratio: float
    error: float
    turns: int
    provider: str

    @property
    def interval(self) -> tuple[float, float]:
        """What holds the ratio in 19 of 20 cases."""
        return max(0.0, self.ratio - _SURE * self.error), self.ratio + _SURE * self.error

    @property
    def share(self) -> str:
        """The ratio with its interval, beside the times: "72 ±1%"."""
        return f"{100 * self.ratio:.0f} ±{_SURE * 100 * self.error:.0f}%"

    @property
    def slower(self) -> bool:
        """Whether the model is slower than the original beyond doubt."""
        return self.interval[0] > 1.0

    @property
    def undecided(self) -> bool:
        """Whether the measurement leaves open which of the two is faster."""
        return self.interval[0] <= 1.0 <= self.interval[1]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds per run of several models.

    Attributes:
        seconds: float64 [turns, models].
        provider: The first execution provider in use.
    """

    seconds: FloatArray
    provider: str

    def timing(self, model: int) -> Timing:
        """Of one of the models."""
        low, median, high = np.percentile(self.seconds[:, model], (25, 50, 75))
        return Timing(float(median), float(low), float(high))

    def latency(self, model: int, original: int = 0) -> Latency:
        """One of the models beside another."""
        ratio, error = _ratio(self.seconds, model, original)
        return Latency(
            before=self.timing(original),
            after=self.timing(model),
            ratio=ratio,
            error=error,
            turns=len(self.seconds),
            provider=self.provider,
        )


def _ratio(seconds: FloatArray, model: int, original: int) -> tuple[float, float]:
    low, median, high = np.percentile(seconds[:, model] / seconds[:, original], (25, 50, 75))
    return float(median), float((high - low) / _TO_DEVIATION * _OF_MEDIAN / np.sqrt(len(seconds)))


def measure(
    models: Sequence[onnx.ModelProto], feeds: Mapping[str, Array] | Sequence[Mapping[str, Array]],
    options: EngineOptions = EngineOptions(), *, seconds: float = DEFAULT_SECONDS, enough: float = ENOUGH,
) -> Measurement:  # fmt: skip
    """Time models with the same inputs, in turns.

    Args:
        models: What to time; the first one is what the others are compared with.
        feeds: The inputs of one run, of all models or of each.
        options: How to run them.
        seconds: About how long to measure, loading and warming up not counted. A turn that takes longer
            than that is finished all the same.
        enough: Standard error of every ratio at which measuring ends early.

    Raises:
        EngineError: One of the models does not run.
    """
    deployed = as_deployed(options)
    each = [dict(feeds)] * len(models) if isinstance(feeds, Mapping) else [dict(feed) for feed in feeds]
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(model, deployed, config=_CONFIG)) for model in models]
        found = _turns(sessions, each, seconds, clock_for(deployed), enough)
        return Measurement(found, sessions[0].providers[0])


def timed(
    original: onnx.ModelProto, other: onnx.ModelProto, shapes: Mapping[str, Shape], options: EngineOptions,
    seconds: float,
) -> Latency | None:  # fmt: skip
    """A model beside the original on random inputs; None, and a warning in the log, where they do not run on those."""
    try:
        feeds = random_feeds(original, shapes, seed=0)
        return measure([original, other], feeds, options, seconds=seconds).latency(1)
    except (EngineError, ModelError) as error:
        log.warning("latency could not be measured: %s", error)
        return None


def clock_for(options: EngineOptions) -> Callable[[], float]:
    """The clock to time runs by: the thread's own time where one thread of the CPU does all the work.

    That is the same whatever else the machine does; what several threads or another device take must be
    read off the wall.
    """
    alone = options.threads == 1 and resolve_provider(options.provider) == [CPU]
    if alone and time.get_clock_info("thread_time").resolution <= _RESOLUTION:
        return time.thread_time
    return time.perf_counter


def as_deployed(options: EngineOptions) -> EngineOptions:
    """The same provider with the settings that it has where nobody changes them."""
    defaults = _AS_DEPLOYED.get(resolve_provider(options.provider)[0], ())
    return replace(options, provider_options=(*defaults, *options.provider_options))


def _turns(
    sessions: Sequence[Session], feeds: Sequence[Feed], seconds: float, clock: Callable[[], float],
    enough: float = ENOUGH,
) -> FloatArray:  # fmt: skip
    repeats = [_repeats(session, feed, clock) for session, feed in zip(sessions, feeds, strict=True)]
    rows: list[list[float]] = []
    rng, order = np.random.default_rng(0), np.arange(len(sessions))
    start = clock()
    while len(rows) < _MOST:
        row = [0.0] * len(sessions)
        order = order[::-1] if len(rows) % 2 else rng.permutation(len(sessions))
        longer = 1 + rng.random()  # turns of one length could keep step with another program's
        for place in order.tolist():
            row[place] = _turn(sessions[place], feeds[place], int(longer * repeats[place]), clock)
        rows.append(row)
        spent = clock() - start
        if spent >= seconds or (
            len(rows) >= _FEWEST and spent >= _LEAST_TIME * seconds and _settled(np.array(rows), enough)
        ):
            break
    return np.array(rows)


def _turn(session: Session, feed: Feed, runs: int, clock: Callable[[], float]) -> float:
    """Seconds of one of several runs in a row: the median over slices, as another program may take some of them."""
    slices = min(runs, _SLICES)
    ends = [runs * (place + 1) // slices for place in range(slices)]
    found, done = [], 0
    for end in ends:
        began = clock()
        for _ in range(end - done):
            session.run(feed)
        found.append(max(clock() - began, 1e-9) / (end - done))
        done = end
    return float(np.median(found))


def _settled(seconds: FloatArray, enough: float) -> bool:
    return all(_ratio(seconds, model, 0)[1] < enough for model in range(1, seconds.shape[1]))


def _repeats(session: Session, feed: Feed, clock: Callable[[], float]) -> int:
    """Warm a session up; how many runs fill a turn."""
    session.run(feed)  # the first run allocates and tunes
    began = clock()
    session.run(feed)
    once = max(clock() - began, 1e-9)
    return max(1, int(np.ceil(_TURN / once)))
