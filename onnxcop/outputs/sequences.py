"""Sequences that are decoded greedily: class scores at every step, with a blank class (CTC)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.outputs.classes import ClassMeasure, class_rows, looks_like_classes
from onnxcop.outputs.kind import Batches, Finding, MeasureSettings, OutputEvidence, OutputKind

_FEWEST_STEPS = 4
_OFTEN = 0.2  # smallest share of steps at which the blank is the top class


class SequenceMeasure(ClassMeasure):
    """Divergence per step, and whether the decoded string is the same.

    Args:
        outputs: One output [samples, steps, classes], batch by batch.
        settings: The measurement settings.
    """

    def __init__(self, outputs: Sequence[Batches], settings: MeasureSettings) -> None:
        super().__init__(outputs, settings)
        self._blank = blank_of(self._top, outputs[0][0].shape[self._axis])
        self._strings = [[self._decoded(row) for row in top] for top in self._top]

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Whether the strings are equal (0 or 1), and one."""
        mine, other = self._strings[place], map(self._decoded, self.top(theirs[0]))
        equal = np.array([a == b for a, b in zip(mine, other, strict=True)], dtype=np.float64)
        return np.stack([equal, np.ones(len(equal))], axis=1)

    def _decoded(self, top: Array) -> tuple[int, ...]:
        return decoded(top, self._blank)


def decoded(top: Array, blank: int | None) -> tuple[int, ...]:
    """The decoded string: runs of the same class once, blanks left out (Graves et al. 2006, eq. 1)."""
    first = np.append(True, top[1:] != top[:-1]) if len(top) else np.empty(0, np.bool_)
    return tuple(int(step) for step in top[first] if step != blank)


def blank_of(tops: Sequence[Array], classes: int) -> int | None:
    """The blank class: the first or the last, if it is the most frequent one; else None."""
    often = np.sum([np.bincount(top.reshape(-1), minlength=classes) for top in tops], axis=0)
    most = int(often.argmax())
    return most if most in (0, classes - 1) and often[most] >= _OFTEN * often.sum() else None


def _sequences(outputs: Sequence[OutputEvidence]) -> Iterator[Finding]:
    for output in outputs:
        shape = output.shape
        if len(shape) != 3 or shape[1] < _FEWEST_STEPS or shape[2] < 3:
            continue
        why = looks_like_classes(output, at_positions=True)
        tops = [class_rows(batch, 2).argmax(axis=-1) for batch in output.batches]
        if why and blank_of(tops, shape[2]) is not None:
            yield Finding((output.name,), f"{why}, and one class that means nothing")


SEQUENCES = OutputKind(
    name="sequences",
    title="sequences",
    distance="Kullback–Leibler divergence in nats per step",
    compared_by="Kullback–Leibler divergence per step and equal strings",
    agreement="same string",
    tasks={"sequence": (3,)},
    recognize=_sequences,
    measure=SequenceMeasure,
    threshold=0.9,
    meaning="{share:.0%} of the sequences are read differently than by the original",
)
