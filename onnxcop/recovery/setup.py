"""Preparation of recovery: the original, data to fit and to measure on, and statistics."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from onnxcop._base.progress import Progress
from onnxcop._base.timing import single_threaded
from onnxcop._base.types import IntArray
from onnxcop.allocation.sensitivity import Samples, choose_ridges
from onnxcop.analysis.analyze import Analysis
from onnxcop.data.open import CalibrationData
from onnxcop.data.padding import TrimmedData, padding_of
from onnxcop.data.synthetic import synthetic_data
from onnxcop.errors import CalibrationError, EngineError
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.recovery.rounds import Recovery, RecoverySettings
from onnxcop.runtime.providers import CPU, resolve_provider
from onnxcop.runtime.session import EngineOptions, Session

log = logging.getLogger("onnxcop")

_HELD_OUT_SHARE = 1 / 4  # share of the samples to hold out; up to a third if there are few
_MOST_HELD_OUT = 1 / 3
_SYNTHETIC = 128  # synthetic samples to fit on if there are no data
_FEWEST = 32
_FEWEST_HELD = 8  # synthetic samples to measure on; half as many as to fit on if affordable
_AFFORDABLE = 2e10  # multiply-accumulates over synthetic samples; more samples add little
_LARGE = 1e8  # multiply-accumulates of a network above which refinement on synthetic inputs is not worth its time
_CHECKED = 4  # batches to run with and without padding, the shortest samples first
_NOISE = 1e-4  # of an output's largest value; sums over fewer zeros round differently
_ACTIVATION = 48 * 2**20  # bytes of the largest tensor of a batch
_PASSES = 2  # passes of measuring curves there; more of them fit the network to these inputs


def recovery_on(
    analysis: Analysis, source: CalibrationData, settings: RecoverySettings, options: EngineOptions,
    progress: Progress, *, task: str | None = None, crew: Crew = HERE,
) -> Recovery:  # fmt: skip
    """An unpruned network with its data split in two.

    Raises:
        CalibrationError: There are too few samples for two parts.
    """
    if source.count < 2:
        raise CalibrationError(
            f"recovery needs at least 2 samples, but got {source.description}; give some hundreds, or --recover none"
        )
    source = without_padding(analysis, source, options)
    share = min(_MOST_HELD_OUT, max(_HELD_OUT_SHARE, settings.held_out_samples / source.count))
    fit, held_out = source.split(share, settings.seed)
    views = min(settings.views, max(1, settings.refine_samples // fit.count))
    return Recovery(
        analysis=analysis,
        fit=fit.with_crops(views),
        held_out=held_out,
        options=options,
        settings=settings,
        progress=progress,
        task=task,
        crew=crew,
    )


def affordable_batch(analysis: Analysis, source: CalibrationData, options: EngineOptions) -> int:
    """The batch size that fits in memory: the given one, or less if feature maps are large.

    On the CPU large batches save nothing, and their memory is released and allocated again each time.
    """
    first = next(source.batches(1), None)
    if first is None or resolve_provider(options.provider)[0] != CPU:
        return source.batch_size
    coupling = analysis.structure.coupling
    analysed = sum(math.prod(shape) for name, shape in analysis.input_shapes.items() if name in first)
    stored = coupling.derived | coupling.constants
    made = [info.shape for name, info in coupling.shapes.infos.items() if name not in stored and info.shape is not None]
    each = 4 * max(map(math.prod, made), default=1) * sum(array.size for array in first.values()) / max(analysed, 1)
    most = max(1, int(_ACTIVATION / max(each, 1)))
    return max(1, min(source.batch_size, 1 << (most.bit_length() - 1)))


def without_padding(analysis: Analysis, source: CalibrationData, options: EngineOptions) -> CalibrationData:
    """Samples without the padding that an input mask marks; unchanged if outputs depend on the padding."""
    padding = padding_of(source)
    if padding is None:
        return source
    trimmed = TrimmedData.of(source, padding)
    with Session(analysis.original, options) as session:
        for batch in islice(CalibrationData.batches(trimmed), _CHECKED):
            expected = session.run(batch)
            try:
                outputs = session.run(padding.trimmed(batch))
            except EngineError:
                return source
            if not all(_same(expected[name], values) for name, values in outputs.items()):
                return source
    log.info("padding: left out of the statistics, as input %r marks it", padding.mask)
    return trimmed


def _same(expected: object, actual: object) -> bool:
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray) or expected.shape != actual.shape:
        return False
    scale = float(np.abs(expected).max()) if expected.size and expected.dtype.kind == "f" else 0.0
    return bool(np.allclose(expected, actual, rtol=0, atol=_NOISE * scale, equal_nan=True))


def recovery_without_data(
    analysis: Analysis, settings: RecoverySettings, options: EngineOptions, progress: Progress,
    *, task: str | None = None, crew: Crew = HERE,
) -> Recovery:  # fmt: skip
    """An unpruned network that is fitted and measured on synthetic inputs; a large network gets few of them."""
    macs = max(float(analysis.cost.original()[0]), 1.0)
    samples = int(np.clip(_AFFORDABLE / macs, _FEWEST, _SYNTHETIC))
    held_count = int(np.clip(_AFFORDABLE / macs / 2, _FEWEST_HELD, samples // 2))
    synthetic = synthetic_data(analysis, samples + held_count, settings.synthetic_batch, settings.seed)
    fit, held_out = synthetic.split(held_count / (samples + held_count), settings.seed)
    if macs > _LARGE:
        passes = min(settings.curve_passes, _PASSES)
        settings = replace(settings, refine=0, curve_passes=passes, sharper_passes=0)
    return Recovery(
        analysis=analysis,
        fit=fit,
        held_out=held_out,
        options=options,
        settings=settings,
        progress=progress,
        synthetic=True,
        task=task,
        crew=crew,
    )


@dataclass
class PreparedRecovery:
    """An unpruned network with its statistics, from which any number of cuts can be recovered.

    Attributes:
        untouched: The network.
        samples: Its statistics.
        ridges: Regularization by layer.
    """

    untouched: Recovery
    samples: Samples
    ridges: Mapping[int, float]
    _used: bool = False

    @classmethod
    @single_threaded
    def of(cls, untouched: Recovery) -> PreparedRecovery:
        """Measure the statistics."""
        samples = untouched.statistics()
        return cls(untouched, samples, choose_ridges(untouched.working, samples, untouched.crew))

    def cut(self, removed: IntArray) -> Recovery:
        """Remove units, int64, from the original and compensate for them."""
        recovery = self.untouched.restarted() if self._used else self.untouched
        self._used = True
        recovery.recover_cut(removed, self.samples, self.ridges, "recovery")
        return recovery
