"""Scores of mutually exclusive classes: one choice for a sample, or one at every position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.outputs.kind import Batches, Finding, MeasureSettings, OutputEvidence, OutputKind
from onnxcop.outputs.labels import independent

_CONFIDENT = 0.4  # mean probability of the top class above chance, as a share of the possible range, and
_AMONG_FEW = 0.8  # over the number of classes: with two classes, one is far ahead by chance
_VARIED = 0.5  # top classes that occur, over the square root of how many could
_FEWEST = 4  # rows; fewer predictions prove nothing
_WIDEST = 100.0  # nats from the highest to the lowest score: coordinates in pixels differ by more
_LARGE = 2e7  # entries; larger log-probabilities are stored in single precision
_MOST_ROWS = 20_000  # rows to look at


class ClassMeasure:
    """Kullback–Leibler divergence of predictions, in nats, and the top-1 agreement.

    Args:
        outputs: One output, batch by batch, classes along the last axis.
        settings: The measurement settings.
    """

    def __init__(self, outputs: Sequence[Batches], settings: MeasureSettings) -> None:
        (batches,) = outputs
        self._axis = class_axis(batches)
        self._temperature = settings.temperature
        self._dtype = np.float64 if sum(batch.size for batch in batches) < _LARGE else np.float32
        self._logs = [self._log_shares(class_rows(batch, self._axis)) for batch in batches]
        self._top = [class_rows(batch, self._axis).argmax(axis=-1) for batch in batches]

    def terms(self, place: int, theirs: Sequence[Array]) -> FloatArray:
        """Divergence of every sample (the mean over its positions) and one: float64 [samples, 2]."""
        logs, other = self._logs[place], self._log_shares(class_rows(theirs[0], self._axis))
        possible = ~np.isneginf(logs)  # an excluded class adds nothing
        gap = np.subtract(logs, other, out=np.zeros_like(logs), where=possible)
        divergences = np.einsum("npc,npc->np", np.exp(logs), gap, dtype=np.float64).mean(axis=1)
        return np.stack([divergences, np.ones(len(divergences))], axis=1)

    def value(self, totals: FloatArray) -> FloatArray:
        """The mean, raised to 0 if rounding makes it negative."""
        return np.asarray(np.maximum(totals[..., 0] / np.maximum(totals[..., 1], 1.0), 0.0))

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Positions with the same top class, and the number of positions."""
        agreeing = self._top[place] == self.top(theirs[0])
        return np.stack([agreeing.sum(axis=1), np.full(len(agreeing), agreeing.shape[1])], axis=1).astype(np.float64)

    def top(self, batch: Array) -> Array:
        """The top class, int64 [samples, positions]."""
        return np.asarray(class_rows(batch, self._axis).argmax(axis=-1))

    def _log_shares(self, rows: Array) -> FloatArray:
        logs = log_probabilities(rows)
        logs = logs if self._temperature == 1 else log_probabilities(logs / self._temperature)
        return logs.astype(self._dtype, copy=False)


def class_rows(batch: Array, axis: int) -> Array:
    """A batch as [samples, positions, classes]."""
    moved = np.moveaxis(batch, axis, -1)
    return moved.reshape(len(moved), -1, moved.shape[-1])


def class_axis(batches: Batches) -> int:
    """The axis of the classes: one along which values sum to one, else the last with more than one entry."""
    shape = batches[0].shape
    axes = [axis for axis in (len(shape) - 1, 1) if axis > 0 and shape[axis] > 1]
    for axis in axes:
        if shares_along(batches, axis):
            return axis
    return axes[0] if axes else len(shape) - 1


def shares_along(batches: Batches, axis: int) -> bool:
    """Whether values are probabilities, or their logarithms, that sum to one along an axis."""
    if batches[0].shape[axis] < 2:
        return False
    return all(_sum_to_one(batch, axis) for batch in batches) or all(
        batch.size > 0 and float(batch.max()) <= 1e-4 and _sum_to_one(np.exp(batch.astype(np.float64)), axis)
        for batch in batches
    )


def _sum_to_one(batch: Array, axis: int) -> bool:
    values = batch.astype(np.float64)
    return bool(values.size) and values.min() >= 0 and np.allclose(values.sum(axis=axis), 1.0, atol=1e-3)


def log_probabilities(scores: Array) -> FloatArray:
    """Log-probabilities of class scores [..., classes], whether they are logits or probabilities."""
    values = scores.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(axis=-1), 1.0, atol=1e-3):
        return np.log(np.maximum(values, 1e-12))
    values = values - values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


def confident_and_varied(rows: FloatArray) -> bool:
    """Whether raw scores [rows, classes] look like predictions: confident, and not always the same.

    Embeddings and regressors are neither: their softmax is nearly uniform, or one entry is the largest in all rows.
    """
    count, classes = rows.shape
    if count < _FEWEST or classes < 2 or not np.isfinite(rows.max(axis=1)).all():
        return False
    rows = rows[:: max(1, count // _MOST_ROWS)]
    chance = 1.0 / classes
    sure = (np.exp(log_probabilities(rows)).max(axis=1).mean() - chance) / (1.0 - chance)
    known = np.where(np.isfinite(rows), rows, np.nan)
    spread = np.median(np.nanmax(known, axis=1) - np.nanmin(known, axis=1))
    if sure < _CONFIDENT + _AMONG_FEW / classes or spread > _WIDEST:
        return False
    return bool(occurring(rows.argmax(axis=1), classes) >= _VARIED * np.sqrt(min(classes, len(rows))) + 0.5)


def occurring(top: Array, classes: int) -> float:
    """The effective number of classes: the exponential of the entropy of the top class's frequencies."""
    often = np.bincount(top.reshape(-1), minlength=classes) / max(top.size, 1)
    often = often[often > 0]
    return float(np.exp(-(often * np.log(often)).sum()))


def looks_like_classes(output: OutputEvidence, *, at_positions: bool) -> str:
    """The evidence that an output holds class scores; empty if there is none."""
    axis, softmax = class_axis(output.batches), output.activation in ("softmax", "log-softmax")
    if shares_along(output.batches, axis):
        return f"a {output.activation} in the graph" if softmax else "its values are probabilities that sum to one"
    if independent(output.batches) or (at_positions and output.batches[0].ndim > 3):
        return ""
    rows = np.concatenate([class_rows(b, axis).reshape(-1, b.shape[axis]) for b in output.batches]).astype(np.float64)
    return "predictions that are confident and varied" if confident_and_varied(rows) else ""


def squeezed(shape: Sequence[int]) -> int:
    """The number of axes with more than one entry; the axis of the samples always counts."""
    return 1 + sum(size > 1 for size in shape[1:])


def _classes(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    for output in outputs:
        if squeezed(output.shape) == 2 and max(output.shape[1:]) > 1:
            if output.metadata.get("task") == "classify":
                yield Finding((output.name,), "the model's metadata")
            elif why := looks_like_classes(output, at_positions=False):
                yield Finding((output.name,), why)


def _positions(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    for output in outputs:
        if squeezed(output.shape) > 2 and (why := looks_like_classes(output, at_positions=True)):
            yield Finding((output.name,), why)


CLASSES = OutputKind(
    name="classes",
    title="class scores",
    distance="Kullback–Leibler divergence in nats",
    compared_by="Kullback–Leibler divergence and top-1 agreement",
    agreement="top-1 agreement",
    tasks={"classify": (2,)},
    recognize=_classes,
    measure=ClassMeasure,
    threshold=0.9,
    meaning="{share:.0%} of the samples are classified differently than by the original",
)
POSITIONS = OutputKind(
    name="positions",
    title="class scores at every position",
    distance="Kullback–Leibler divergence in nats",
    compared_by="Kullback–Leibler divergence and top-1 agreement by position",
    agreement="positions that agree",
    tasks={"classify": (3, 4, 5)},
    recognize=_positions,
    measure=ClassMeasure,
    threshold=0.9,
    meaning="at {share:.0%} of the positions another class is chosen than by the original",
)
