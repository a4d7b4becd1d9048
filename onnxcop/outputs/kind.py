"""Kinds of outputs: how a kind is recognized, how its divergence is computed, and what agreement means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onnxcop._base.types import Array, FloatArray

Batches = Sequence[Array]  # of one output, one array a batch, samples along axis 0


@dataclass(frozen=True, slots=True)
class OutputEvidence:
    """Evidence about one output.

    Attributes:
        name: Name of the output.
        batches: Its values on calibration data, samples along axis 0.
        activation: The final activation: "softmax", "log-softmax", "sigmoid", or empty.
        metadata: Metadata of the model.
    """

    name: str
    batches: Batches
    activation: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first batch, samples along axis 0."""
        return tuple(self.batches[0].shape)


@dataclass(frozen=True, slots=True)
class Finding:
    """Outputs that form a kind together (e.g. boxes and their scores), and why."""

    outputs: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """Settings of a measure.

    Attributes:
        temperature: Divisor of logits before the softmax. Above 1, all classes of a sample contribute to its
            divergence, not only the likeliest one, so that fewer samples suffice.
        roots: Whether outputs from 0 to 1 are compared by their square roots (the Hellinger distance of probabilities).
            Otherwise, if all are close to 0, as for synthetic inputs, a few would outweigh the rest.
        metadata: Metadata of the model.
    """

    temperature: float = 1.0
    roots: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


class Measure(Protocol):
    """Distance from the original's outputs, as sums over samples.

    Sums can be taken sample by sample, and the distance without any one sample shows how uncertain the distance is.
    """

    def terms(self, place: int, theirs: Sequence[Array]) -> FloatArray:
        """Terms to sum over samples, float64 [samples, terms], of batch `place`; not finite where `theirs` are not."""
        ...

    def value(self, totals: FloatArray) -> FloatArray:
        """The divergence, float64 [...], from sums of terms, float64 [..., terms]."""
        ...

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Agreement as a share: float64 [samples, 2], agreeing and total cases; None if there is no agreement."""
        ...


@dataclass(frozen=True, slots=True)
class OutputKind:
    """One kind of output.

    Attributes:
        name: A word for it, in JSON too.
        title: Description of such an output, e.g. "class scores".
        distance: Name of its divergence, e.g. "relative error".
        compared_by: Both figures in words, for the summary.
        agreement: Name of the agreement figure; empty if there is none.
        tasks: Values of `--task` that name it, and the number of axes (samples along the first) it then has.
        recognize: Finds those of the remaining outputs that are of this kind.
        measure: Constructed from the original's values, by output and batch.
        threshold: Agreement below which (without agreement: divergence above which) the user is warned.
        meaning: Text of the warning, with the disagreeing share (or the divergence).
        counted: Whether the agreement is a share of counted cases, not a mean of numbers.
    """

    name: str
    title: str
    distance: str
    compared_by: str
    agreement: str
    tasks: Mapping[str, tuple[int, ...]]
    recognize: Callable[[Sequence[OutputEvidence]], Iterator[Finding]]
    measure: Callable[[Sequence[Batches], MeasureSettings], Measure]
    threshold: float
    meaning: str
    counted: bool = True
