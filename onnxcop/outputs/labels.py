"""Probabilities of labels that are not mutually exclusive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.outputs.kind import Batches, Finding, MeasureSettings, OutputEvidence, OutputKind
from onnxcop.outputs.values import ErrorMeasure, within_one

_CLEAR = 0.1  # distance from 0 or 1 of a decided probability
_DECISIVE = 0.5  # share of the values of a map that are decided, or
_ONE_SIDED = 0.95  # that lie on one side of one half; else it is an image


class LabelMeasure(ErrorMeasure):
    """Relative error, and the labels that both networks set.

    Args:
        outputs: One output, batch by batch.
        settings: The measurement settings.
    """

    def __init__(self, outputs: Sequence[Batches], settings: MeasureSettings) -> None:
        super().__init__(outputs, settings)
        self._set = [batch >= 0.5 for batch in outputs[0]]

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Twice the labels that both set, and the labels that each sets."""
        mine, other = self._set[place], theirs[0] >= 0.5
        axes = tuple(range(1, mine.ndim))
        both, either = (mine & other).sum(axis=axes), mine.sum(axis=axes) + other.sum(axis=axes)
        return np.stack([2.0 * both, either.astype(np.float64)], axis=1)


def independent(batches: Batches) -> bool:
    """Whether scores are from 0 to 1, of any sum."""
    return all(
        within_one(batch) and not np.allclose(batch.astype(np.float64).sum(axis=1), 1.0, atol=1e-3) for batch in batches
    )


def _labels(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    for output in outputs:
        if output.activation != "sigmoid" or not all(within_one(batch) for batch in output.batches):
            continue
        if len(output.shape) == 2:
            yield Finding((output.name,), "a sigmoid in the graph")
        elif _decisive(output.batches):
            yield Finding((output.name,), "a sigmoid in the graph, and values that say yes or no")


def _decisive(batches: Batches) -> bool:
    """Whether most values are decided; those of an image are not."""
    count = sum(batch.size for batch in batches)
    clear = sum(int(((batch < _CLEAR) | (batch > 1 - _CLEAR)).sum()) for batch in batches)
    high = sum(int((batch > 0.5).sum()) for batch in batches)
    return clear >= _DECISIVE * count or max(high, count - high) >= _ONE_SIDED * count


LABELS = OutputKind(
    name="labels",
    title="probabilities of labels",
    distance="relative error",
    compared_by="relative error and labels above one half",
    agreement="labels in common",
    tasks={},
    recognize=_labels,
    measure=LabelMeasure,
    threshold=0.9,
    meaning="{share:.0%} of the labels that either model sets (those above one half) are not set by both",
)
