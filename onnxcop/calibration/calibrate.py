"""Calibration: one pass over the user's data that keeps only per-channel statistics.

The statistics are computed inside the graph (:mod:`onnxcop.calibration.instrument`) and summed here in double
precision, so memory does not grow with the number of samples. They are taken about a *shift*, the channel means of a
first sample. Otherwise sums of squares of data far from zero would lose digits in single precision.

**Positions.** Neighbouring positions of a feature map are similar, so an evenly spaced grid is taken from large maps:
at most `positions` of a sample of the size of the first one. `"auto"` chooses that number so that the statistics cost
about :data:`SHARE` of the model's own arithmetic, but at least :data:`FEWEST`. It depends only on the model and the
size of the first sample, so shards of the same data agree. None takes all positions.

**Width.** Tensors of more than :data:`WIDEST` channels are left out, because the second moments of each would take more
than 128 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Feed, FloatArray
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.layers import Layer, layers_of
from onnxcop.calibration.instrument import Instrumented, instrument
from onnxcop.calibration.spilled import SpilledMoments
from onnxcop.calibration.statistics import CalibrationStats, Moments
from onnxcop.calibration.taps import Tap, taps_of
from onnxcop.data.dataset import CalibrationData, Item
from onnxcop.errors import CalibrationError
from onnxcop.graph.linear import multiply_accumulates
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.runtime.input_shapes import fed_shapes, shapes_of
from onnxcop.runtime.session import EngineOptions, KeptSession, Session, run_batched

log = logging.getLogger("onnxcop")

WIDEST = 4096  # channels of a tensor whose statistics are gathered
SHARE = 0.2  # of the model's multiply-accumulates, that statistics may cost with "auto"
FEWEST = 4  # positions of a sample that "auto" takes at least
TOGETHER = 2 << 30  # bytes of sums in one pass over the data
LARGEST_HELD = 1 << 28  # bytes of second moments; more of them go to files
_SUM_BYTES, _ENTRY_BYTES = 12, 8  # of an entry: the sum and what one batch adds to it; the second moment
_BLOCK = 128  # rows of a matrix
_OVERHEAD = 150  # multiply-accumulates that take as long as moving one entry of a feature map


def gather_statistics(
    analysis: Analysis, data: CalibrationData, options: EngineOptions = EngineOptions(),
    progress: Progress = silent, crew: Crew = HERE,
) -> CalibrationStats:  # fmt: skip
    """Statistics of all layers of an analysed model.

    Args:
        analysis: The model.
        data: Samples.
        options: How to run the model.
        progress: Called with (stage, done, total).
        crew: Runs the batches.
    """
    layers = layers_of(analysis.model, analysis.structure)
    return calibrate(analysis.model, layers, data, options, sha=analysis.sha256, progress=progress, crew=crew)


def calibrate(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    data: CalibrationData,
    options: EngineOptions = EngineOptions(),
    *,
    sha: str,
    positions: int | Literal["auto"] | None = "auto",
    progress: Progress = silent,
    stage: str = "calibration",
    crew: Crew = HERE,
) -> CalibrationStats:
    """Gather the moments of the inputs of layers.

    Args:
        model: The model; it is not changed.
        layers: The layers to observe; layers that read the same channels share statistics.
        data: The samples.
        options: How to run the model.
        sha: Identity of the model, see :func:`onnxcop.graph.io.sha256`.
        positions: Largest number of positions of a sample's feature map, "auto" to choose it by cost, None for whole
            maps, summed in double precision.
        progress: Called with (stage, done, total) in samples.
        stage: Its name in `progress`.
        crew: Runs the batches; their sums are added in the order of the batches.

    Raises:
        CalibrationError: There are no samples, or a tensor holds values that are not finite.
        OutOfMemory: A single sample does not fit into the device's memory.
        EngineError: The model cannot be run on the data.
    """
    first = next(data.batches(1), None)
    if first is None:
        raise CalibrationError(f"{data.description}: no samples to calibrate on; give at least one")
    if isinstance(positions, int) and positions < 1:
        raise CalibrationError(f"positions is {positions}; give 1 or more, or None for all")
    samples = data.layout.samples_in(first)
    shapes = shapes_of(model, fed_shapes(model, first), options)
    taps = taps_of(model, layers, shapes, samples, WIDEST)
    wide = sorted({layer.tensor for layer in layers if layer.channels > WIDEST})
    if wide:
        named = f"{wide[0]!r}" + (f" and {len(wide) - 1} more" if len(wide) > 1 else "")
        log.info("no statistics of %s: wider than %d channels", named, WIDEST)
    if not taps:
        return CalibrationStats(sha, data.count, {})
    if positions == "auto":
        positions = affordable_positions(taps, SHARE * multiply_accumulates(model, shapes) / samples)
    parts = list(_parts(taps))
    large = _ENTRY_BYTES * sum(tap.channels**2 for tap in taps) > LARGEST_HELD
    moments: dict[str, Moments] | SpilledMoments = SpilledMoments() if large else {}
    count = 0
    for place, part in enumerate(parts):
        watched = instrument(model, part, positions)
        report = partial(_reported, partial(progress, stage), place, len(parts))
        with Session(watched.model, options) as session:
            try:
                count, sums = _gather(session, watched, first, data, crew, options, progress=report)
            except _NotFinite as error:
                where = data.first_infinite()
                raise CalibrationError(f"{error}; {where}" if where else str(error)) from None
        for key, one in sums:
            moments[key] = one
    return CalibrationStats(sha, count, moments)


def _reported(progress: Callable[[int, int], None], place: int, parts: int, done: int, total: int) -> None:
    progress(place * total + done, parts * total)


def _parts(taps: Sequence[Tap]) -> Iterator[list[Tap]]:
    """Taps in so many passes over the data that the sums of one are not too much for memory."""
    part: list[Tap] = []
    size = 0
    for tap in taps:
        own = _SUM_BYTES * tap.channels**2
        if part and size + own > TOGETHER:
            yield part
            part, size = [], 0
        part.append(tap)
        size += own
    yield part


def _gather(
    session: Session,
    watched: Instrumented,
    first: Feed,
    data: CalibrationData,
    crew: Crew,
    options: EngineOptions,
    *,
    progress: Callable[[int, int], None],
) -> tuple[int, Iterator[tuple[str, Moments]]]:
    """Run an instrumented model over all samples; returns their number, and moments by tap, which use up the sums."""
    shifts = _shifts(watched, session.run(first | _zero_shifts(watched)))
    sums = [_Sums.of(tap) for tap in watched.taps]
    done = 0
    for count, parts in _batch_sums(session, watched, shifts, data, crew, options):
        for tap, total, part in zip(watched.taps, sums, parts, strict=True):
            total.add(tap, *part)
        done += count
        progress(done, data.count)
    pairs = zip(watched.taps, watched.names, strict=True)
    return done, ((tap.key, sums.pop(0).moments(shifts[names.shift])) for tap, names in pairs)


_Parts = list[tuple[FloatArray, FloatArray, FloatArray]]  # number of observations, sum and second moment, by tap


@dataclass
class _Watching:
    """An instrumented model."""

    watched: Instrumented
    shifts: Feed
    kept: KeptSession

    def parts(self, feeds: Iterable[Feed], data: CalibrationData) -> Iterator[tuple[int, _Parts]]:
        """Samples and sums of every batch, or of parts of one if it does not fit in memory."""
        shifted = (feed | self.shifts for feed in feeds)
        for feed, result in run_batched(self.kept.session, shifted, data.layout.axes):
            names = self.watched.names
            yield data.layout.samples_in(feed), [(result[n.count], result[n.total], result[n.second]) for n in names]


def _batch_sums(
    session: Session, watched: Instrumented, shifts: Feed, data: CalibrationData, crew: Crew, options: EngineOptions
) -> Iterator[tuple[int, _Parts]]:
    """Samples and sums, batch by batch, in the order of the data."""
    if not crew.spread:
        kept = KeptSession(watched.model, options, made=session)
        yield from _Watching(watched, shifts, kept).parts(data.batches(), data)
        return
    watching = crew.share(_Watching(watched, shifts, KeptSession(watched.model, crew.engine(options))))
    for parts in crew.run(_sums_of, data.items(), watching, crew.share(data, keep=True)):
        yield from parts


def _sums_of(item: Item, watching: _Watching, data: CalibrationData) -> list[tuple[int, _Parts]]:
    """Sums of one batch in a worker."""
    return list(watching.parts(data.feeds_of(item), data))


def merge(stats: Sequence[CalibrationStats], names: Sequence[object] | None = None) -> CalibrationStats:
    """Merge statistics as if all samples had been gathered in one run.

    Args:
        stats: Statistics of different samples.
        names: Names for messages, e.g. of their files.

    Raises:
        CalibrationError: There is nothing to merge, or the same samples would count twice.
        PlanMismatchError: They belong to different models or tensors.
    """
    if not stats:
        raise CalibrationError("there are no statistics to merge; give at least one file")
    called = list(names or [f"number {place}" for place in range(1, len(stats) + 1)])
    for place, other in enumerate(stats):
        twin = next((called[i] for i in range(place) if stats[i].equals(other)), None)
        if twin is not None:
            raise CalibrationError(
                f"{called[place]} holds the same statistics as {twin}, and samples must not count twice; leave one out"
            )
    return reduce(CalibrationStats.merged, stats)


def affordable_positions(taps: Sequence[Tap], budget: float) -> int:
    """The largest number of positions of a sample, at least FEWEST, with which statistics stay within a budget.

    Args:
        taps: The observed tensors.
        budget: Multiply-accumulates per sample.
    """

    def cost(positions: int) -> float:
        return sum(min(t.positions, max(positions, t.blocks)) * t.channels * (t.channels + _OVERHEAD) for t in taps)

    low, high = FEWEST, max(FEWEST, *(tap.positions for tap in taps))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _zero_shifts(watched: Instrumented) -> Feed:
    return {
        value.name: np.zeros(
            [dim.dim_value for dim in value.type.tensor_type.shape.dim],
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
        )
        for value in watched.model.graph.input
        if value.name in {names.shift for names in watched.names}
    }


def _shifts(watched: Instrumented, result: Mapping[str, FloatArray]) -> Feed:
    """The channel means of a run with zero shifts."""
    shifts = _zero_shifts(watched)
    for tap, names in zip(watched.taps, watched.names, strict=True):
        total = result[names.total]
        if not np.isfinite(total).all():
            raise _not_finite(tap)
        count = int(result[names.count]) // tap.channels
        shifts[names.shift][...] = (total / max(count, 1)).reshape(shifts[names.shift].shape)
    return shifts


class _NotFinite(CalibrationError):
    """Raised if a sample makes a tensor that is not finite."""


def _not_finite(tap: Tap) -> _NotFinite:
    return _NotFinite(
        f"tensor '{tap.tensor}' holds NaN, infinite or overflowing values on the calibration data; "
        "check the preprocessing and the model's weights"
    )


@dataclass(slots=True)
class _Sums:
    """Sums about the shift, in double precision."""

    count: int
    total: FloatArray
    second: FloatArray

    @classmethod
    def of(cls, tap: Tap) -> _Sums:
        return cls(0, np.zeros(tap.channels), np.zeros((tap.channels, tap.channels)))

    def add(self, tap: Tap, size: FloatArray, total: FloatArray, second: FloatArray) -> None:
        # |S_ij| ≤ √(S_ii S_jj): the diagonal is finite only if all is.
        if not (np.isfinite(total).all() and np.isfinite(np.diagonal(second)).all()):
            raise _not_finite(tap)
        self.count += int(size) // tap.channels
        self.total += total
        self.second += second

    def moments(self, shift: FloatArray) -> Moments:
        """The moments about the mean; this consumes the sums."""
        mean = self.total / max(self.count, 1)
        for start in range(0, len(mean), _BLOCK):  # in place and by blocks: matrices are large
            rows, rest = slice(start, start + _BLOCK), slice(start, None)
            upper = self.second[rows, rest] + self.second[rest, rows].T
            upper /= 2
            upper -= np.outer(self.total[rows], mean[rest])
            self.second[rows, rest] = upper
            self.second[rest, rows] = upper.T
        shifted = shift.reshape(-1).astype(np.float64) + mean
        return Moments(float(self.count), shifted, self.second)
