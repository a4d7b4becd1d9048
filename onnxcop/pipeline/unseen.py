"""Comparison of the written model with the original, on samples that no choice has used.

The choice of widths, weights and steps is biased towards its samples: their divergence is too low. So some samples are
set aside before anything is chosen, and at the end both files run on them in plain sessions of ONNX Runtime.

If too few could be set aside, figures are cross-fitted (twofold cross-validation, Stone 1974): the whole choice is
repeated on each half of the samples, and what it gives is measured on the other half. The result itself then uses all
samples. A half makes a worse model than the whole, so the figures err on the side of caution.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import onnx

from onnxcop._base.types import Feed
from onnxcop.data.open import CalibrationData
from onnxcop.outputs.batches import outputs_on
from onnxcop.outputs.judgement import Judgements, judge
from onnxcop.parallel.crew import HERE, Crew
from onnxcop.reconstruction.divergence import Figures, Reference
from onnxcop.runtime.session import EngineOptions

_SHARE, _MOST_SHARE = 1 / 8, 1 / 4  # share of the samples to set aside; up to a quarter if there are few
_FEWEST, _MOST = 64, 256  # samples to set aside, if there are enough
_USELESS = 4  # samples; fewer mean nothing and are better used for calibration
_KEPT = 1 << 28  # bytes of the original's outputs
FEWEST_IN_HALF = 8  # samples; fewer are too little to choose by


def set_aside(source: CalibrationData, seed: int) -> tuple[CalibrationData, CalibrationData | None]:
    """Split data into samples to calibrate on and samples to report on.

    Samples beyond the requested number are set aside first; if there are too few of them, some of the others.

    Args:
        source: The calibration data.
        seed: Random seed of the choice.

    Returns:
        Both parts; None for the second if all samples are needed for calibration.
    """
    share = _share(source.count)
    unit, spare = source.layout.size or 1, _unused(source)
    if spare is not None:
        return source, spare.take(_MOST, seed)
    if share < max(_USELESS, unit):
        return source, None
    rest, aside = source.split(share / source.count, seed)
    rest.description = f"{source.description}, {aside.count} of them set aside"
    return rest, aside


def _unused(source: CalibrationData) -> CalibrationData | None:
    """Samples that the run does not use, if they are as many as would be set aside."""
    spare = source.spare()
    return None if spare is None or spare.count < max(_share(source.count), _USELESS) else spare


def _share(count: int) -> int:
    """How many of so many samples to set aside."""
    return min(max(round(_SHARE * count), _FEWEST), _MOST, int(_MOST_SHARE * count))


def can_be_halved(source: CalibrationData) -> bool:
    """Whether each half of the samples is enough to choose by."""
    return source.count >= 2 * max(FEWEST_IN_HALF, source.layout.size or 1)


def better_halved(source: CalibrationData) -> bool:
    """Whether fewer samples would be taken from the run than figures need, but enough to choose by half of them."""
    return _share(source.count) < _FEWEST and _unused(source) is None and can_be_halved(source)


class Unseen(Protocol):
    """Figures on samples that no choice has used."""

    def figures(self, pruned: onnx.ModelProto, judgements: Judgements | None = None) -> Figures | None:
        """Figures of the pruned model; None if no output holds real numbers."""
        ...

    @property
    def described(self) -> str:
        """Description of the samples behind the figures."""
        ...


@dataclass
class UnseenSamples:
    """The original on samples that no choice has used.

    Attributes:
        model: The original.
        data: The samples.
        options: How to run models.
        task: The task of the model, if the user names it.
        seen: Whether choices used them after all, because there are too few samples to set any aside.
        crew: Runs models on the batches.
    """

    model: onnx.ModelProto
    data: CalibrationData
    options: EngineOptions
    task: str | None = None
    seen: bool = False
    crew: Crew = HERE
    _reference: Reference | None = field(default=None, init=False)

    def figures(self, pruned: onnx.ModelProto, judgements: Judgements | None = None) -> Figures | None:
        """Run the pruned model, and compare its outputs with the original's.

        Args:
            pruned: The written model.
            judgements: Kinds of the outputs; None to decide them on these samples.

        Returns:
            The figures; None if no output holds real numbers.

        Raises:
            EngineError: One of the models does not run on the samples.
        """
        reference = self.reference(judgements)
        return reference.figures(self.outputs_of(pruned)) if reference.names else None

    def reference(self, judgements: Judgements | None = None) -> Reference:
        """The original's outputs, computed once."""
        if self._reference is None:
            self._reference = self._of_original(judgements)
        return self._reference

    def outputs_of(self, pruned: onnx.ModelProto) -> list[Feed]:
        """A pruned model's outputs on the same batches."""
        most = len(self.reference().outputs)
        return [answer for _, answer in outputs_on(pruned, self.data, self.options, self.crew, most)]

    @property
    def described(self) -> str:
        """Description of the samples behind the figures."""
        count = self.data.count if self._reference is None else sum(self._reference.counts)
        if self.seen:
            return (
                f"{count} samples that choices were made on too, as there are too few others: "
                "the figures are optimistic"
            )
        return f"{count} samples that no choice has seen"

    def _of_original(self, judgements: Judgements | None) -> Reference:
        outputs: list[Feed] = []
        counts, size = list[int](), 0
        with closing(outputs_on(self.model, self.data, self.options, self.crew)) as answers:
            for count, answer in answers:
                outputs.append(answer)
                counts.append(count)
                size += sum(getattr(value, "nbytes", 0) for value in outputs[-1].values())
                if size > _KEPT:
                    break
        if judgements is None:
            judgements = judge(outputs, counts, self.model, self.task)
        return Reference(outputs, judgements=judgements, counts=counts)


@dataclass
class CrossFitted:
    """The original on two halves of the samples, and models that are made from one half and measured on the other.

    Attributes:
        halves: Both halves.
        made_from: Makes a pruned model from samples alone, in the same way and to the same size as the result.
    """

    halves: tuple[UnseenSamples, UnseenSamples]
    made_from: Callable[[CalibrationData], onnx.ModelProto]

    def figures(self, pruned: onnx.ModelProto, judgements: Judgements | None = None) -> Figures | None:
        """Figures over all samples, as :meth:`UnseenSamples.figures`; `pruned` itself has used them all."""
        first, second = self.halves
        outputs, counts = list[Feed](), list[int]()
        for half in self.halves:
            reference = half.reference(judgements)
            outputs += reference.outputs
            counts += reference.counts
        judgements = judgements or judge(outputs, counts, first.model, first.task)
        reference = Reference(outputs, judgements=judgements, counts=counts)
        if not reference.names:
            return None
        answers = [
            answer
            for half, other in ((first, second), (second, first))
            for answer in half.outputs_of(self.made_from(other.data))
        ]
        return reference.figures(answers)

    @property
    def described(self) -> str:
        """Description of the samples behind the figures."""
        count = sum(half.data.count for half in self.halves)
        return f"{count} samples, each half by a model that was made in the same way from the other half"
