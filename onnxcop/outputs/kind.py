"""What a kind of output has to say: how it is recognized, how its divergence is computed, what agreement means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onnxcop._base.types import Array, FloatArray

Batches = Sequence[Array]  # of one output, one array a batch, samples along axis 0


@dataclass(frozen=True, slots=True)
class OutputEvidence:
    """What is known of one output.

    Attributes:
        name: Of the output.
        batches: Its values on calibration data, samples along axis 0.
        activation: What the graph ends in before it: "softmax", "log-softmax", "sigmoid", or empty.
        metadata: Of the model.
    """

    name: str
    batches: Batches
    activation: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first batch, samples along axis 0."""
        return tuple(self.batches[0].shape)


@dataclass(frozen=True, slots=True)
class Finding:
    """Outputs that are of a kind together (e.g. boxes and their scores), and why."""

    outputs: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """How choices are made.

    Attributes:
        temperature: What logits are divided by before their softmax. Above 1 all classes of a sample show how
            far it is off, not the likeliest alone, so that a difference shows on fewer samples.
        roots: Whether outputs from 0 to 1 are compared by their square roots (Hellinger's distance of
            probabilities): where all are next to 0, as for inputs that are synthetic, few would outweigh the rest.
        metadata: Of the model.
    """

    temperature: float = 1.0
    roots: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


class Measure(Protocol):
    """Distance from the original's outputs, as sums over samples.

    Sums, since these can be taken sample by sample, and the distance without any one of them shows how
    uncertain the distance is.
    """

    def terms(self, place: int, theirs: Sequence[Array]) -> FloatArray:
        """What adds up over samples, float64 [samples, terms], of batch `place`; not finite where `theirs` are not."""
        ...

    def value(self, totals: FloatArray) -> FloatArray:
        """The divergence, float64 [...], that sums of terms, float64 [..., terms], come to."""
        ...

    def hits(self, place: int, theirs: Sequence[Array]) -> FloatArray | None:
        """Agreement as a share: float64 [samples, 2], what agrees and of how much; None where there is no such."""
        ...


@dataclass(frozen=True, slots=True)
class OutputKind:
    """One kind of output.

    Attributes:
        name: A word for it, in JSON too.
        title: What such an output is, "class scores".
        distance: What its divergence is, "relative error".
        compared_by: Both figures in words, for the summary.
        agreement: Name of the agreement figure; empty where there is none.
        tasks: Values of `--task` that name it, and the number of axes (samples along the first) it then has.
        recognize: Which of the outputs left are of this kind, on evidence.
        measure: Made of the original's values: per output, per batch.
        threshold: Agreement below which (without agreement: divergence above which) the user is warned.
        meaning: What the warning says, of the share that disagrees (or the divergence).
        counted: Whether the agreement counts cases (a share of them), and is not a mean of numbers.
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
