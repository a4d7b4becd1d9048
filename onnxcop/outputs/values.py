"""Numbers of any kind, compared by relative error; vectors also by their cosine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.outputs.kind import Batches, Finding, MeasureSettings, OutputEvidence, OutputKind

_UNEVEN = 1e4  # ratio of energies above which parts of an output are quantities of different kinds
_UNIT = 1e-2  # how far lengths may be from one
_FEWEST_VECTORS = 4
_SHORTEST = 4  # entries of a vector; shorter ones may have length one by definition, such as quaternions


class ErrorMeasure:
    """Relative error ‖y - y₀‖ / ‖y₀‖, over all samples.

    If the parts of an output along an axis have very different magnitudes (a detector's boxes, in pixels, and scores),
    the error is averaged over these parts, and each counts at most 1.

    Args:
        outputs: One output, batch by batch.
        settings: The measurement settings.
    """

    def __init__(self, outputs: Sequence[Batches], settings: MeasureSettings) -> None:
        (self._batches,) = outputs
        self._rooted = settings.roots and all(within_one(batch) for batch in self._batches)
        self._axis = self._uneven_axis()
        self._energies = [_summed(_finite(self._read(batch)) ** 2, self._axis) for batch in self._batches]

    @property
    def width(self) -> int:
        """The number of terms."""
        return 2 * int(self._energies[0].shape[1])

    @property
    def uneven_axis(self) -> int | None:
        """The axis of parts with different magnitudes; None if there is none."""
        return self._axis

    def terms(self, place: int, theirs: Sequence[Array]) -> FloatArray:
        """Squared errors and energies by part, float64 [samples, 2 × parts]."""
        a, b = self._read(self._batches[place]), self._read(theirs[0])
        gaps = _summed(np.subtract(a, b, out=np.zeros_like(a), where=np.isfinite(a)) ** 2, self._axis)
        return np.concatenate([gaps, self._energies[place]], axis=1)

    def value(self, totals: FloatArray) -> FloatArray:
        """Root of the summed squares, relative to the original's, averaged over parts."""
        gap, energy = np.split(totals, 2, axis=-1)
        shares = np.where(energy > 0, gap / np.where(energy > 0, energy, 1.0), gap)
        if self._axis is None:
            return np.asarray(np.sqrt(np.maximum(shares[..., 0], 0.0)))
        return np.asarray(np.sqrt(np.clip(shares, 0.0, 1.0).mean(axis=-1)))

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """None: numbers have no agreement."""
        return None

    def _read(self, batch: Array) -> FloatArray:
        values = batch.astype(np.float64)
        return np.sqrt(np.maximum(values, 0.0)) if self._rooted else values

    def _uneven_axis(self) -> int | None:
        """The axis along which an output holds quantities of very different magnitude."""
        shape = self._batches[0].shape
        if len(shape) <= 2:
            return None
        axis = 1 + int(np.argmin(shape[1:]))  # the others are positions
        if not all(batch.shape[axis] == shape[axis] for batch in self._batches):
            return None
        energy = np.sum([_summed(_finite(self._read(b)) ** 2, axis).sum(axis=0) for b in self._batches], axis=0)
        present = energy[energy > 0]
        return axis if len(present) and present.max() > _UNEVEN * present.min() else None


class VectorMeasure(ErrorMeasure):
    """The same, with the cosine between each vector and the original's."""

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Cosine of every sample's vectors (the mean over its positions)."""
        a, b = (_finite(values.astype(np.float64)) for values in (self._batches[place], theirs[0]))
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        both_zero = np.linalg.norm(a - b, axis=-1) == 0  # two vectors of zeros agree
        cosines = np.where(lengths > 0, (a * b).sum(axis=-1) / np.where(lengths > 0, lengths, 1.0), both_zero)
        means = cosines.reshape(len(cosines), -1).mean(axis=1)
        return np.stack([np.clip(means, -1.0, 1.0), np.ones(len(means))], axis=1)


def _finite(values: FloatArray) -> FloatArray:
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _summed(values: FloatArray, axis: int | None) -> FloatArray:
    """Sums over all axes but the first and one more: float64 [samples, size of that axis, or 1]."""
    kept = {0} if axis is None else {0, axis}
    return np.asarray(values.sum(axis=tuple(a for a in range(values.ndim) if a not in kept))).reshape(len(values), -1)


def within_one(values: Array) -> bool:
    """Whether all values are from 0 to 1."""
    return bool(values.size) and float(values.min()) >= 0 and float(values.max()) <= 1


def _vectors(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    for output in outputs:
        shape = output.shape
        if len(shape) not in (2, 3) or shape[-1] < _SHORTEST or sum(map(len, output.batches)) < _FEWEST_VECTORS:
            continue
        lengths = [np.linalg.norm(batch.astype(np.float64), axis=-1) for batch in output.batches]
        if all(np.abs(values - 1.0).max(initial=0.0) < _UNIT for values in lengths):
            yield Finding((output.name,), "all of length one")


def _rest(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    for output in outputs:
        yield Finding((output.name,), "no evidence of anything else")


VECTORS = OutputKind(
    name="vectors",
    title="vectors",
    distance="relative error",
    compared_by="cosine and relative error",
    agreement="mean cosine",
    tasks={"embed": (2, 3)},
    recognize=_vectors,
    measure=VectorMeasure,
    threshold=0.95,
    meaning="vectors point in another direction than the original's: 1 - cosine is {share:.2g} on average",
    counted=False,
)
VALUES = OutputKind(
    name="values",
    title="numbers",
    distance="relative error",
    compared_by="relative error",
    agreement="",
    tasks={"regress": (1, 2, 3, 4, 5, 6)},
    recognize=_rest,
    measure=ErrorMeasure,
    threshold=0.2,
    meaning="the numbers are off by {share:.0%} of their size",
)
