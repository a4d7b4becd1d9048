"""Divergence of a network's outputs from the original's, on the same samples.

Every output is measured by its kind (see :mod:`onnxcop.outputs`): class scores by the Kullback–Leibler divergence of
the predictions, other outputs by the relative error. The figure of a network is the mean over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from onnxcop._base.types import Array, FloatArray
from onnxcop.outputs.classes import log_probabilities
from onnxcop.outputs.evidence import by_sample
from onnxcop.outputs.intervals import Estimate, of_distance, of_mean, of_share, standard_error
from onnxcop.outputs.judgement import Judgement, Judgements, Outputs, judge, sample_counts
from onnxcop.outputs.kind import Measure, MeasureSettings

__all__ = [
    "Divergence",
    "Figures",
    "HeldOut",
    "OutputFigures",
    "Outputs",
    "Race",
    "Reference",
    "Standing",
    "Waypoint",
    "log_probabilities",
]

_LOST = 0.025  # probability below which a network that is behind is no longer expected to come back
_FEWEST = 8  # samples needed to estimate the standard error


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance of a network's outputs from the reference.

    Attributes:
        value: KL divergence in nats for class scores, relative error ‖y - y₀‖ / ‖y₀‖ for other outputs, the mean
            of several; lower is closer.
        kind: "kl", "error", or "mixed" if there are outputs of both sorts.
        agreement: Mean share of samples on which both networks agree, over the outputs that define agreement.
    """

    value: float
    kind: str
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Waypoint:
    """Distance of a network from the original at one step towards the budget, on held-out samples.

    Attributes:
        name: The step.
        macs: Fraction of the multiply-accumulates that remain.
        divergence: Distance from the original.
        agreement: Share of samples on which both agree, for outputs that define it.
        time: Expected fraction of the original's time; None if operators were not timed.
    """

    name: str
    macs: float
    divergence: float
    agreement: float | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class OutputFigures:
    """Figures of one output, or of outputs that belong together.

    Attributes:
        outputs: Their names.
        kind: Name of the kind (see :data:`onnxcop.outputs.kinds.KINDS`).
        described: A description: the kind, how it is compared, and why.
        divergence: Distance from the original's.
        distance: Name of the distance.
        agreement: How much agrees; None if no output has one.
        agreement_name: Name of the agreement.
        warning: Warning about a figure beyond the kind's threshold; empty if there is none.
    """

    outputs: tuple[str, ...]
    kind: str
    described: str
    divergence: Estimate
    distance: str
    agreement: Estimate | None
    agreement_name: str
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a network, with 95 % intervals.

    Attributes:
        divergence: The mean over outputs.
        outputs: Figures of each output.
    """

    divergence: Estimate
    outputs: tuple[OutputFigures, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about figures beyond the thresholds of their kinds."""
        return tuple(output.warning for output in self.outputs if output.warning)


@dataclass(frozen=True, slots=True)
class Standing:
    """A network's distance from the reference, sample by sample: the mark that another network has to beat.

    Attributes:
        value: The divergence; infinite if outputs cannot be compared.
        terms: By judgement, batch by batch, float64 [samples, terms].
    """

    value: float
    terms: tuple[tuple[FloatArray, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Race:
    """A network against another.

    Attributes:
        standing: Its distance from the reference if it is nearer, else None.
        clear: Whether it was dropped before the last sample, because it was clearly worse.
    """

    standing: Standing | None
    clear: bool = False

    @property
    def unopposed(self) -> Standing:
        """The standing of a network that had no other to beat."""
        assert self.standing is not None
        return self.standing


class Reference:
    """The original's outputs on a set of samples.

    Args:
        outputs: Batches of outputs by name.
        roots: Whether outputs from 0 to 1 are compared by their square roots (see
            :class:`onnxcop.outputs.kind.MeasureSettings`).
        temperature: Divisor of logits before their softmax (see there too).
        judgements: Kinds of the outputs; decided by their values if not given.
        counts: Samples of every batch; None to take them from the outputs.
    """

    def __init__(
        self, outputs: Outputs, *, roots: bool = False, temperature: float = 1.0,
        judgements: Judgements | None = None, counts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.outputs = [dict(batch) for batch in outputs]
        self.counts = sample_counts(self.outputs) if counts is None else list(counts)
        self.judgements = judge(self.outputs, self.counts) if judgements is None else judgements
        self._settings = MeasureSettings(temperature, roots, self.judgements.metadata)
        self._measures = [self._measure(judgement) for judgement in self.judgements.entries]
        self._agreements = True
        self.names = [name for judgement in self.judgements.entries for name in judgement.outputs]

    @property
    def kind(self) -> str:
        """The `kind` of divergences from this reference."""
        by_shares = {judgement.kind.distance.startswith("Kullback") for judgement in self.judgements.entries}
        return "mixed" if len(by_shares) > 1 else "kl" if True in by_shares else "error"

    @property
    def agreement_name(self) -> str:
        """The name of the agreement measured against this reference."""
        names = {judgement.kind.agreement for judgement in self.judgements.entries} - {""}
        return names.pop() if len(names) == 1 else "agreement"

    def softened(self, temperature: float) -> Reference:
        """The reference for choices: at another temperature, and without agreements, which take time."""
        reference = copy(self)
        if self.kind != "error":
            reference = Reference(
                self.outputs, roots=self._settings.roots, temperature=temperature, judgements=self.judgements,
                counts=self.counts,
            )  # fmt: skip
        reference._agreements = False
        return reference

    def __len__(self) -> int:
        return sum(self.counts) if self.names else 0

    def compare(self, outputs: Outputs) -> Divergence:
        """Distance of other outputs on the same samples."""
        values, weights, agreements = [], [], []
        for judgement, measure in zip(self.judgements.entries, self._measures, strict=True):
            terms = self._gathered(judgement, outputs, measure.terms)
            if terms is None or not np.isfinite(terms).all():
                return Divergence(float("inf"), self.kind, None)
            values.append(float(measure.value(terms.sum(axis=0))))
            weights.append(len(judgement.outputs))
            hits = self._gathered(judgement, outputs, measure.hits) if self._agreements else None
            if hits is not None and hits[:, 1].sum() > 0:
                agreements.append(float(hits[:, 0].sum() / hits[:, 1].sum()))
        value = float(np.average(values, weights=weights)) if values else 0.0
        return Divergence(value, self.kind, float(np.mean(agreements)) if agreements else None)

    def terms(self, place: int, batch: Mapping[str, Array]) -> list[FloatArray] | None:
        """What a batch of another network's outputs adds to its distance.

        Args:
            place: The number of the batch.
            batch: Its outputs.

        Returns:
            By judgement, float64 [samples, terms]; None if they cannot be compared.
        """
        terms = []
        for judgement, measure in zip(self.judgements.entries, self._measures, strict=True):
            if any(self.outputs[place][name].shape != batch[name].shape for name in judgement.outputs):
                return None
            terms.append(measure.terms(place, self._by_sample(judgement, dict(batch), place)))
            if not np.isfinite(terms[-1]).all():
                return None
        return terms

    def by_terms(self, terms: Iterable[list[FloatArray] | None]) -> float:
        """The distance from what :meth:`terms` returns for every batch, in order."""
        return self.race_by_terms(terms).unopposed.value

    def race(self, outputs: Iterable[Mapping[str, Array]], best: Standing | None = None) -> Race:
        """Distance of another network's outputs, which are computed lazily, unless it is not below `best`.

        Reading stops at the batch after which the samples that are left are unlikely to bring the other network back.
        Let e be the standard error of the difference over n of N samples. The difference over all of them will be
        within a few e √(1 - n/N) of it, by Student's distribution. If they fall below zero with a probability of less
        than :data:`_LOST`, the race is lost. A closer network runs on all samples.
        """
        return self.race_by_terms((self.terms(place, batch) for place, batch in enumerate(outputs)), best)

    def race_by_terms(self, terms: Iterable[list[FloatArray] | None], best: Standing | None = None) -> Race:
        """The same from what :meth:`terms` returns for every batch, in order."""
        seen: list[list[FloatArray]] = [[] for _ in self._measures]
        for place, batch in enumerate(terms):
            if batch is None:
                return Race(Standing(math.inf)) if best is None else Race(None, clear=True)
            for own, one in zip(seen, batch, strict=True):
                own.append(one)
            if best is not None and place + 1 < len(self.outputs) and self._lost(seen, best):
                return Race(None, clear=True)
        value = float(self._value([np.concatenate(own).sum(axis=0) for own in seen])) if seen else 0.0
        nearer = best is None or value < best.value
        return Race(Standing(value, tuple(map(tuple, seen))) if nearer else None)

    def _lost(self, terms: Sequence[Sequence[FloatArray]], best: Standing) -> bool:
        """Whether a network is clearly worse than another on the batches that both have seen."""
        from scipy.special import stdtrit

        if not best.terms:
            return False
        both = [
            (np.concatenate(own), np.concatenate(other[: len(own)]))
            for own, other in zip(terms, best.terms, strict=True)
        ]
        count = len(both[0][0]) if both else 0
        if count < _FEWEST or any(len(own) != count for own, _ in both):
            return False
        totals = [(own.sum(axis=0), other.sum(axis=0)) for own, other in both]
        gap = self._value([own for own, _ in totals]) - self._value([other for _, other in totals])
        without = self._value([total - own for (own, _), (total, _) in zip(both, totals, strict=True)])
        without = without - self._value([total - other for (_, other), (_, total) in zip(both, totals, strict=True)])
        left = max(0.0, 1.0 - count / sum(len(batch) for batch in best.terms[0]))
        return bool(gap > stdtrit(count - 1, 1.0 - _LOST) * math.sqrt(left) * standard_error(without))

    def _value(self, totals: Sequence[FloatArray]) -> FloatArray:
        """The mean over outputs, float64 [...], from sums of terms, float64 [..., terms]."""
        values = [measure.value(total) for measure, total in zip(self._measures, totals, strict=True)]
        weights = [len(judgement.outputs) for judgement in self.judgements.entries]
        return np.asarray(np.average(values, axis=0, weights=weights))

    def figures(self, outputs: Outputs) -> Figures:
        """The same with intervals, for each output."""
        entries, values, left_out = [], [], []
        for judgement, measure in zip(self.judgements.entries, self._measures, strict=True):
            terms = self._gathered(judgement, outputs, measure.terms)
            if terms is None or not np.isfinite(terms).all():
                value, without = math.inf, np.empty(0)
            else:
                totals = terms.sum(axis=0)
                value = float(measure.value(totals))
                without = measure.value(totals - terms) if len(terms) > 1 else np.empty(0)
            hits = None if math.isinf(value) else self._gathered(judgement, outputs, measure.hits)
            entries.append(self._figures_of(judgement, of_distance(value, without, len(self)), hits))
            values += [value] * len(judgement.outputs)
            left_out += [without] * len(judgement.outputs)
        return Figures(self._mean(values, left_out), tuple(entries))

    def _mean(self, values: Sequence[float], left_out: Sequence[FloatArray]) -> Estimate:
        """The mean over outputs, with an interval if all of them distinguish samples."""
        if not values:
            return Estimate(0.0, None, None, len(self))
        alike = len({len(without) for without in left_out}) == 1
        without = np.mean(left_out, axis=0) if alike else np.empty(0)
        return of_distance(float(np.mean(values)), without, len(self))

    def _figures_of(self, judgement: Judgement, divergence: Estimate, hits: FloatArray | None) -> OutputFigures:
        kind, agreement = judgement.kind, None
        if hits is not None and hits[:, 1].sum() > 0:
            agreement = (of_share if kind.counted else of_mean)(hits, len(self))
        return OutputFigures(
            outputs=judgement.outputs,
            kind=kind.name,
            described=str(judgement),
            divergence=divergence,
            distance=kind.distance,
            agreement=agreement,
            agreement_name=kind.agreement,
            warning=_warning(judgement, divergence, agreement),
        )

    def _measure(self, judgement: Judgement) -> Measure:
        batches = list(zip(*(self._by_sample(judgement, batch, place) for place, batch in enumerate(self.outputs)),
                           strict=True))  # fmt: skip
        return judgement.kind.measure(batches, self._settings)

    def _by_sample(self, judgement: Judgement, batch: dict[str, Array], place: int) -> list[Array]:
        return [
            by_sample(batch[name], axis, self.counts[place])
            for name, axis in zip(judgement.outputs, judgement.axes, strict=True)
        ]

    def _gathered(
        self, judgement: Judgement, outputs: Outputs,
        measured: Callable[[int, Sequence[Array]], FloatArray | None],
    ) -> FloatArray | None:  # fmt: skip
        """A measure's values for every sample, float64 [samples, …]; None if shapes differ or it has none."""
        gathered = []
        for place, (mine, theirs) in enumerate(zip(self.outputs, outputs, strict=True)):
            if any(mine[name].shape != theirs[name].shape for name in judgement.outputs):
                return None
            one = measured(place, self._by_sample(judgement, dict(theirs), place))
            if one is None:
                return None
            gathered.append(one)
        return np.concatenate(gathered)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Samples to measure on.

    Attributes:
        feeds: Batches.
        reference: Outputs of the original on them.
    """

    feeds: Sequence[Mapping[str, Array]]
    reference: Reference


def _warning(judgement: Judgement, divergence: Estimate, agreement: Estimate | None) -> str:
    """The warning about a figure beyond the threshold of its kind."""
    kind = judgement.kind
    share = divergence.value if agreement is None else 1.0 - agreement.value
    beyond = share > (kind.threshold if not kind.agreement else 1.0 - kind.threshold)
    if not beyond or (kind.agreement and agreement is None):
        return ""
    if math.isinf(share):
        return f"output {judgement.outputs[0]} contains NaN"
    return f"output {' and '.join(judgement.outputs)}: {kind.meaning.format(share=share)}"
