"""Time budgets on this machine: a request with a time model, corrected by timing whole models."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace

from onnxcop._base.cache import remember, remembered
from onnxcop._base.types import IntArray
from onnxcop.allocation.rough import without
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.timing import time_model
from onnxcop.pipeline.decide import Request
from onnxcop.runtime.latency import measure_times
from onnxcop.runtime.machine import Machine
from onnxcop.runtime.session import EngineOptions
from onnxcop.runtime.time_table import TimeTable

log = logging.getLogger("onnxcop")

_SECONDS, _ENOUGH = 1.5, 0.004  # seconds for timing a whole model beside the original


@dataclass(frozen=True, slots=True)
class CutTimer:
    """Times models beside the original on this machine, and caches the results.

    Attributes:
        analysis: The original.
        options: How to run models.
        machine: The machine.
    """

    analysis: Analysis
    options: EngineOptions
    machine: Machine

    def __call__(self, removed: IntArray) -> float:
        """Time of a run without some units, int64, as a share of the original's."""
        analysis = self.analysis
        cut = hashlib.sha256(analysis.cost.kept_counts(removed).tobytes()).hexdigest()[:16]
        shapes, random = sorted(analysis.input_shapes.items()), analysis.sample is None
        key = [self.machine.to_dict(), analysis.sha256, cut, shapes, random]
        known = remembered("cut", key)
        if isinstance(known, float):
            return known
        models = [analysis.original, without(analysis, removed)]
        times = measure_times(models, analysis.timing_feed(), self.options, seconds=_SECONDS, enough=_ENOUGH)
        latency = times.latency(1).ratio
        remember("cut", key, latency)
        log.debug("a cut to %.1f%% of the time", 100 * latency)
        return latency


def with_times(request: Request) -> Request:
    """The request with a time model in its cost model.

    Args:
        request: The request.

    Raises:
        EngineError: The model does not run, so its time cannot be measured.
    """
    analysis, options = request.analysis, request.asked.engine
    with request.clock.stage("operator times"):
        table = TimeTable.here(options)
        times = time_model(analysis, table, request.limits.staircase, options, request.progress)
        times.timer = CutTimer(analysis, options, table.machine)
        timed = replace(analysis, cost=replace(analysis.cost, times=times))
    return replace(request, analysis=timed)
