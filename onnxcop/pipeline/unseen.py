"""Comparison of the written model with the original, on samples that no choice has used.

The choice of widths, weights and steps is biased towards its samples: their divergence is too low. So some samples are
set aside before anything is chosen, and at the end both files run on them in plain sessions of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

from onnxcop._base.types import Feed
from onnxcop.data.open import CalibrationData
from onnxcop.outputs.judgement import Judgements, judge
from onnxcop.reconstruction.divergence import Figures, Reference
from onnxcop.runtime.session import EngineOptions, Session

_SHARE, _MOST_SHARE = 1 / 8, 1 / 4  # share of the samples to set aside; up to a quarter if there are few
_FEWEST, _MOST = 64, 256  # samples to set aside, if there are enough
_USELESS = 4  # samples; fewer mean nothing and are better used for calibration
_KEPT = 1 << 28  # bytes of the original's outputs


def set_aside(source: CalibrationData, seed: int) -> tuple[CalibrationData, CalibrationData | None]:
    """Split data into samples to calibrate on and samples to report on.

    Samples beyond the requested number are set aside first; if there are too few of them, some of the others.

    Args:
        source: The calibration data.
        seed: Random seed of the choice.

    Returns:
        Both parts; None for the second if all samples are needed for calibration.
    """
    needed = min(max(round(_SHARE * source.count), _FEWEST), _MOST)
    share = min(needed, int(_MOST_SHARE * source.count))
    unit, spare = source.layout.size or 1, source.spare()
    if spare is not None and spare.count >= max(share, _USELESS):
        return source, spare.take(_MOST, seed)
    if share < max(_USELESS, unit):
        return source, None
    rest, aside = source.split(share / source.count, seed)
    rest.description = f"{source.description}, {aside.count} of them set aside"
    return rest, aside


@dataclass
class UnseenSamples:
    """The original on samples that no choice has used.

    Attributes:
        model: The original.
        data: The samples.
        options: How to run models.
        task: The task of the model, if the user names it.
        seen: Whether choices used them after all, because there are too few samples to set any aside.
    """

    model: onnx.ModelProto
    data: CalibrationData
    options: EngineOptions
    task: str | None = None
    seen: bool = False
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
        if self._reference is None:
            self._reference = self._of_original(judgements)
        if not self._reference.names:
            return None
        with Session(pruned, self.options) as session:
            outputs = [session.run(feed) for feed in self._feeds(len(self._reference.outputs))]
        return self._reference.figures(outputs)

    @property
    def described(self) -> str:
        """Description of the samples behind the figures."""
        count = self.data.count if self._reference is None else sum(self._reference.counts)
        if self.seen:
            return (
                f"{count} samples that choices were made on too, as there are too few to set any aside: "
                "the figures are optimistic"
            )
        return f"{count} samples that no choice has seen"

    def _of_original(self, judgements: Judgements | None) -> Reference:
        outputs: list[Feed] = []
        counts, size = list[int](), 0
        with Session(self.model, self.options) as session:
            for feed in self._feeds():
                outputs.append(session.run(feed))
                counts.append(self.data.layout.samples_in(feed))
                size += sum(getattr(value, "nbytes", 0) for value in outputs[-1].values())
                if size > _KEPT:
                    break
        if judgements is None:
            judgements = judge(outputs, counts, self.model, self.task)
        return Reference(outputs, judgements=judgements, counts=counts)

    def _feeds(self, most: int | None = None) -> Iterator[Feed]:
        for place, feed in enumerate(self.data.batches()):
            if place == most:
                return
            yield dict(feed)
