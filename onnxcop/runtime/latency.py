"""Latency of models, measured side by side in ONNX Runtime on this machine.

A busy machine speeds up and slows down from one second to the next by more than pruning saves. So models take turns in
a random order, reversed in the next turn, and only times within one turn are compared. Medians over all turns give the
time of each model. If a turn holds several runs, the median of its slices counts, because a run that another program
interrupts takes a hundred times as long as its neighbours. Models that load quickly are loaded several times, since a
small network can be some per cent faster or slower at other addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx

from onnxcop._base import formatting
from onnxcop._base.types import Array, Feed, FloatArray
from onnxcop.errors import EngineError, ModelError
from onnxcop.graph.shapes import Shape
from onnxcop.runtime.bound import device_of
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.providers import CPU, CUDA, resolve_provider
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.runtime.turns import ENOUGH, clock_of, median_of, ratio_of, take_turns

log = logging.getLogger("onnxcop")

DEFAULT_SECONDS = 2.0
_LOADS, _LOADING = 8, 0.1  # how often models are loaded, if that takes at most this share of the time to measure
_CHOICE = 0.3  # seconds to time a model on each of two providers
_SURE = 2.0  # standard errors on either side of an interval that holds the ratio in 19 of 20 cases

# The threads of one session keep spinning for a while after a run and would slow the next one down.
_CONFIG = {"session.force_spinning_stop": "1"}
# ONNX Runtime's own default; the rest of the package asks for full precision.
_AS_DEPLOYED = {CUDA: (("use_tf32", "1"), ("cudnn_conv_algo_search", "EXHAUSTIVE"))}


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one run of a model.

    Attributes:
        median: Seconds.
        low: Lower quartile.
        high: Upper quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return formatting.duration(self.median, (self.high - self.low) / 2)


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of a model and of the original.

    Attributes:
        before: The original.
        after: The other model.
        ratio: Median of the ratios within single turns, other over original: more robust than the quotient of medians.
        error: Standard error of that median.
        turns: Number of turns.
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
        """The interval that holds the ratio in 19 of 20 cases."""
        return max(0.0, self.ratio - _SURE * self.error), self.ratio + _SURE * self.error

    @property
    def share(self) -> str:
        """The ratio with its interval, for printing: "72 ±1%"."""
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
        loads: Numbers of the turns at which the models were loaded again.
    """

    seconds: FloatArray
    provider: str
    loads: tuple[int, ...] = ()

    def timing(self, model: int) -> Timing:
        """The timing of one model."""
        low, median, high = np.percentile(self.seconds[:, model], (25, 50, 75))
        return Timing(float(median), float(low), float(high))

    def latency(self, model: int) -> Latency:
        """One of the models compared with the first."""
        ratio, error = ratio_of(self.seconds, model, 0)
        if self.loads:  # each load puts weights elsewhere, which changes the time of fast models
            each = [ratio_of(turns, model, 0)[0] for turns in np.split(self.seconds, self.loads)]
            error = max(error, median_of(np.array(each))[1])
        return Latency(
            before=self.timing(0), after=self.timing(model), ratio=ratio, error=error, turns=len(self.seconds),
            provider=self.provider,
        )  # fmt: skip


def measure_times(
    models: Sequence[onnx.ModelProto], feeds: Mapping[str, Array] | Sequence[Mapping[str, Array]],
    options: EngineOptions = EngineOptions(), *, seconds: float = DEFAULT_SECONDS, enough: float = ENOUGH,
) -> Measurement:  # fmt: skip
    """Time models with the same inputs, in turns.

    Args:
        models: The models; the others are compared with the first.
        feeds: The inputs of one run, for all models or for each.
        options: How to run them.
        seconds: Approximate time to measure, without loading and warm-up. A turn that takes longer is still finished.
        enough: Standard error of every ratio at which measuring ends early.

    Raises:
        EngineError: One of the models does not run.
    """
    deployed = as_deployed(options)
    each = [dict(feeds)] * len(models) if isinstance(feeds, Mapping) else [dict(feed) for feed in feeds]
    clock, device, parts, count = clock_for(deployed), device_of(deployed), list[FloatArray](), 1
    while len(parts) < count:
        began = clock()
        with ExitStack() as stack:
            sessions = [stack.enter_context(Session(model, deployed, config=_CONFIG)) for model in models]
            if not parts and clock() - began <= _LOADING * seconds / _LOADS:
                count = _LOADS
            runs = [_run_of(session, feed, device) for session, feed in zip(sessions, each, strict=True)]
            parts.append(take_turns(runs, seconds / count, clock, enough * count**0.5))
            provider = sessions[0].providers[0]
    return Measurement(np.concatenate(parts), provider, tuple(np.cumsum([len(part) for part in parts])[:-1].tolist()))


def timed(
    original: onnx.ModelProto, other: onnx.ModelProto, feed: Callable[[], Feed], options: EngineOptions, seconds: float
) -> Latency | None:
    """Time a model beside the original on the same inputs; None, with a warning in the log, if they do not run."""
    try:
        return measure_times([original, other], feed(), options, seconds=seconds).latency(1)
    except (EngineError, ModelError) as error:
        log.warning("latency could not be measured: %s", error)
        return None


def on_quicker_provider(model: onnx.ModelProto, shapes: Mapping[str, Shape], options: EngineOptions) -> EngineOptions:
    """The CPU instead of `auto`, if `auto` is another device and the model runs at least as fast on the CPU."""
    if options.provider.lower() != "auto" or resolve_provider(options.provider) == [CPU]:
        return options
    here = replace(options, provider="cpu")
    try:
        feeds = random_feeds(model, shapes, seed=0)
        times = [measure_times([model], feeds, one, seconds=_CHOICE).timing(0).median for one in (here, options)]
    except (EngineError, ModelError) as error:
        log.debug("the providers could not be compared: %s", error)
        return options
    log.info("one run takes %s on the CPU and %s on the device", *(formatting.duration(time, 0.0) for time in times))
    return here if times[0] <= times[1] else options


def clock_for(options: EngineOptions) -> Callable[[], float]:
    """The clock for timing: the thread's own time if one CPU thread does all the work."""
    return clock_of(options.threads == 1 and resolve_provider(options.provider) == [CPU])


def as_deployed(options: EngineOptions) -> EngineOptions:
    """The same provider with ONNX Runtime's default settings, as users deploy it."""
    defaults = _AS_DEPLOYED.get(resolve_provider(options.provider)[0], ())
    return replace(options, provider_options=(*defaults, *options.provider_options))


def _run_of(session: Session, feed: Feed, device: str | None) -> Callable[[], object]:
    """A run of a session, without copies between host and device if it has one and the model allows it."""
    if device is not None:
        try:
            return session.on_device(feed, device)
        except EngineError as error:
            log.debug("inputs and outputs are copied while the model is timed: %s", error)
    return partial(session.run, feed)
